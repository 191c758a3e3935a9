"""One network, one data order and one pruner in six loops: sha256 of all weights and masks that each leaves.

    python benchmarks/loops.py     # a minute; the network of tests/partner_loops.py

"at_end" cuts the network after training, "each_update" during it. Each loop is killed and resumed, too; the Trainer in
the middle of an epoch. torchrun has two processes, which both read the whole batch.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

import partner_loops  # noqa: E402
from partner_loops import Result  # noqa: E402

SHRINKS = ("at_end", "each_update")


def digest(found: Result | None) -> str:
    assert found is not None
    whole = hashlib.sha256()
    for name, tensor in sorted(found.items()):
        whole.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def rows(shrink: str, folder: Path) -> Iterator[tuple[str, Result | None, Result | None]]:
    """The name of a loop, what it leaves, and what it leaves after a kill and a resume."""
    yield "hooks by hand", partner_loops.by_hooks(shrink), None
    yield "plain loop, attach", partner_loops.attached(shrink), None
    whole, _ = partner_loops.by_trainer(shrink, folder / "trainer")
    resumed, _ = partner_loops.by_trainer(shrink, folder / "trainer", resume=str(folder / "trainer" / "checkpoint-6"))
    yield "transformers' Trainer", whole, resumed
    whole, _ = partner_loops.by_lightning(shrink, folder / "lightning")
    resumed, _ = partner_loops.by_lightning(shrink, folder / "lightning2", resume=folder / "lightning" / "epoch=1.ckpt")
    yield "Lightning", whole, resumed
    whole = partner_loops.accelerated(shrink, folder / "accelerate")
    partner_loops.accelerated(shrink, folder / "accelerate", stop=2)
    yield "accelerate", whole, partner_loops.accelerated(shrink, folder / "accelerate", resume=True)


def torchrun(folder: Path) -> dict[str, dict[tuple[str, bool], Result]]:
    """Of the first process: whole, and resumed after both were killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    for words in ([], ["resume"]):
        script = [str(TESTS / "partner_loops.py"), str(folder), *words]
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *script], env=env, capture_output=True, check=bool(words))
    return {name: torch.load(folder / f"{name}-0.pt", weights_only=True) for name in ("whole", "resumed")}


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as in torchrun's processes: sums over several threads have other last bits
    lines, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = torchrun(Path(folder))
        for shrink in SHRINKS:
            both = [ranks[name][shrink, False] for name in ("whole", "resumed")]
            made = [*rows(shrink, Path(folder, shrink)), ("torchrun, 2 processes", *both)]
            for name, whole, resumed in made:
                again = "-" if resumed is None else digest(resumed)
                lines.append(f"| {name} | {shrink} | {digest(whole)} | {again} |")
                found.setdefault(shrink, set()).update({digest(whole), *([] if resumed is None else [again])})
    print("\n".join(["| loop | shrink | sha256 | after a kill and a resume |", "|---|---|---|---|", *lines]))
    return int(any(len(some) > 1 for some in found.values()))


if __name__ == "__main__":
    sys.exit(main())
