"""Files from strangers: valid ones of every kind that gsprune reads, ways to spoil them, and what may come of it.

`KINDS` are the files, `edits` is a hypothesis strategy of mutations, `outcome` writes a spoiled file, reads it as
gsprune does and says "clean" or "refused": everything else that can happen is an error. Used by app/test_fuzz_files.py
and by benchmarks/faults_files.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import resource
import signal
import struct
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import gsprune
from gsprune import Pruner
from gsprune.app.job import load_weights
from gsprune.criteria import Elementwise
from gsprune.files.disk import sha256, write_json
from gsprune.formats.masks import load_masks, save_masks
from gsprune.formats.network import _fingerprint, load_pruned, save_pruned
from gsprune.formats.scores import load_scores, save_scores
from gsprune.integrations.inc import load_inc_config
from gsprune.surgery.cut_plan import CutPlan
from gsprune.sweeps.callback import _runs
from gsprune.sweeps.dense_cache import DenseCache, DenseRecord
from gsprune.sweeps.report import SweepJobs, _table, build_report
from gsprune.sweeps.results import read_results
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.text.redact import last_line
from gsprune.tracking.outbox import Outbox
from gsprune.tracking.tracker import read_metrics
from gsprune.training.checkpoints import _digest, read_state, write_state
from gsprune.zoo.texts import text_classification

MEMORY_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()  # most of the time, on a real one
SECONDS = 5  # for one file
MEMORY = 1 << 30  # bytes of address space beyond what the process has
LONGEST = 1000  # characters of a sentence
PHASES = (Phase.generate, Phase.shrink)


# --- how to spoil a file -----------------------------------------------------------------------------------

# Values in the place of others, as they stand in the file: JSON's grammar is not what readers must count on.
NASTY = (
    *("null", "true", "false", "0", "-1", "1", "3", "1.5", "-0.0", "1e-999", "1e400", "-1e400"),
    *("NaN", "Infinity", "-Infinity", str(2**31), str(2**63), str(2**64), str(-(2**63)), str(10**30), "9" * 400),
    *("9" * 5000, '""', '"a"', '"0"', '"NaN"', '"../x"', '"/etc/passwd"', '"a/../../../x"', r'"\ud800"', r'"\u0000"'),
    *(r'"a\nb"', '"' + "x" * 20_000 + '"', "[]", "{}", "[0]", "[[]]", "[-1]", "[1, 1]", f"[{2**63}]", f"[{2**62}, 4]"),
    *('{"_target_": "os.system", "_args_": ["true"]}', '{"a": {}}', '{"": ""}', r'{"\ud800": 1}', r'{"a\nb": "c\nd"}'),
    *("[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "[" + "0," * 5000 + "0]", "'single'", "<!-- -->"),
)
BLOCKS = (
    *(b"\x00", b"\xff", b"\n", b"\r\n", b'"', b"'", b",", b"{", b"[", b"}" * 9, b"[" * 9999, b"[" * 99_999),
    *(b"- " * 3000, b"- " * 50_000),
    *(b"? " * 3000, b"&a [*a]", b"*a", b"!!python/object/apply:os.system [true]", b"<<: *a", b"---\n", b"../"),
    *(b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x00" * 64, b"9" * 5000, b"1e400", b"NaN", b"\t", b" " * 2000),
    *(b"%YAML 9.9\n", b"\\ud800", b"\x1b[2J"),
)
where = st.floats(0, 1, exclude_max=True)
_BYTES = st.one_of(
    st.tuples(st.just("flip"), where, st.integers(0, 7)),
    st.tuples(st.just("cut"), where, st.none()),
    st.tuples(st.just("drop"), where, st.integers(1, 99)),
    st.tuples(st.just("double"), where, st.integers(1, 99)),
    st.tuples(st.just("insert"), where, st.one_of(st.sampled_from(BLOCKS), st.binary(min_size=1, max_size=16))),
)
_NODES = st.tuples(st.sampled_from(("replace", "delete", "again", "rename")), where, st.sampled_from(NASTY))
_HEADERS = st.tuples(
    st.just("length"), where, st.sampled_from((0, 1, 2, 7, 8, 99, 10**6, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1))
)


def edits(structure: str) -> st.SearchStrategy[list[tuple[str, float, Any]]]:
    """One to three mutations of a file of that structure: json, jsonl, safetensors or text."""
    inside = {"text": [_LINES] * 2, "safetensors": [*[_NODES] * 3, _HEADERS]}.get(structure, [_NODES] * 3)
    return st.lists(st.one_of(_BYTES, *inside), min_size=1, max_size=3)


_LINES = st.tuples(st.just("value"), where, st.sampled_from(NASTY))


def spoil(data: bytes, structure: str, changes: list[tuple[str, float, Any]]) -> bytes:
    for kind, place, what in changes:
        if kind in ("replace", "delete", "again", "rename"):
            data = _edit_node(data, structure, kind, place, what)
        elif kind == "value":
            data = _edit_line(data, place, what)
        elif kind == "length":
            data = struct.pack("<Q", what) + data[8:]
        else:
            data = _edit_bytes(data, kind, int(place * len(data)), what)
    return data


def _edit_bytes(data: bytes, kind: str, at: int, what: Any) -> bytes:
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << what]) + data[at + 1 :] if data else data
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + what :]
    return data[:at] + (data[at : at + what] if kind == "double" else what) + data[at:]


def _edit_line(data: bytes, place: float, what: str) -> bytes:
    """The part of a line behind its first colon, comma or dash becomes another."""
    lines = data.split(b"\n")
    at = int(place * len(lines))
    mark = min((lines[at].find(sign) for sign in (b":", b",", b"- ") if sign in lines[at]), default=-1)
    lines[at] = lines[at][: mark + 1] + b" " + what.encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _edit_node(data: bytes, structure: str, kind: str, place: float, what: str) -> bytes:
    """Change one node of the JSON in the file, wherever that is; a file whose JSON is spoiled already stays."""
    try:
        if structure == "safetensors":
            (length,) = struct.unpack("<Q", data[:8])
            header = _edit_json(data[8 : 8 + length], kind, place, what)
            return struct.pack("<Q", len(header)) + header + data[8 + length :]
        if structure == "jsonl":
            lines = data.split(b"\n")
            at = int(place * len(lines))
            lines[at] = _edit_json(lines[at], kind, place * len(lines) % 1, what)
            return b"\n".join(lines)
        return _edit_json(data, kind, place, what)
    except (ValueError, RecursionError, struct.error):
        return data


def _edit_json(text: bytes, kind: str, place: float, what: str) -> bytes:
    tree = json.loads(text)
    nodes = [*_nodes(tree)]
    if not nodes or (kind == "replace" and place < 1 / (len(nodes) + 1)):
        return what.encode()
    owner, key = nodes[int(place * len(nodes))]
    mark = "\0here\0"
    if kind == "delete":
        del owner[key]
    elif kind == "replace" or isinstance(owner, list):
        owner[key] = mark
    elif kind == "again":  # the same key twice; the second one counts for most readers
        owner[f"{key}{mark}"] = mark
    else:
        owner[json.loads(what) if what.startswith('"') else mark + mark] = owner.pop(key)
    written = json.dumps(tree).replace(json.dumps(mark), what)
    return written.replace(json.dumps(mark)[1:-1], "").encode()


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in the tree, as what holds it and its key there; JSON within a string (a mask's shapes) included."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield tree, key
        yield from _nodes(value)


# --- the files ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file: what a valid one holds, in a folder that `make` fills, and how gsprune reads it."""

    file: str
    structure: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]  # of the folder


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


