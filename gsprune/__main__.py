"""`python -m gsprune` is the command `gsprune`."""

from gsprune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
