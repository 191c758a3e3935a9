"""Jobs of one sweep in this process: the dense network trained once, scored once, and jobs not done twice."""

from __future__ import annotations

import functools
import io
import json
from contextlib import redirect_stdout

import jobs
import pytest
import torch
from facts import refused
from safetensors.torch import load_file, save_file

from gsprune.app import job as job_module
from gsprune.app.job import run
from gsprune.formats.masks import load_masks
from gsprune.formats.scores import load_scores, save_scores
from gsprune.settings.identity import config_hash, dense_key, scores_key
from gsprune.sweeps.dense_cache import DenseCache, DenseRecord
from gsprune.sweeps.results import read_results
from gsprune.sweeps.sweep_dir import Sweep, set_aside
from gsprune.tracking.tracker import Tracker, read_metrics
from gsprune.training.trainer import Trainer

configure = functools.partial(jobs.configure, "trainer.dense_epochs=2", "trainer.latency_repeats=0")


class InSweep:
    """Runs jobs as if a launcher had put them into one sweep directory."""

    def __init__(self, directory, monkeypatch):
        self.sweep = Sweep(directory)
        self.trained = []  # epochs of every call to `fit`, by which one sees what was trained
        self.scored = 0
        monkeypatch.setattr(job_module, "current_sweep", lambda: self.sweep)
        fit, score = Trainer.fit, Trainer.score

        def counted_fit(trainer, *args, **kwargs):
            self.trained.append(kwargs["pruner"].criterion_name)
            return fit(trainer, *args, **kwargs)

        def counted_score(trainer, *args, **kwargs):
            self.scored += 1
            return score(trainer, *args, **kwargs)

        monkeypatch.setattr(Trainer, "fit", counted_fit)
        monkeypatch.setattr(Trainer, "score", counted_score)

    def run(self, name, *overrides):
        with redirect_stdout(io.StringIO()):
            return run(configure(*overrides), output_dir=self.sweep.directory / name)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return InSweep(tmp_path / "sweep", monkeypatch)


TIMED = {"seconds", "timings", "dense"}


def untimed(result):
    return {name: value for name, value in result.items() if name not in TIMED}


def rows(folder):
    return [
        {k: v for k, v in row.items() if k not in ("time", "epoch_seconds", "seconds")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


# --- the dense network -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_are_the_same_with_and_without_the_cache(sweep):
    """Three jobs that share a dense network, and each of them again with the cache turned off."""
    jobs = [("pruner=elementwise",), ("pruner=weighted",), ("pruner=elementwise", "pruner.target_sparsity=0.5")]
    for number, overrides in enumerate(jobs):
        sweep.run(str(number), *overrides, "trainer.dense_scores=true")
    assert sweep.trained == ["none", "Elementwise", "Weighted", "Elementwise"]
    assert sweep.scored == 2  # once for each criterion
    alone = InSweepWithout(sweep)
    for number, overrides in enumerate(jobs):
        alone.run(str(number), *overrides, "trainer.dense_scores=true", "trainer.dense_cache=false")
        with_cache, without = sweep.sweep.directory / str(number), alone.directory / str(number)
        ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (with_cache, without))
        assert untimed(ours) == untimed(theirs)
        assert rows(with_cache) == rows(without)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (with_cache, without))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_job_that_fails_after_it_took_a_dense_network_keeps_it_and_is_recorded_as_failed(sweep, monkeypatch):
    def broken(*_):
        raise RuntimeError("gone")

    sweep.run("0", "pruner=elementwise")
    ended = []
    monkeypatch.setattr(Tracker, "finish", lambda self, status: ended.append(status))
    monkeypatch.setattr(job_module, "build_pruning_phase", broken)
    with pytest.raises(RuntimeError, match="gone"):
        sweep.run("1", "pruner=weighted")
    assert ended == ["FAILED"]
    dense = load_file(sweep.sweep.directory / "0" / "checkpoint" / "dense.safetensors")
    kept = load_file(sweep.sweep.directory / "1" / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in dense.items())


class InSweepWithout:
    """The same jobs in another directory."""

    def __init__(self, other):
        self.other, self.directory = other, other.sweep.directory.with_name("alone")

    def run(self, name, *overrides):
        self.other.sweep = Sweep(self.directory)
        try:
            return self.other.run(name, *overrides)
        finally:
            self.other.sweep = Sweep(self.directory.with_name("sweep"))