PLAN = CutPlan({"0.weight": {0: torch.tensor([0, 2, 5])}, "0.bias": {0: torch.tensor([0, 2, 5])}},
            {"0.weight": {0: 6}, "0.bias": {0: 6}}, {"0.out_features": 3})  # fmt: skip


def _make_pruned(folder: Path) -> None:
    small = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(6, 3))
    save_pruned(folder, small, PLAN)


def _read_pruned(folder: Path) -> None:
    model = load_pruned(folder, net())
    assert [tuple(p.shape) for p in model.parameters()] == [(3, 4), (3,), (3, 6), (3,)]


def _read_forged(folder: Path) -> None:
    """As `load_pruned`, but the fingerprints fit, so that all the later checks are reached."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        record = json.loads((folder / "pruning.json").read_bytes())
        record["fingerprint"] = _fingerprint(record)
        weights = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", weights[:8])
        header = json.loads(weights[8 : 8 + length])
        header["__metadata__"]["fingerprint"] = record["fingerprint"]
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + weights[8 + length :])
        record["sha256"] = sha256(folder / "model.safetensors")
        (folder / "pruning.json").write_text(json.dumps(record))
    load_pruned(folder, net())


def _read_plan(folder: Path) -> None:
    try:
        data = json.loads((folder / "plan.json").read_bytes())
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    plan = CutPlan.from_json(data)
    assert json.loads(json.dumps(plan.to_json())) == data


def _make_scores(folder: Path) -> None:
    scores = {"0.weight": torch.rand(6, 4), "2.weight": torch.rand(3, 6)}
    save_scores(folder / "scores.safetensors", scores, criterion="Elementwise", steps=44)


def _read_scores(folder: Path) -> None:
    path = folder / "scores.safetensors"
    sha256(path)  # what identity.py makes of it
    load_scores(path)
    pruner = Pruner(net(), Elementwise(), target_sparsity=0.5, epochs=3, scores=path)
    assert all(bool((score.isfinite() & (score >= 0)).all()) for score in pruner.scores().values())


def _make_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(net().state_dict(), folder / "weights.safetensors")


RESULT = {
    "status": "finished", "accuracy": 0.9, "baseline_accuracy": 0.95, "val_accuracy": 0.91, "loss": 0.3, "seed": 0,
    "sparsity": 0.5, "target_sparsity": 0.5, "params": 100, "params_dense": 200, "macs": 1000, "macs_dense": 2000,
    "latency_ms": 1.0, "latency_dense_ms": 2.0, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1,
    "seconds": 9.0, "updates": 4, "epochs": 3, "mlflow_run_id": "a" * 32,
    "config_hash": "b" * 64, "device": "cpu", "shrunk": True, "skipped": {"0": "it has one"}, "name": "weighted",
    "overrides": ["pruner=weighted", "seed=0"], "choices": {"pruner": "weighted", "model": "convnet"},
    "timings": {"start": 1.0, "train": 5.0}, "dense": {"key": "c", "source": "trained", "run_id": "d", "job": "0"},
}  # fmt: skip
SWEEP = {
    "command": "python train.py --multirun seed=0,1", "overrides": ["seed=0,1"], "axes": {"seed": ["0", "1"]},
    "identity": "e" * 64, "status": "finished", "started": "2026-01-01T00:00:00+00:00", "ended": None,
    "parent_run_id": "f" * 32, "tracking_uri": "sqlite:///mlflow.db", "experiment": "gsprune",
}  # fmt: skip


def _make_sweep(folder: Path) -> None:
    write_json(folder / "sweep.json", SWEEP)
    for seed in (0, 1):
        result = {**RESULT, "seed": seed, "overrides": ["pruner=weighted", f"seed={seed}"], "config_hash": str(seed)}
        write_json(folder / str(seed) / "result.json", result)
        write_json(
            folder / str(seed) / "tracking.json", {"tracking_uri": "x", "run_id": "a" * 32, "status": "FINISHED"}
        )
    write_json(folder / "1" / "result.json", {**result, "overrides": None})
    (folder / "1" / ".hydra").mkdir()
    (folder / "1" / ".hydra" / "overrides.yaml").write_text("- pruner=weighted\n- seed=1\n- '+x=\"a b\"'\n")


def _read_sweep(folder: Path) -> None:
    """The table, and now and then all files."""
    found = read_results(folder)
    for reason in found.skipped.values():
        check_sentence(reason)
    for job in found.jobs:
        assert isinstance(job.name + job.status, str)
        assert all(isinstance(run, str) for run in _runs([job]))
    sweep = Sweep(folder)
    assert isinstance(sweep.parent_run_id, str | None)
    assert sweep.finished("nobody") is None
    if found.jobs:
        table = _table(SweepJobs.read(folder)).encode("utf-8", "replace")
        if zlib.crc32(table) % 32 == 0:  # a page takes 60 ms
            build_report(folder)


def _make_metrics(folder: Path) -> None:
    rows = [{"step": i, "time": 1e9 + i, "train/loss": 0.5 / (i + 1), "val/loss": "NaN"} for i in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_metrics(folder: Path) -> None:
    for row in read_metrics(folder / "metrics.jsonl"):
        assert all(isinstance(name, str) and isinstance(float(value), float) for name, value in row.items())


def _cache(folder: Path) -> DenseCache:
    return DenseCache(Sweep(folder), "k" * 64)


def _make_dense(folder: Path) -> None:
    rows = [{"val/accuracy": 0.9, "params": 100, "macs": 1000, "sparsity": 0.0} for _ in range(2)]
    record = DenseRecord({"accuracy": 0.9, "loss": 0.3, "val_accuracy": 0.9}, rows, "a" * 32, "0", "b" * 64, 12.5)
    _cache(folder).store({"w": torch.ones(2)}, record)


def _read_dense(folder: Path) -> None:
    """A damaged record is no record: the network is trained again."""
    cache = _cache(folder)
    record = cache.find()
    if record is None:
        for aside in cache.folder.parent.glob("damaged-*"):
            os.replace(aside, cache.folder)  # for the next one
        raise ValueError("none")
    assert all(isinstance(float(number), float) for number in [*record.baseline.values(), record.train_seconds])
    assert int(record.epochs[-1]["params"]) >= 0
    assert int(record.epochs[-1]["macs"]) >= 0
    read = Sweep(folder).folder_of(record.job, record.config_hash)
    assert (folder / read).resolve().is_relative_to(folder.resolve())


INC = """\
version: 1.0
model:
  name: bert
  framework: pytorch
