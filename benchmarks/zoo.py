"""Real networks cut at half: the table of docs/networks.md, torch-pruning beside it.

    python benchmarks/zoo.py --json zoo.json [--networks 'torchvision/*' 'timm/*'] [--rival] [--write]

Every network has a process of its own (at most `--limit` seconds of processor time and 8 GiB for each library) and one
thread. gsprune finds all structures and removes a random half of the units of each (branches stay); what is compared in
float64 is the masked and the cut network: on the example, on noise, on twice the batch. Then the cut network is saved,
loaded into a fresh one and trained one step. `--rival` cuts the same networks with torch-pruning (extra `rivals`), in
the ways that `zoo_rival.py` says. What is in the file is not measured again; `--write` puts the table of all that the
file holds into docs/networks.md. Seconds are processor seconds.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import zoo_transformers
import zoo_vision
from torch import Tensor, nn
from zoo_vision import Entry

from gsprune import find_structures, load_pruned, save_pruned
from gsprune.criteria.base import unit_sums
from gsprune.structures.example import call, map_tensors, tensors_in
from gsprune.structures.running import outputs
from gsprune.structures.structure import Found, Structure
from gsprune.structures.twin import twin_of
from gsprune.surgery.proof import noise_like
from gsprune.surgery.shrink import mask_units, shrink

NETWORKS: dict[str, Entry] = {**zoo_vision.NETWORKS, **zoo_transformers.NETWORKS}
TOLERANCE = 1e-6  # relative to the largest output, in float64; of cut RMSNorms the weights are rounded to float32
COARSE = 1e-3  # in float32
MEMORY = 8 * 2**30  # bytes that a process may ask for: torch-pruning takes more for Swin
PAGE = Path(__file__).parent.parent / "docs" / "networks.md"
BEGIN, END = "<!-- benchmarks/zoo.py -->", "<!-- end -->"


# ---- one network


def measure(entry: Entry) -> dict[str, Any]:
    """What gsprune does with a network.

    Returns:
        found, units    structures and units of each kind
        skipped         name -> why it stays
        find, cut       seconds
        left            share of the parameters
        difference      of masked and cut network, relative to the largest output, on each input
        tolerance       what that may be
        loaded, trained whether the saved network computes the same, and takes a step
        gates           where affine pairs are read for consumers: how far what they say lies apart, relative
    """
    model, x = build(entry)
    before = count(model)
    start = time.process_time()
    found = find_structures(model, x)
    between = time.process_time()
    keeps = halves(found.structures)
    dtype = torch.float32 if found.proof else torch.float64  # of a network that does not run in float64
    masked, args = twin_of(model, x, dtype)
    again = time.process_time()
    plan = shrink(model, found.structures, keeps, example_input=x) if found.structures else None
    end = time.process_time()
    row = {
        "found": dict(Counter(s.kind for s in found.structures)),
        "units": units_of(found),
        "skipped": dict(found.skipped),
        "find": between - start,
        "cut": end - again,
        "left": count(model) / before,
    }
    if plan is None:
        return row
    mask_units(masked, found.structures, keeps)
    small, _ = twin_of(model, x, dtype)
    row["tolerance"] = TOLERANCE if dtype == torch.float64 else COARSE
    row |= {"difference": {name: difference(masked, small, other) for name, other in inputs(args).items()}}
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(folder, model, plan)
        loaded = load_pruned(folder, build(entry)[0])
    row["loaded"] = all(torch.equal(a, b) for a, b in zip(outputs(loaded, x), outputs(model, x), strict=True))
    row["trained"] = train_step(model, x) if entry.trains else None
    row["gates"] = gates_apart(entry, [s for s in found.structures if s.scales])
    return row


def gates_apart(entry: Entry, structures: Sequence[Structure]) -> float:
    """The largest difference of the sums of w * g over gates and over consumers, relative, of the dense network in
    float64 with any affine pairs."""
    if not structures or not entry.trains:
        return 0.0
    model, x = twin_of(*build(entry), torch.float64)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.5)
    model.requires_grad_(True).zero_grad()
    torch.stack([t.square().mean() for t in tensors_in(call(model, x))]).sum().backward()  # type: ignore[no-untyped-call]
    tensors = dict(model.named_parameters())

    def pair(name: str) -> tuple[Tensor, Tensor]:
        weight, grad = tensors[name].detach(), tensors[name].grad
        return weight, torch.zeros_like(weight) if grad is None else grad  # of a part that runs in training alone

    sums = [(unit_sums(s.gates, pair), unit_sums(s.consumers, pair)) for s in structures]
    return max(float((gates - read).abs().max() / (read.abs().max() + 1e-30)) for gates, read in sums)


def build(entry: Entry) -> tuple[nn.Module, Any]:
    """The same network and example each time."""
    torch.manual_seed(0)
    return entry.build().eval(), entry.example()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def units_of(found: Found) -> dict[str, int]:
    units = Counter[str]()
    for structure in found.structures:
        units[structure.kind] += structure.units
    return dict(units)


def halves(structures: Sequence[Structure]) -> list[Tensor]:
    """A random half of the units of each, bool (units,); of an odd number the larger half stays."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(s.units, generator=generator) < (s.units + 1) // 2 for s in structures]