@pytest.mark.slow
def test_a_job_says_where_its_dense_network_is_from(sweep):
    first = sweep.run("0", "pruner=none")
    second = sweep.run("1", "pruner=weighted")
    assert (first["dense"]["source"], second["dense"]["source"]) == ("trained", "cache")
    assert first["dense"]["key"] == second["dense"]["key"]
    assert second["dense"]["job"] == "0"
    assert second["dense"]["train_seconds"] == first["dense"]["train_seconds"] > 0
    assert second["dense"]["seconds"] < first["dense"]["seconds"]
    dense = [load_file(sweep.sweep.directory / name / "checkpoint" / "dense.safetensors") for name in "01"]
    assert all(torch.equal(dense[0][name], dense[1][name]) for name in dense[0])


@pytest.mark.slow
def test_a_damaged_entry_is_made_again(sweep, caplog):
    sweep.run("0", "pruner=none")
    (folder,) = (sweep.sweep.directory / "dense_cache").iterdir()
    (folder / "dense.safetensors").write_bytes((folder / "dense.safetensors").read_bytes()[:-9])
    sweep.run("1", "pruner=none", "trainer.prune_epochs=1")
    assert sweep.trained.count("none") == 4  # two dense phases and two plain second ones
    assert f"{folder} is damaged, is now " in caplog.text
    (folder / "dense.json").write_text('{"key": 3')
    sweep.run("2", "pruner=none", "trainer.prune_epochs=3")
    assert sweep.trained.count("none") == 6
    assert sorted(path.name for path in folder.parent.iterdir())[1:] == [
        f"damaged-2-{folder.name}",
        f"damaged-{folder.name}",
    ]
    assert sweep.run("3", "pruner=none", "trainer.prune_epochs=4")["dense"]["job"] == "2"


RECORD = DenseRecord(
    {"accuracy": 0.5, "loss": 1.0, "val_accuracy": 0.5}, [{"params": 1, "macs": 1}], None, "0", "c", 1.0
)


@pytest.mark.parametrize("name", ["dense.safetensors", "scores-s.safetensors"])
def test_one_bit_that_is_another_is_seen(tmp_path, name, caplog):
    cache = DenseCache(Sweep(tmp_path), "k" * 64)
    cache.store({"w": torch.arange(100.0)}, RECORD)
    save_scores(cache.scores("s"), {"w": torch.ones(3)}, criterion="Weighted", steps=1)
    assert not cache.has_scores("s")  # as a job leaves it that is killed right there
    cache.seal_scores("s")
    assert cache.find() == RECORD
    assert cache.has_scores("s")
    spoiled = bytearray((cache.folder / name).read_bytes())
    spoiled[-4] ^= 0x40
    (cache.folder / name).write_bytes(spoiled)
    assert (cache.find() is None, cache.has_scores("s")) == (name == "dense.safetensors", False)
    (aside,) = tmp_path.rglob(f"damaged-*{'' if name[0] == 's' else '/' + name}")
    assert aside.read_bytes() == spoiled
    cache.store({"w": torch.arange(100.0)}, RECORD)
    assert cache.find() == RECORD


def test_the_dense_key_is_of_what_the_dense_network_depends_on():
    base = dense_key(configure())
    same = [
        "pruner=abs",
        "pruner.target_sparsity=0.9",
        "trainer.prune_epochs=9",
        "trainer.latency_repeats=3",
        "objective=loss",
        "tracking=mlflow",
        "trainer.dense_scores=false",
        "pruner/schedule=one_shot",
    ]
    assert [dense_key(configure(override)) for override in same] == [base] * len(same)
    other = [
        "seed=1",
        "model.width=5",
        "optimizer.lr=0.1",
        "trainer.dense_epochs=3",
        "dataset.batch_size=64",
        "lr_schedule=constant",
        "trainer.precision=bf16",
        "optimizer=adamw",
    ]
    assert len({base, *(dense_key(configure(override)) for override in other)}) == 9
    assert dense_key(configure(), device="cuda") != dense_key(configure(), device="cpu")


