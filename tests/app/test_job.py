"""One job in this process: phases, files, numbers, faults. Tiny networks, nothing tracked unless a test says so."""

from __future__ import annotations

import io
import itertools
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from facts import refused
from jobs import configure, finished
from matplotlib.text import Text
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from gsprune import latency, load_pruned
from gsprune.app import configuration
from gsprune.app import job as job_module
from gsprune.app.configuration import NUMBERS, TIMED, build, objective
from gsprune.app.console import (
    print_summary,
    summary_table,
)
from gsprune.app.job import load_weights, rehearse, run
from gsprune.formats.masks import load_masks
from gsprune.settings.identity import config_hash, dense_key, plain_config
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.text.display import percent
from gsprune.tracking.tracker import Tracker, read_metrics
from gsprune.training.trainer import Trainer


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighted")
    return finished(folder, "pruner=weighted", drawn=True), folder


@pytest.fixture(scope="module")
def elementwise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elementwise")
    return finished(folder, "pruner=elementwise"), folder


def rows_of(folder):
    return read_metrics(folder / "metrics.jsonl")


def fresh_model(*overrides):
    node = configure(*overrides).model.copy()
    OmegaConf.set_struct(node, False)
    node.pop("weights")
    return build(node)


# --- what a job leaves -------------------------------------------------------------------------------------


def test_result_json_has_the_promised_keys_and_is_what_run_returns(weighted):
    result, folder = weighted
    assert json.loads((folder / "result.json").read_text()) == result
    extra = {"status", "mlflow_run_id", "config_hash", "device", "shrunk", "skipped", "skipped_steps"}
    extra |= {"name", "seed", "overrides", "choices", "timings", "dense", "unwritten", "budget"}
    extra |= {
        "sparsity_of",
        "layers",
        "coverage",
        "collapsing",
        "collapsed",
        "at_chance",
        "latency_in",
        "latency_note",
        "val_samples",
    }
    assert set(result) == {*NUMBERS, *extra}
    assert result["status"] == "finished"
    assert result["mlflow_run_id"] is None
    assert (result["epochs"], result["device"], result["target_sparsity"]) == (3, "cpu", 0.5)
    assert list(result["timings"]) == ["start", "train", "measure", "files", "tracking"]
    assert sum(result["timings"].values()) == pytest.approx(result["seconds"])
    told = [name for name in NUMBERS if name not in TIMED]
    assert all(isinstance(result[name], (int, float)) for name in told)
    assert [result[name] for name in TIMED] == [None] * 5
    assert result["latency_note"] == "not measurable here: 3 repeats are too few, it takes 30"


