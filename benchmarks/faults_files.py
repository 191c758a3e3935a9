"""Spoil every kind of file that gsprune reads, again and again, and count what becomes of it.

    python benchmarks/faults_files.py [--examples 1000] [--kind masks]

Every outcome is "clean" (it loads) or "refused" (a ValueError of one sentence); anything else ends the run with the
smallest mutation that shows it. The kinds and the mutations are those of tests/fuzzing.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzzing import KINDS, fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="of each kind")
    parser.add_argument("--kind", choices=KINDS, action="append", help="this kind only")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print("| kind | files | load | refused | seconds |\n|---|---|---|---|---|")
    total = 0
    for kind in options.kind or KINDS:
        begin = time.perf_counter()
        seen = fuzz(kind, options.examples, repeatable=False)
        total += sum(seen.values())
        seconds = time.perf_counter() - begin
        print(
            f"| {kind} | {sum(seen.values()):,} | {seen['clean']:,} | {seen['refused']:,} | {seconds:.1f} |", flush=True
        )
    print(f"\n{total:,} files: no crash, no hang, no allocation of more than 1 GiB, nothing run or opened elsewhere.")


if __name__ == "__main__":
    main()