def test_the_user_s_own_code_and_the_content_of_scores_are_part_of_what_a_job_is(tmp_path, monkeypatch):
    """An edited model is another model, though the configuration is the same."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mynet_of_this_test.py").write_text("def net(num_classes, in_channels, image_size, width=4): ...")
    cfg = configure("model._target_=mynet_of_this_test.net")
    before = config_hash(cfg), dense_key(cfg), scores_key(cfg)
    (tmp_path / "mynet_of_this_test.py").write_text("def net(num_classes, in_channels, image_size, width=5): ...")
    after = config_hash(cfg), dense_key(cfg), scores_key(cfg)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]
    monkeypatch.setattr("gsprune.settings.identity.__version__", "0.0.0")
    assert dense_key(cfg) != after[1]
    assert config_hash(configure("dataset.num_workers=2")) != config_hash(configure("dataset.num_workers=1"))


def test_an_objective_that_is_wrong_is_said_so_although_the_job_has_finished(sweep):
    sweep.run("0", "pruner=none", "trainer.dense_epochs=1", "trainer.prune_epochs=0")
    with refused("objective=acuracy", "did you mean accuracy?"):
        sweep.run("0", "pruner=none", "trainer.dense_epochs=1", "trainer.prune_epochs=0", "objective=acuracy")
    (job,) = read_results(sweep.sweep.directory).jobs  # and it stays what it was
    assert (job.name, job.status) == ("0", "finished")


def test_what_is_set_aside_twice_stands_there_once(tmp_path):
    for accuracy in (0.5, 0.5):
        (tmp_path / "0" / "masks").mkdir(parents=True)
        (tmp_path / "0" / "masks" / "a").write_text("mask")
        (tmp_path / "0" / "train.log").write_text("log")
        result = {"status": "finished", "accuracy": accuracy, "config_hash": "0123456789"}
        (tmp_path / "0" / "result.json").write_text(json.dumps(result))
        (job,) = read_results(tmp_path / "0").jobs
        assert set_aside(tmp_path / "0", job) == tmp_path / "0-01234567"
        assert [path.name for path in (tmp_path / "0").iterdir()] == ["train.log"]
        assert sorted(path.name for path in (tmp_path / "0-01234567").iterdir()) == ["masks", "result.json"]


def test_what_was_set_aside_before_is_not_lost_for_what_is_unfinished(tmp_path):
    for status in ("finished", "interrupted"):
        (tmp_path / "0").mkdir(exist_ok=True)
        (tmp_path / "0" / "result.json").write_text(json.dumps({"status": status, "config_hash": "0123456789"}))
        (job,) = read_results(tmp_path / "0").jobs
        set_aside(tmp_path / "0", job)
    left = {path.name: json.loads((path / "result.json").read_text())["status"] for path in tmp_path.glob("0-*")}
    assert left == {"0-01234567": "finished", "0-01234567-2": "interrupted"}


def test_the_scores_key_is_of_the_criterion_and_not_of_how_much_is_pruned():
    base = scores_key(configure("pruner=elementwise"))
    same = ["pruner.target_sparsity=0.5", "pruner.scope=local", "pruner.schedule.start_epoch=1"]
    assert [scores_key(configure("pruner=elementwise", override)) for override in same] == [base] * len(same)
    assert scores_key(configure("pruner=elementwise", "pruner.criterion.decay=0.5")) != base
    assert scores_key(configure("pruner=weighted")) != base


# --- scores of another run ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_starts_from_the_scores_of_another(sweep):
    """One-shot at the very start: what is pruned is decided by the given scores alone."""
    first = sweep.sweep.directory / "0"
    one_shot = ("pruner=weighted", "pruner/schedule=one_shot")
    sweep.run("0", *one_shot, "trainer.dense_scores=true")
    given = load_scores(first / "checkpoint" / "scores.safetensors")
    assert (given.criterion, given.steps) == ("Weighted", 5)  # an epoch of 1,257 pictures
    upside_down = {name: score.max() - score for name, score in given.scores.items()}
    file = sweep.sweep.directory.parent / "scores.safetensors"
    save_scores(file, upside_down, criterion="Weighted", steps=5)
    sweep.run("1", *one_shot, f"pruner.scores={first}")
    sweep.run("2", *one_shot, f"pruner.scores={file}")
    masks = [load_masks(sweep.sweep.directory / name / "masks.safetensors") for name in "012"]
    for name, score in given.scores.items():
        best = torch.zeros(len(score), dtype=torch.bool).index_fill(0, score.topk(len(score) // 2).indices, True)
        assert torch.equal(masks[0][name], best)
        assert torch.equal(masks[1][name], best)
        assert torch.equal(masks[2][name], ~best)


def test_scores_that_do_not_fit_or_are_nowhere_are_one_sentence_before_any_training(tmp_path, sweep):
    save_scores(tmp_path / "s", {"blocks.0": torch.ones(3)}, criterion="Weighted", steps=1)
    with refused("scores", "do not fit"):
        sweep.run("0", f"pruner.scores={tmp_path / 's'}")
    with refused(f"pruner.scores={tmp_path / 'nothing'}", "checkpoint/scores.safetensors", "MLflow"):
        sweep.run("1", f"pruner.scores={tmp_path / 'nothing'}")
    with refused(f"pruner.scores={tmp_path}", "checkpoint/scores.safetensors", "MLflow"):
        sweep.run("2", f"pruner.scores={tmp_path}")
    save_file({"w": torch.ones(2)}, tmp_path / "w")
    with refused("'gsprune-scores'"):
        sweep.run("3", f"pruner.scores={tmp_path / 'w'}")
    assert sweep.trained == []


def test_the_configuration_s_hash_follows_the_content_of_given_scores(tmp_path):
    for name, value in (("a", 1.0), ("c", 2.0)):
        save_scores(tmp_path / name, {"w": torch.tensor([value])}, criterion="Weighted", steps=1)
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    a, b, c = (config_hash(configure(f"pruner.scores={tmp_path / name}")) for name in "abc")
    assert a == b != c


# --- jobs that have finished -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_job_is_skipped_wherever_its_number_has_gone(sweep):
    folder = sweep.sweep.directory
    first = sweep.run("0", "pruner=none")
    trained = len(sweep.trained)
    assert sweep.run("0", "pruner=none") == first
    assert sweep.run("7", "pruner=none", "objective=loss") == first
    assert len(sweep.trained) == trained
    assert json.loads((folder / "7" / "result.json").read_text()) == {
        "status": "skipped",
        "same_as": "0",
        "config_hash": first["config_hash"],
    }
    second = sweep.run("0", "pruner=none", "seed=1")  # an extended sweep numbers its jobs anew
    moved = sweep.run("1", "pruner=weighted")
    assert (moved["dense"]["source"], moved["dense"]["job"]) == ("cache", f"0-{first['config_hash'][:8]}")
    beside = folder / f"0-{first['config_hash'][:8]}"
    assert json.loads((beside / "result.json").read_text()) == json.loads(json.dumps(first))
    assert json.loads((folder / "0" / "result.json").read_text())["config_hash"] == second["config_hash"]
    assert sweep.run("5", "pruner=none") == first


@pytest.mark.slow
def test_failed_and_killed_jobs_run_again(sweep):
    folder = sweep.sweep.directory
    finished = sweep.run("0", "pruner=none", "trainer.dense_epochs=1", "trainer.prune_epochs=0")
    for status in ("running", "failed"):
        (folder / "0" / "result.json").write_text(json.dumps({**finished, "status": status}))
        before = len(sweep.trained)
        again = sweep.run("0", "pruner=none", "trainer.dense_epochs=1", "trainer.prune_epochs=0")
        assert len(sweep.trained) > before
        assert again["accuracy"] == finished["accuracy"]
    (folder / "0" / "result.json").write_text('{"status": "fini')
    assert sweep.run("0", "pruner=none", "trainer.dense_epochs=1", "trainer.prune_epochs=0")["status"] == "finished"


def test_running_is_told_from_killed_by_the_lock(tmp_path):
    sweep = Sweep(tmp_path)
    (tmp_path / "a" / "0").mkdir(parents=True)
    (tmp_path / "a" / "0" / "result.json").write_text('{"status": "running"}')
    (job,) = read_results(tmp_path).jobs
    assert not sweep.is_running(job)
    with sweep.lock("job a/0").held(waiting_for="-"):
        assert sweep.is_running(job)
    assert not sweep.is_running(job)
    assert sweep.lock("job a/0").path.parent == tmp_path / ".gsprune" / "locks"
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["a"]


def test_an_entry_that_cannot_be_read_is_none(tmp_path, monkeypatch, caplog):
    def unreadable(path):
        raise OSError(5, "Input/output error", str(path))

    cache = DenseCache(Sweep(tmp_path), "k" * 64)
    cache.folder.mkdir(parents=True)
    (cache.folder / "dense.json").write_text("{}")
    monkeypatch.setattr("gsprune.sweeps.dense_cache.read_json", unreadable)
    assert cache.find() is None
    assert "cannot be read and is trained again: [Errno 5] Input/output error" in caplog.text
    cache.store({"w": torch.ones(2)}, None)  # it may be a good one
    assert [path.name for path in cache.folder.iterdir()] == ["dense.json"]