def inputs(example: Any) -> dict[str, Any]:
    def twice(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if tensor.dim() else tensor

    return {"example": example, "noise": noise_like(example), "twice the batch": map_tensors(twice, example)}


def difference(masked: nn.Module, small: nn.Module, x: Any) -> float | None:
    """Of the outputs; None where the masked network takes no such input, infinity where the shapes differ."""
    try:
        expected = outputs(masked, x)
    except Exception:
        return None
    pairs = list(zip(expected, outputs(small, x), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max((float((a - b).abs().max() / (a.abs().max() + 1e-12)) for a, b in pairs if a.numel()), default=0.0)


def train_step(model: nn.Module, x: Any) -> bool:
    """Whether a step leaves finite weights; in evaluation where the network does not train on one sample."""
    for training in (True, False):
        try:
            loss = torch.stack([t.square().mean() for t in tensors_in(call(model.train(training), x))]).sum()
            loss.backward()
            break
        except ValueError:
            if not training:
                raise
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    return all(bool(p.isfinite().all()) for p in model.parameters())


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether the cut network computes what the masked one does, also when it comes from disk."""
    differences = [d for d in row["difference"].values() if d is not None]
    same = bool(differences) and max(differences) < row["tolerance"] and row["loaded"]
    return same and row["trained"] is not False and row.get("gates", 0.0) < 1e-9


# ---- all of them, each in a process of its own


def limited(function: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What a function returns, in a process of its own; {"error": why} where it fails or takes too long."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, function, seconds))
    process.start()
    theirs.close()
    try:
        row: dict[str, Any] = ours.recv()
    except EOFError:
        row = {"error": f"ended by signal {-(process.exitcode or 0)}"} if process.exitcode else {"error": "ended"}
    process.join()
    return row


class TooSlow(BaseException):
    """Not an Exception: nothing on the way takes it for an error of the network."""


def _send(pipe: Any, function: Callable[[], dict[str, Any]], seconds: float) -> None:
    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (int(4 * seconds), int(4 * seconds)))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    try:
        pipe.send(function())
    except TooSlow:
        pipe.send({"error": f"stopped after {seconds:.0f} s"})
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        pipe.send({"error": f"{type(error).__name__}: {text}"[:300], "traceback": traceback.format_exc()[-2000:]})


def run(names: Iterable[str], path: Path, *, rival: bool, limit: float) -> dict[str, dict[str, Any]]:
    """Measure what the file does not hold, and write it after each network."""
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    libraries: set[str] = set()
    for name in names:
        entry, row = NETWORKS[name], rows.setdefault(name, {})
        if name.partition("/")[0] not in libraries:
            libraries.add(name.partition("/")[0])
            with suppress(Exception):
                build(entry)  # so that the library is imported once, and not by each process
        if "gsprune" not in row:
            row["gsprune"] = limited(lambda entry=entry: measure(entry), limit)  # type: ignore[misc]
        if rival and "rival" not in row:
            from zoo_rival import rival_of

            row["rival"] = limited(lambda entry=entry: rival_of(entry, limit), 4 * limit)  # type: ignore[misc]
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{name:50s} {brief(row)}", flush=True)
    return rows


def brief(row: Mapping[str, Any]) -> str:
    mine, other = row["gsprune"], row.get("rival", {})
    beside = f" | rival {other.get('left') or other.get('error', '')}"
    if "error" in mine:
        return mine["error"] + beside
    differences = [d for d in mine.get("difference", {}).values() if d is not None]
    verdict = "nothing found" if not differences else "right" if is_right(mine) else "WRONG"
    times = f"find {mine['find']:.1f} cut {mine['cut']:.1f}"
    worst = max(differences, default=0)
    return f"{verdict} {worst:.0e} left {mine['left']:.3f} {times} {mine['found']} {stays(mine)[:160]}{beside}"


# ---- the table


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| network | structures found | what stays, and why | left | find, s | cut, s | torch-pruning: left | s |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in NETWORKS:
        if name not in rows:
            continue
        mine, other = rows[name]["gsprune"], rows[name].get("rival", {})
        right = f"{other['left']:.2f} | {other['seconds']:.1f}" if "left" in other else f"{other.get('error', '')} |"
        if "error" in mine:
            lines.append(f"| {name} | | {mine['error']} | 1.00 | | | {right} |")
            continue
        found = ", ".join(f"{n} {kind}" for kind, n in mine["found"].items())
        times = f"{mine['find']:.1f} | {mine['cut']:.1f}"
        lines.append(f"| {name} | {found} | {stays(mine) or '-'} | {mine['left']:.2f} | {times} | {right} |")
    return "\n".join([*lines, "", summary(rows)])


PLAIN = {  # what stays, in the words of the page
    r"'[^']*'": "...",
    r"the shrunk network does not run.*": "its forward pass insists on all of them",
    r"it has a single unit: .*": "it is an attention with one head",
    r"the cut plan cuts a \w+, which .*": "its norm is neither a LayerNorm nor an RMSNorm",
}


def stays(row: Mapping[str, Any]) -> str:
    """Each reason once, without the names in it; the model's output is left out."""
    found = Counter[str]()
    for reason in row["skipped"].values():
        for pattern, words in PLAIN.items():
            reason = re.sub(pattern, words, reason)
        found.update([reason] if "output" not in reason else [])
    return "; ".join(f"{n} x {reason}" for reason, n in found.most_common())


def summary(rows: Mapping[str, Mapping[str, Any]]) -> str:
    mine = {name: row["gsprune"] for name, row in rows.items()}
    cut = {name: row for name, row in mine.items() if row.get("difference")}
    wrong = [name for name, row in cut.items() if not is_right(row)]
    taken = {name: row["find"] + row["cut"] for name, row in cut.items()}
    left = [row["left"] for row in cut.values()]
    text = [
        f"**{len(cut)} of {len(rows)} networks are cut, {len(rows) - len(cut)} refused, {len(wrong)} cut wrongly.** "
        f"Parameters left: {statistics.mean(left):.2f} on average, {max(left):.2f} at most. To find and to cut takes "
        f"{sum(taken.values()):.0f} s for all and at most {max(taken.values()):.1f} s for one "
        f"({max(taken, key=taken.__getitem__)})."
    ]
    tried = [row["rival"] for row in rows.values() if "rival" in row]
    there = [row for row in tried if "left" in row]
    if there:
        both = [(cut[n], rows[n]["rival"]) for n in cut if "left" in rows[n].get("rival", {})]
        means = [statistics.mean(pair[i]["left"] for pair in both) for i in (0, 1)]
        times = [sum(a["find"] + a["cut"] for a, _ in both), sum(b["seconds"] for _, b in both)]
        text.append(
            f"torch-pruning was run on {len(tried)} of them and cuts {len(there)}. On the {len(both)} that both cut, "
            f"gsprune leaves {means[0]:.2f} of the parameters and torch-pruning {means[1]:.2f}, in {times[0]:.0f} and "
            f"{times[1]:.0f} s (torch-pruning at most {max(row['seconds'] for row in there):.1f} s; it proves nothing)."
        )
    return " ".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the figures, which is continued")
    parser.add_argument("--networks", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--rival", action="store_true", help="torch-pruning as well")
    parser.add_argument("--limit", type=float, default=120, help="processor seconds a network")
    parser.add_argument("--write", action="store_true", help="put the table into docs/networks.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    names = [name for name in NETWORKS if any(fnmatch.fnmatchcase(name, p) for p in args.networks)]
    if not names:
        sys.exit(f"no network is called like {args.networks}")
    rows = run(names, args.json, rival=args.rival, limit=args.limit)
    print(table(rows))
    if args.write:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