pruning:
  approach:
    weight_compression:
      initial_sparsity: 0.0
      target_sparsity: 0.9
      start_epoch: 0
      end_epoch: 4
      pruners:
        - !Pruner
            prune_type: gradient_sensitivity
            names: ['layer.*.attention.query.weight', "layer.*.attention.query.bias"]
            parameters: {target: 8, stride: 64, importance_inputs: ['head_mask'], importance_metric: abs_gradient}
        - !Pruner
            prune_type: basic_magnitude
            pattern: tile_pattern_4x1
            update_frequency: 0.5
            method: per_channel
            names:
              - conv1.weight
"""


def _read_inc(folder: Path) -> None:
    for pruner in load_inc_config(folder / "inc.yaml").rules:
        targets = [pruner["_target_"], pruner["criterion"]["_target_"], pruner["schedule"]["_target_"]]
        assert all(target.startswith("gsprune.") for target in targets)


@functools.cache
def _tokenizer() -> str:
    from transformers import BertTokenizerFast

    folder = _new_folder("tokenizer")
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "b", "##a")
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return str(folder)


SAMPLES = [("a good film" + " a" * i, "good") for i in range(6)] + [("bad film" + " b" * i, "bad") for i in range(6)]


def _read_texts(name: str, folder: Path) -> None:
    splits = text_classification(folder / name, tokenizer=_tokenizer(), max_length=16)
    assert 2 <= splits.num_classes <= len(SAMPLES) + 20


def _make_csv(folder: Path) -> None:
    rows = [f'"{text}, ""so"" it is",{label},7' for text, label in SAMPLES]
    (folder / "texts.csv").write_text("\n".join(["text,label,number", *rows, ""]))


def _make_jsonl(folder: Path) -> None:
    rows = [json.dumps({"text": text, "label": label, "more": [1, {"x": None}]}) for text, label in SAMPLES]
    (folder / "texts.jsonl").write_text("\n".join([*rows, ""]))


def _make_masks(folder: Path) -> None:
    save_masks(folder / "masks.safetensors", {"a": torch.rand(3, 5) < 0.5, "b": torch.rand(16) < 0.5})


def _make_plan(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps(PLAN.to_json()))


def _read_weights(folder: Path) -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    try:
        load_weights(model, folder / "weights.safetensors")
    except ValueError:  # and then nothing was changed
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        raise


STEP = "epoch_0001_step_000002"


def _make_state(folder: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = Pruner(model, Elementwise(), target_sparsity=0.5, epochs=3)
    state = {"pruner": pruner.state_dict(), "optimizer": optimizer.state_dict(), "seed": (1, -2.5, math.inf), 3: None}
    write_state(folder / STEP, state)


def _read_state(folder: Path) -> None:
    state = read_state(folder / STEP)
    model = net()
    try:
        Pruner(model, Elementwise(), target_sparsity=0.5, epochs=3).load_state_dict(state["pruner"])
        torch.optim.AdamW(model.parameters()).load_state_dict(state["optimizer"])
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:  # as a job that goes on does
        raise ValueError(f"it does not fit: {last_line(error)}") from None


def _read_forged_state(folder: Path) -> None:
    """As `read_state`, but the digest fits, so that all the later checks are reached."""
    path = folder / STEP / "state.json"
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, AttributeError):
        record = json.loads(path.read_bytes())
        record.pop("sha256")
        path.write_text(json.dumps({**record, "sha256": _digest(record)}))
    _read_state(folder)


def _make_outbox(folder: Path) -> None:
    write_json(folder / "tracking.json", {"tracking_uri": "x", "run_id": "a" * 32, "status": "FINISHED"})
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").write_bytes(b"no picture")
    events: list[dict[str, Any]] = [
        {"kind": "params", "params": {"seed": "0"}},
        {"kind": "tags", "tags": {"a": "b"}},
        {"kind": "metrics", "step": 1, "time_ms": 1e12, "values": {"train/loss": 0.5}},
        {"kind": "artifact", "path": "figures/a.png", "folder": "figures"},
        {"kind": "artifact", "path": "figures", "folder": None},
        {"kind": "image", "path": "figures/a.png", "key": "masks", "step": 1, "time_ms": 1e12},
    ]
    (folder / "outbox.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*events, {"sent": [1]}]))
    _make_metrics(folder)


def _read_outbox(folder: Path) -> None:
    outbox = Outbox(folder)
    outbox.load()
    assert isinstance(outbox.lacking, bool)
    for event in outbox.pending.values():
        assert all(isinstance(value, float) for value in event.get("values", {}).values())
        for field in ("params", "tags"):
            assert all(isinstance(value, str) for value in event.get(field, {}).values())
        if "path" in event:
            assert (folder / event["path"]).resolve().is_relative_to(folder.resolve())


KINDS: dict[str, Kind] = {
    "masks": Kind("masks.safetensors", "safetensors", _make_masks, lambda f: load_masks(f / "masks.safetensors")),
    "scores": Kind("scores.safetensors", "safetensors", _make_scores, _read_scores),
    "pruned model": Kind("model.safetensors", "safetensors", _make_pruned, _read_pruned),
    "dense weights": Kind("weights.safetensors", "safetensors", _make_weights, _read_weights),
    "pruning.json": Kind("pruning.json", "json", _make_pruned, _read_pruned),
    "pruning.json, forged": Kind("pruning.json", "json", _make_pruned, _read_forged),
    "plan": Kind("plan.json", "json", _make_plan, _read_plan),
    "result.json": Kind("0/result.json", "json", _make_sweep, _read_sweep),
    "sweep.json": Kind("sweep.json", "json", _make_sweep, _read_sweep),
    "tracking.json": Kind("0/tracking.json", "json", _make_sweep, _read_sweep),
    "overrides.yaml": Kind("1/.hydra/overrides.yaml", "text", _make_sweep, _read_sweep),
    "run checkpoint": Kind(f"{STEP}/state.safetensors", "safetensors", _make_state, _read_state),
    "run checkpoint, state.json": Kind(f"{STEP}/state.json", "json", _make_state, _read_state),
    "run checkpoint, forged": Kind(f"{STEP}/state.json", "json", _make_state, _read_forged_state),
    "outbox.jsonl": Kind("outbox.jsonl", "jsonl", _make_outbox, _read_outbox),
    "metrics.jsonl": Kind("metrics.jsonl", "jsonl", _make_metrics, _read_metrics),
    "dense.json": Kind(f"dense_cache/{'k' * 16}/dense.json", "json", _make_dense, _read_dense),
    "the ancestor's YAML": Kind("inc.yaml", "text", lambda f: (f / "inc.yaml").write_text(INC) and None, _read_inc),
    "texts, CSV": Kind("texts.csv", "text", _make_csv, functools.partial(_read_texts, "texts.csv")),
    "texts, JSON": Kind("texts.jsonl", "jsonl", _make_jsonl, functools.partial(_read_texts, "texts.jsonl")),
}


# --- what may come of it -----------------------------------------------------------------------------------


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gsprune-fuzz-", dir=MEMORY_DISK)


def _new_folder(name: str) -> Path:
    folder = Path(_root().name, name)
    folder.mkdir()
    return folder


def forget() -> None:
    """Remove what was made here; it is made again where it is needed again."""
    _root().cleanup()
    for made in (_root, _tokenizer, valid):
        made.cache_clear()


@functools.cache
def valid(kind: str) -> tuple[Path, dict[str, bytes]]:
    """A folder with valid files of the kind, and their bytes. They were read once: imports and caches are done."""
    folder = _new_folder(kind.replace("/", "_"))
    KINDS[kind].make(folder)
    KINDS[kind].read(folder)
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return folder, {name: path.read_bytes() for name, path in files.items()}


def fuzz(kind: str, examples: int, *, repeatable: bool) -> Counter[str]:
    """Try so many spoiled files of a kind; how many were "clean" and how many "refused"."""
    seen: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=repeatable, database=None, deadline=None, phases=PHASES)
    @given(edits(KINDS[kind].structure))
    def tried(changes: list[tuple[str, float, Any]]) -> None:
        seen[outcome(kind, changes)] += 1

    tried()
    return seen


def outcome(kind: str, changes: list[tuple[str, float, Any]]) -> str:
    """Read a spoiled file: "clean" or "refused", within `SECONDS` and `MEMORY`; anything else raises."""
    folder, files = valid(kind)
    target = KINDS[kind].file
    for name in ("model.safetensors", target) if kind == "pruning.json, forged" else ():  # which writes them itself
        (folder / name).write_bytes(files[name])
    (folder / target).write_bytes(spoil(files[target], KINDS[kind].structure, changes))
    with watched(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            KINDS[kind].read(folder)
        except ValueError as error:
            check_sentence(str(error))
            return "refused"
    return "clean"


def check_sentence(text: str) -> None:
    assert text.strip(), "an error without a word"
    assert text.isprintable(), f"not one printable line: {text[:200]!r}"
    assert len(text) <= LONGEST, f"a wall of {len(text)} characters: {text[:200]!r}"


_LIBRARIES = (
    *(sys.prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix), str(Path(gsprune.__file__).parent)),
    *(path for path in sys.path if path.endswith("site-packages")),  # of another environment that this one shares
)
_SEEN: list[str] = []
_HOME: list[Path] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's own account of what is done: code run, processes started, files opened elsewhere."""
    if not _HOME:
        return
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        _SEEN.append(f"{event} {arguments}"[:200])
    if event == "open" and isinstance(arguments[0], str | Path):
        path = os.path.realpath(arguments[0])
        if not path.startswith((str(_HOME[0]), str(_HOME[0].parent / "tokenizer"), *_LIBRARIES)):
            _SEEN.append(f"open {path}"[:200])


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Limits of time and memory, and nothing is run or opened outside of the folder."""
    if not getattr(sys, "_gsprune_listens", False):
        sys.addaudithook(_listen)
        sys._gsprune_listens = True  # type: ignore[attr-defined]
    _HOME[:], _SEEN[:] = [folder.resolve()], []
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _SEEN[:] = []

    def late(*_: Any) -> None:
        raise TimeoutError(f"still reading after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _HOME.clear()
    assert not _SEEN, f"a file made gsprune do this: {_SEEN[0]}"
