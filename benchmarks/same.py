"""Whether two versions of gsprune compute the same, bit for bit.

    python benchmarks/same.py write before/     # six runs of this checkout's train.py
    python benchmarks/same.py compare before/ after/

`write` runs the three variants, units together with single weights, a budget of MACs and a network that is cut while it
trains, on one thread, and copies what they leave. `compare` compares the tensors of every file of masks, scores,
weights and the smaller network, `metrics.jsonl` and `result.json`, without times, speeds, paths and identities; it
prints each difference and exits with 1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).parents[1]
SHORT = [
    *("seed=3", "tracking=none", "trainer.device=cpu", "trainer.latency_repeats=0", "trainer.progress=none"),
    *("trainer.dense_epochs=2", "trainer.prune_epochs=5"),
]
RUNS: dict[str, list[str]] = {
    "elementwise": ["pruner=elementwise", "pruner.target_sparsity=0.9"],
    "abs": ["pruner=abs", "model=vit_tiny", "optimizer=adamw"],
    "weighted": ["pruner=weighted"],
    "units_and_weights": ["pruner=units_and_weights"],
    "budget": ["pruner=weighted", "pruner.budget.macs=0.5"],
    "each_update": ["pruner=weighted", "pruner.shrink=each_update"],
}
# Of one run or machine: how long it took, where it lies, what its code and settings hash to.
OWN = ("seconds", "latency", "speedup", "_hash", "mlflow", "resumed", "tracking", "time", "timings", "overrides")


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, overrides in RUNS.items():
        out = folder.absolute() / name
        command = [sys.executable, str(ROOT / "train.py"), *SHORT, *overrides, f"hydra.run.dir={out}"]
        with tempfile.TemporaryDirectory() as elsewhere:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, cwd=elsewhere, env=environment, stdout=subprocess.DEVNULL)
        print(f"{name}: {len(list(tensor_files(out)))} files of tensors", flush=True)


def compare(first: Path, second: Path) -> int:
    found = [f"{name}: {text}" for name in RUNS for text in differences(first / name, second / name)]
    print("\n".join(found) or f"the same, bit for bit: {', '.join(RUNS)}")
    return 1 if found else 0


def differences(first: Path, second: Path) -> Iterator[str]:
    """What differs between two runs' directories, a line each."""
    names = [{str(path.relative_to(run)) for path in tensor_files(run)} for run in (first, second)]
    if not names[0] & names[1]:
        yield "no file of tensors in common"
    yield from (f"{name} is in one of them" for name in sorted(names[0] ^ names[1]))
    for name in sorted(names[0] & names[1]):
        if tensors(first / name) != tensors(second / name):
            yield f"{name} differs"
    if numbers(first) != numbers(second):
        yield "metrics.jsonl differs"
    yield from _different_results(
        *(_own_left_out(json.loads((run / "result.json").read_text())) for run in (first, second))
    )


def tensor_files(run: Path) -> Iterator[Path]:
    """All files of tensors but the checkpoints of the run itself, whose form may change."""
    return (path for path in sorted(run.rglob("*.safetensors")) if not path.parent.name.startswith("epoch_"))


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> type, shape and bytes of every tensor of a file."""
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        shapes = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
        return {name: (*shapes[name], file.get_tensor(name).tobytes()) for name in shapes}


def numbers(run: Path) -> list[Any]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf8").splitlines()
    return [_own_left_out(json.loads(line)) for line in lines]


def _own_left_out(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not any(word in key for word in OWN)}


def _different_results(first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            yield f"result.json: {key}: {first.get(key)!r} and {second.get(key)!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write").add_argument("folder", type=Path)
    two = commands.add_parser("compare")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    given = parser.parse_args()
    if given.command == "write":
        write(given.folder)
        return 0
    return compare(given.first, given.second)


if __name__ == "__main__":
    raise SystemExit(main())