def test_a_job_that_shrinks_at_each_update_leaves_the_same(weighted, tmp_path):
    whole, folder = weighted
    result = finished(tmp_path, "pruner=weighted", "pruner.shrink=each_update")
    for name in ("accuracy", "params", "macs", "sparsity", "shrunk", "updates", "file_bytes", "params_nonzero"):
        assert result[name] == whole[name], name
    assert result["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    mine, other = rows_of(tmp_path), rows_of(folder)
    assert [(row["params"], row["macs"]) for row in mine[:3]] == [(row["params"], row["macs"]) for row in other[:3]]
    recorded = [json.loads((path / "pruning.json").read_text())["plan"] for path in (tmp_path, folder)]
    assert recorded[0] == recorded[1]
    mine, other = load_pruned(tmp_path, fresh_model()), load_pruned(folder, fresh_model())
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(mine(x), other(x), rtol=1e-3, atol=1e-3)


def test_a_job_with_two_pruners_leaves_a_smaller_model_with_masks_that_fit(tmp_path):
    result = finished(tmp_path, "pruner=units_and_weights", "pruner.rules.1.target_sparsity=0.95")
    model = load_pruned(tmp_path, fresh_model())
    assert result["sparsity"] == pytest.approx(0.95, abs=1e-3)
    assert result["target_sparsity"] is None
    assert result["params"] == sum(p.numel() for p in model.parameters()) < 0.5 * result["params_dense"]
    assert result["params_nonzero"] == sum(int(p.count_nonzero()) for p in model.parameters())
    masks = load_masks(tmp_path / "masks.safetensors")
    weights = {name: mask for name, mask in masks.items() if name.endswith(".weight")}
    assert set(masks) - set(weights) == {"stem", "down", "block.conv1"}
    for name, mask in weights.items():
        assert not model.get_parameter(name)[~mask].any(), name
    assert {"kept/down", "sparsity/down.weight"} <= set(rows_of(tmp_path)[2])


SHARES = {
    "weights": ("weights", "pruner=elementwise", "pruner.target_sparsity=0.95"),
    "units": ("channels", "pruner=weighted", "pruner.target_sparsity=0.3"),
    "units cut at each update": ("channels", "pruner=abs", "pruner.shrink=each_update"),
    "a budget": ("channels", "pruner=weighted", "pruner.budget.macs=0.6", "model.width=8"),
    "units, and weights of what is left": ("weights", "pruner=units_and_weights"),
    "nothing": (None, "pruner=none"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARES)
def test_a_run_has_one_figure_for_its_sparsity(tmp_path, monkeypatch, kind):
    of, *overrides = SHARES[kind]
    drawn, draw, shown = [], Text.draw, io.StringIO()
    monkeypatch.setattr(Text, "draw", lambda text, *args: (drawn.append(text.get_text()), draw(text, *args))[1])
    with redirect_stdout(shown):
        result = run(configure(*overrides), output_dir=tmp_path)
    figure = percent(result["sparsity"])
    heads = [text.rpartition("kept, ")[2] for text in drawn if re.match(r"\d+ masks?", text)]
    assert heads[-1:] == ([] if kind == "nothing" else [f"{figure} pruned"])
    assert f"Pruned: {figure}{f' of the {of}' if of else ''} (dashed)" in drawn
    rows = [re.split(" {2,}", line) for line in shown.getvalue().splitlines() if line.startswith("sparsity")]
    assert [(row[0], row[-1]) for row in rows] == ([] if of is None else [(f"sparsity of {of}", figure)])
    assert rows_of(tmp_path)[-2]["sparsity"] == result["sparsity"]  # what MLflow gets: the last epoch,
    assert "sparsity" not in rows_of(tmp_path)[-1]  # and nothing else beside it
    assert result["sparsity_of"] == of
    bars = {name: f"{percent(p / n)}  ({p:,} of {n:,})" for name, (p, n) in result["layers"].items()}
    assert set(bars.values()) <= set(drawn)
    last = {
        name.partition("/")[2]: value for name, value in rows_of(tmp_path)[-2].items() if name.startswith("sparsity/")
    }
    assert last == {name: pytest.approx(p / n) for name, (p, n) in result["layers"].items() if name in last}


def test_a_structured_job_ends_with_a_smaller_model(weighted):
    result, folder = weighted
    dense = fresh_model()
    assert result["shrunk"] is True
    assert result["sparsity"] == 0.5
    assert result["params_dense"] == sum(p.numel() for p in dense.parameters())
    assert result["params"] < 0.5 * result["params_dense"]
    assert result["macs"] < 0.5 * result["macs_dense"]
    assert result["file_bytes"] < result["file_bytes_dense"]
    loaded = load_pruned(folder, dense)
    assert sum(p.numel() for p in loaded.parameters()) == result["params"]


def test_the_saved_model_reaches_the_recorded_accuracy(weighted):
    result, folder = weighted
    data = build(configure().dataset)
    again = Trainer(device="cpu").evaluate(load_pruned(folder, fresh_model()), data.test)
    assert again["accuracy"] == result["accuracy"]
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_files_of_the_output_directory(weighted):
    folder = weighted[1]
    names = {"result.json", "metrics.jsonl", "masks.safetensors", "model.safetensors", "pruning.json"}
    assert names <= {path.name for path in folder.iterdir()}
    for figure in ("history.png", "masks.png", "sparsity_by_layer.png"):
        assert (folder / "figures" / figure).read_bytes().startswith(b"\x89PNG")


def test_masks_are_kept_at_every_update_and_at_the_end(elementwise):
    result, folder = elementwise
    updates = sorted(path.name for path in (folder / "masks").iterdir())
    assert updates == ["epoch_0002.safetensors", "epoch_0003.safetensors"]  # the two epochs of the second phase
    final = load_masks(folder / "masks.safetensors")
    last = load_masks(folder / "masks" / updates[-1])
    assert final.keys() == last.keys()
    assert all(torch.equal(final[name], last[name]) for name in final)
    kept = sum(int(mask.sum()) for mask in final.values())
    total = sum(mask.numel() for mask in final.values())
    assert 1 - kept / total == pytest.approx(result["sparsity"], abs=1e-12)
    assert (folder / "figures" / "masks" / "0003.png").is_file()


def test_the_dense_network_before_pruning_can_be_started_from(weighted):
    result, folder = weighted
    model = fresh_model()
    load_weights(model, folder / "checkpoint" / "dense.safetensors")
    assert sum(p.numel() for p in model.parameters()) == result["params_dense"]


def test_masked_weights_are_zero_in_the_saved_model_and_counted(elementwise):
    result, folder = elementwise
    state = load_file(folder / "model.safetensors")
    masks = load_masks(folder / "masks.safetensors")
    assert all(state[name][~mask].count_nonzero() == 0 for name, mask in masks.items())
    nonzero = sum(int(state[name].count_nonzero()) for name, _ in fresh_model().named_parameters())
    assert result["params_nonzero"] == nonzero
    assert result["params"] == result["params_dense"]
    assert result["params_nonzero"] < 0.2 * result["params"]
    assert (result["shrunk"], result["macs"]) == (False, result["macs_dense"])


def test_metrics_of_each_epoch_run_on_over_both_phases(weighted, elementwise):
    rows = rows_of(weighted[1])
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    common = {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "sparsity", "params", "macs"}
    assert all(common | {"epoch_seconds", "lr"} <= set(row) for row in rows[:3])
    assert rows[0]["sparsity"] == 0.0 < rows[1]["sparsity"] <= rows[2]["sparsity"] == 0.5
    assert rows[2]["sparsity"] == weighted[0]["sparsity"]
    kept = {name for name in rows[2] if name.startswith("kept/")}
    assert kept
    assert {name for name in rows_of(elementwise[1])[2] if name.startswith("sparsity/")}
    # of a structured pruner: what the network costs if it ended now, before it is cut
    assert rows[0]["params"] == weighted[0]["params_dense"] > rows[1]["params"]
    assert (rows[2]["params"], rows[2]["macs"]) == (weighted[0]["params"], weighted[0]["macs"])


def test_the_last_row_holds_the_final_numbers_and_repeats_none(weighted):
    result, folder = weighted
    *_, epoch, final = rows_of(folder)
    assert final["accuracy"] == result["accuracy"]
    assert not set(final) & set(epoch) - {"step", "time"}


def clock(model, inputs, passes):
    """A clock that reads the parameters, now and then 2 % more."""
    return 1e-6 * sum(p.numel() for p in model.parameters()) * (1 + 0.02 * (next(READINGS) % 3))


READINGS = itertools.count()


@pytest.mark.slow
def test_equal_networks_of_a_sweep_share_a_measurement_and_masks_have_none(tmp_path, monkeypatch):
    """Two criteria that leave each layer as wide are equally fast, whatever the clock says the second time."""
    monkeypatch.setattr(job_module, "current_sweep", lambda: Sweep(tmp_path))
    monkeypatch.setattr(latency, "_time", clock)
    more = ("trainer.latency_repeats=30", "trainer.prune_epochs=1")
    first, second, masked = (
        finished(tmp_path / str(n), f"pruner={name}", *more) for n, name in enumerate(("weighted", "magnitude", "abs"))
    )
    assert len(list((tmp_path / ".gsprune" / "latency").iterdir())) == 1
    assert [first[name] for name in TIMED] == [masked[name] for name in TIMED]
    assert first["speedup"] == pytest.approx(first["params_dense"] / first["params"], rel=0.05)
    assert first["speedup_low"] <= first["speedup"] == first["latency_dense_ms"] / first["latency_ms"]
    assert first["speedup"] <= first["speedup_high"] < 1.1 * first["speedup_low"]
    final = rows_of(tmp_path / "0")[-1]
    assert {name: final[name] for name in TIMED} == {name: first[name] for name in TIMED}
    assert first["latency_note"] is None
    low, high = first["speedup_low"], first["speedup_high"]
    assert f"{first['speedup']:.2f}x ({low:.2f} to {high:.2f})" in "\n".join(summary_table(first))
    assert second["latency_note"] == "no change: the same shapes"
    assert [second[name] for name in TIMED] == [None] * 5
    assert not set(TIMED) & set(rows_of(tmp_path / "1")[-1])
    assert "no change" in "\n".join(summary_table(second))


def test_why_there_is_no_latency_is_a_tag(tmp_path, monkeypatch):
    tags = {}
    monkeypatch.setattr(Tracker, "log_tags", lambda self, given: tags.update(given))
    finished(tmp_path, "pruner=weighted", "trainer.prune_epochs=1", "trainer.latency_repeats=4")
    assert tags["latency_note"] == "not measurable here: 4 repeats are too few, it takes 30"


@pytest.mark.parametrize("name", ["latency_ms", "speedup"])
def test_a_speed_cannot_be_the_objective_where_no_shape_changes(tmp_path, name):
    with pytest.raises(ValueError, match=f"objective={name} .*shape"):
        finished(tmp_path, "pruner=elementwise", "trainer.latency_repeats=30", f"objective={name}")
    with pytest.raises(ValueError, match=f"objective={name} .*not measurable here: why"):
        objective({name: None, "latency_note": "not measurable here: why"}, name)


@pytest.mark.slow
def test_no_pruning_trains_for_the_same_length_and_says_so(tmp_path):
    result = finished(tmp_path, "pruner=none", "trainer.latency_repeats=0")
    assert (result["sparsity"], result["updates"], result["epochs"]) == (0.0, 0, 3)
    assert result["params_nonzero"] <= result["params"] == result["params_dense"]
    assert (result["latency_ms"], result["latency_dense_ms"]) == (None, None)
    assert load_masks(tmp_path / "masks.safetensors") == {}
    assert not (tmp_path / "masks").exists()
    load_pruned(tmp_path, fresh_model())


# --- the two phases ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_configuration_gives_the_same_numbers(tmp_path, elementwise):
    again = finished(tmp_path, "pruner=elementwise")
    first = elementwise[0]
    timed = {"seconds", "timings"}
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in first.items() if k not in timed}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, elementwise[1]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = finished(tmp_path / "other", "pruner=elementwise", "seed=1")
    assert other["loss"] != first["loss"]


@pytest.mark.slow
def test_a_dense_network_from_a_file_goes_on_exactly_like_one_trained_here(tmp_path, elementwise):
    finished(tmp_path / "dense", "pruner=none", "trainer.prune_epochs=0")
    weights = tmp_path / "dense" / "model.safetensors"
    result = finished(tmp_path, "pruner=elementwise", "trainer.dense_epochs=0", f"model.weights={weights}")
    whole, folder = elementwise
    assert result["baseline_loss"] == whole["baseline_loss"]
    assert (result["loss"], result["accuracy"]) == (whole["loss"], whole["accuracy"])
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_the_baseline_is_measured_between_the_phases_and_the_pruner_sees_only_the_second(tmp_path, monkeypatch):
    events = []
    fit, evaluate = Trainer.fit, Trainer.evaluate

    def recorded_fit(self, *args, pruner, epochs, optimizer, **kwargs):
        events.append((pruner.criterion_name, epochs, optimizer.param_groups[0]["initial_lr"]))
        fit(self, *args, pruner=pruner, epochs=epochs, optimizer=optimizer, **kwargs)

    def recorded_evaluate(self, model, loader):
        events.append({360: "test", 180: "val"}.get(len(loader.dataset)))
        return evaluate(self, model, loader)

    monkeypatch.setattr(Trainer, "fit", recorded_fit)
    monkeypatch.setattr(Trainer, "evaluate", recorded_evaluate)
    finished(tmp_path, "pruner=abs", "trainer.prune_lr=0.01", "optimizer.lr=0.2")
    assert events == [("none", 1, 0.2), "test", "val", ("Abs", 2, 0.01), "test", "val"]


# --- tracking ----------------------------------------------------------------------------------------------


class Recording(Tracker):
    """A tracker whose calls can be looked at."""

    calls: list

    def __init__(self, output_dir, **kwargs):
        super().__init__(output_dir, **kwargs)
        Recording.calls = []
        self.run_id = "run-7"

    def start(self, *, config, tags):
        self.calls.append(("start", config, tags))

    def log_artifact(self, path, *, folder=None):
        assert Path(path).exists()
        self.calls.append(("artifact", Path(path).name, folder))

    def log_image(self, array, *, key, step):
        self.calls.append(("image", key, step, array.dtype.name, array.ndim))

    def finish(self, status):
        self.calls.append(("finish", status))


RECORDING = ("tracking=none", f"tracking._target_={__name__}.Recording")


def test_tracking_gets_the_resolved_configuration_the_masks_and_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "make", with_recording(configuration.make))
    result = finished(tmp_path, "pruner=elementwise")
    assert result["mlflow_run_id"] == "run-7"
    (_, config, tags), *middle, end = Recording.calls
    assert config["model"]["in_channels"] == 1
    assert tags == {"config_hash": result["config_hash"]}
    assert ("artifact", "epoch_0003.safetensors", "masks") in middle
    assert ("image", "masks", 3, "uint8", 3) in middle
    artifacts = {call[1:] for call in middle if call[0] == "artifact"}
    assert {("result.json", None), ("history.png", "figures"), ("model.safetensors", "models/pruned")} <= artifacts
    assert ("dense.safetensors", "models/dense") in artifacts
    assert end == ("finish", "FINISHED")


