"""Try random overrides of the reference application, and count what becomes of them.

    python benchmarks/faults_config.py [--tries 500] [--first 0]

Every outcome is a run, Hydra's own message, or a ValueError of one sentence, which train.py shows without a traceback;
anything else is printed with the overrides that show it. The overrides are those of tests/fuzzing_conf.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzzing_conf import attempt, combination


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first one")
    parser.add_argument("--show", action="store_true", help="print every sentence")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    seen: Counter[str] = Counter()
    begin = time.perf_counter()
    for seed in range(options.first, options.first + options.tries):
        overrides = combination(seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    kind, sentence = attempt(overrides, Path(folder))
            except Exception as error:
                kind, sentence = "a bug", f"{type(error).__name__}: {error}"
        seen[kind] += 1
        if options.show or kind == "a bug":
            print(f"{seed} {kind}: {sentence[:400]}\n    {' '.join(overrides)}", flush=True)
    names = {"run": "ran", "composed": "refused by Hydra", "refused": "refused by gsprune", "a bug": "neither"}
    told = ", ".join(f"{seen[kind]} {name}" for kind, name in names.items())
    print(f"{options.tries} combinations in {time.perf_counter() - begin:.0f} s: {told}")
    return int(seen["a bug"] > 0)


if __name__ == "__main__":
    sys.exit(main())