def with_recording(instantiate):
    def patched(node, **kwargs):
        if node.get("_target_") == "gsprune.tracking.tracker.Tracker":
            return Recording(**{k: v for k, v in kwargs.items() if k == "output_dir"})
        return instantiate(node, **kwargs)

    return patched


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("first\nlast line"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_failure_is_recorded_and_goes_on(tmp_path, monkeypatch, error, status):
    monkeypatch.setattr(configuration, "make", with_recording(configuration.make))

    def broken(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(Trainer, "evaluate", broken)
    with pytest.raises(type(error)):
        finished(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == ("failed" if status == "FAILED" else "interrupted")
    assert result["error"] == ("RuntimeError: last line" if status == "FAILED" else "KeyboardInterrupt")
    assert result["seconds"] > 0
    assert set(NUMBERS) <= set(result)
    assert Recording.calls[-1] == ("finish", status)


def test_a_mistake_in_the_configuration_is_recorded_and_starts_no_tracking(tmp_path):
    with pytest.raises(ValueError, match=r"trainer.precision=fp8 is not allowed"):
        finished(tmp_path, "trainer.precision=fp8")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["error"]) == (
        "failed",
        "ValueError: trainer.precision=fp8 is not allowed: it must be one of fp32, bf16, fp16",
    )
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pruner.min_kept=0",), "pruner.min_kept is 0"),
        (("optimizer.lr=-1.0",), "optimizer.lr=-1.0 is not allowed: Invalid learning rate"),
        (("lr_schedule.warmup=2.0",), "lr_schedule.warmup=2.0 is not allowed"),
        (("trainer.prune_epochs=0",), "trainer.prune_epochs=0 leaves no gradient to score by"),
        (("trainer.distill=0.5", "trainer.dense_epochs=0"), "trainer.distill=0.5 needs a trained dense network"),
        (("pruner=none", "trainer.distill=0.5", "trainer.prune_epochs=0"), "trainer.distill=0.5 has no effect with"),
        (("optimizer.foo=3",), "optimizer.foo is not a setting"),
        (("optimizer.lr=high",), "optimizer.lr=high is not allowed: it must be a number"),
        (("optimizer.lr=.nan",), "optimizer.lr=nan is not allowed: it must be finite"),
        (
            ("tracking=mlflow", "tracking.timeout_s=-1"),
            "tracking.timeout_s=-1 is not allowed: it must be above 0",
        ),
        (("lr_schedule.foo=3",), "lr_schedule.foo is not a setting"),
        (("dataset.foo=3",), "dataset.foo is not a setting"),
        (("model.weights=1",), "model.weights=1 does not exist"),
        (("dataset.seed=null",), "dataset cannot be made: manual_seed expected a long"),
        (("pruner.criterion._target_=gsprune.Nothing",), "pruner cannot be made: "),
        (("seed=36893488147419103232",), "seed=36893488147419103232 is not allowed: it must be from"),
        (("seed=ten", "dataset.seed=0"), "seed=ten is not allowed: it must be a whole number"),
        (("seed=[a,b]", "dataset.seed=0"), "seed=['a', 'b'] is not allowed: it must be a whole number"),
        (("dataset=imagefolder",), "dataset.path, dataset.num_classes must be given: dataset.path=..."),
        (("objective=3",), "objective=3 is not in the result: There are accuracy"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_training(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        finished(tmp_path, *overrides)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_a_teacher_that_is_no_better_than_guessing_is_refused_or_told(tmp_path, caplog):
    """A dense network from a file may be anything; one that was trained here is the run's own."""
    path = tmp_path / "random.safetensors"
    save_file(fresh_model().state_dict(), path)
    given = ("trainer.distill=0.5", f"model.weights={path}", "trainer.dense_epochs=0")
    with refused("trainer.distill=0.5", "10 classes", "model.weights"):
        finished(tmp_path / "refused", *given)
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()
    finished(tmp_path / "told", "trainer.distill=0.5", "optimizer.lr=1e-6")
    assert any("trainer.distill=0.5" in text and "10 classes" in text for text in caplog.messages)


def test_distillation_leaves_the_dense_network_and_its_control_as_they_are():
    """All jobs of a sweep share one dense network; a control with a teacher is compared with jobs that have one."""
    dense = [dense_key(configure(*more)) for more in ((), ("trainer.distill=0.5", "trainer.distill_temperature=4"))]
    assert dense[0] == dense[1]
    assert config_hash(configure("pruner=none")) != config_hash(configure("pruner=none", "trainer.distill=0.5"))


def test_a_reference_to_nothing_is_one_sentence():
    with pytest.raises(ValueError, match=r"^a\.b cannot be resolved: Interpolation key 'nothing\.here' not found$"):
        plain_config(OmegaConf.create({"a": {"b": "${nothing.here}"}}))


# --- what makes two jobs the same ----------------------------------------------------------------------------


def test_config_hash_is_of_what_determines_the_result(tmp_path):
    base = config_hash(configure())
    assert len(base) == 64
    same = ("tracking=mlflow", "trainer.progress=lines", "objective=macs", "dataset.root=elsewhere")
    assert [config_hash(configure(override)) for override in same] == [base] * len(same)
    different = ("seed=1", "pruner=abs", "trainer.dense_epochs=2", "model.width=8", "dataset.num_workers=3")
    assert len({base, *(config_hash(configure(override)) for override in different)}) == 6
    for name in "ab":
        (tmp_path / name).write_bytes(b"the same")
    a, b = (config_hash(configure(f"model.weights={tmp_path / name}")) for name in "ab")
    assert a == b != base
    (tmp_path / "b").write_bytes(b"another")
    assert config_hash(configure(f"model.weights={tmp_path / 'b'}")) != a


def test_a_control_is_the_same_job_whatever_sparsity_is_swept_beside_it():
    share = "pruner.target_sparsity=0.5"
    control = config_hash(configure("pruner=none"))
    assert config_hash(configure("pruner=none", share)) == control
    others = (("pruner=none", "seed=1"), ("pruner=none", "trainer.prune_epochs=1"), ("pruner=abs", share))
    assert len({control, *(config_hash(configure(*other)) for other in others)}) == 4
    assert config_hash(configure("pruner=abs")) != config_hash(configure("pruner=abs", "pruner.target_sparsity=0.7"))


@pytest.mark.filterwarnings("ignore:training ended at epoch 0")
def test_validation_accuracy_is_that_of_the_final_network_and_of_the_dense_one(tmp_path):
    """The mask of a one-shot pruner comes after the last epoch's validation."""
    result = finished(tmp_path, "pruner=magnitude", "trainer.prune_epochs=0", "dataset.batch_size=32")
    data, judge = build(configure().dataset), Trainer(device="cpu")
    dense, final = fresh_model(), fresh_model()
    dense.load_state_dict(load_file(tmp_path / "checkpoint" / "dense.safetensors"))
    final.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert result["val_accuracy"] == judge.evaluate(final, data.val)["accuracy"]
    assert result["baseline_val_accuracy"] == judge.evaluate(dense, data.val)["accuracy"] != result["val_accuracy"]
    assert (result["epochs"], result["baseline_epochs"]) == (1, 1)


LEARNS = ("dataset.batch_size=32", "trainer.dense_epochs=3", "trainer.prune_epochs=1")


@pytest.mark.parametrize(
    ("overrides", "foreseen", "left"),
    [
        (("pruner=elementwise", "pruner.target_sparsity=0.998"), "", "weights"),
        (("pruner=weighted", "pruner.target_sparsity=0.99"), "", "channels"),
        (("pruner=weighted", "pruner.budget={macs: 0.08}", "pruner.target_sparsity=null"), "about ", "channels"),
    ],
    ids=["weights", "units", "a budget"],
)
@pytest.mark.filterwarnings("ignore:the sparsity reached is", "ignore:.* of the network's MACs stay instead of")
def test_what_will_leave_chance_level_is_said_at_the_start_and_in_the_summary(
    overrides, foreseen, left, tmp_path, caplog, capsys
):
    result = run(configure(*overrides, *LEARNS), output_dir=tmp_path)
    told = [record.getMessage() for record in caplog.records if "about to collapse" in record.getMessage()]
    assert told
    assert result["collapsing"].keys() <= set(load_masks(tmp_path / "masks.safetensors"))
    assert all(text.startswith(foreseen) and left in text for text in result["collapsing"].values())
    assert any(text.endswith(("left", "outputs")) for text in result["collapsed"].values())
    out = capsys.readouterr().out
    assert "Next to nothing is left: " in out
    lost = result["val_accuracy"] < 0.1 + 2 * (0.09 / 180) ** 0.5
    assert lost or foreseen == "about "
    found = {"accuracy": result["val_accuracy"], "classes": 10, "dense": False}
    assert result["at_chance"] == (found if lost else None)
    assert ("is no better than guessing among 10 classes: too much was pruned." in out) == lost


def test_a_sound_run_warns_of_nothing_and_tells_its_coverage(tmp_path, capsys):
    folder = tmp_path
    result = run(configure("pruner=magnitude", "pruner.target_sparsity=0.3", *LEARNS), output_dir=folder)
    assert (result["at_chance"], result["collapsing"], result["collapsed"]) == (None, {}, {})
    assert "guessing" not in capsys.readouterr().out
    assert result["coverage"] == 1.0
    assert [row["coverage"] for row in rows_of(folder) if "coverage" in row] == [1.0]  # of the epoch of pruning
    print_summary(
        {**result, "coverage": 0.921, "skipped": {f"a.{i}": "it is odd" for i in (0, 1)}}, folder, tracking_uri=None
    )
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "weights it may prune" in line)
    assert "92.1 %" in row
    assert "Left whole: a.{0,1}: it is odd" in out


def test_the_dense_copy_is_on_the_host(elementwise, tmp_path, monkeypatch):
    """On a device that is only pretended: what a copy is moved to is written down."""
    moved = []
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda self: moved.append(type(self)) or self)
    finished(tmp_path, "pruner=magnitude", "trainer.prune_epochs=1")
    assert moved == [type(fresh_model())]


def test_a_rehearsal_accepts_the_output_directory_of_a_run_as_scores(weighted):
    rehearse(configure("pruner=weighted", f"pruner.scores={weighted[1]}"), here=True)
    rehearse(configure("pruner=weighted", f"pruner.scores={'0' * 32}"), here=True)  # which only the job fetches
    with pytest.raises(ValueError, match="scores"):
        rehearse(configure("pruner=elementwise", f"pruner.scores={weighted[1]}"), here=True)


def test_a_plan_is_printed_and_nothing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    planned = job_module.show_plan(configure("pruner=weighted"), output_dir=tmp_path)
    assert "Weighted removes units" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(planned.to_json()))
    assert (planned.rules[0].kept, planned.rules[0].total) == (10, 20)


def test_the_plan_of_two_pruners_is_printed(tmp_path, capsys):
    planned = job_module.show_plan(configure("pruner=units_and_weights"), output_dir=tmp_path)
    assert "Rule 2 of 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["rules"][0]["criterion"] == "Weighted"
    assert len(planned.rules) == 2
