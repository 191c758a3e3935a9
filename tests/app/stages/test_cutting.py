"""`mode=cut`: a trained network becomes smaller in one job, without training; what was cut is not cut again."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from facts import refused
from jobs import configure, train
from kills import differences
from omegaconf import OmegaConf
from safetensors.torch import load_file

import gsprune
from gsprune.app import job as job_module
from gsprune.app.configuration import build
from gsprune.app.cut_settings import rules_of
from gsprune.app.job import load_weights, rehearse, run
from gsprune.app.stages import cutting
from gsprune.app.stages.cutting import cross_entropy
from gsprune.criteria import Fisher
from gsprune.cutting.cut import cut
from gsprune.formats.masks import load_masks
from gsprune.formats.network import load_pruned
from gsprune.settings.identity import config_hash, dense_key
from gsprune.tracking.tracker import read_metrics
from gsprune.training.trainer import Trainer, seed_everything

WIDE = ("model.width=8", "trainer.latency_repeats=0")
NO_TRAINING = ("trainer.dense_epochs=0", "trainer.prune_epochs=0")
CUT = ("mode=cut", "pruner=fisher", "pruner.budget.macs=0.5", "cut.calibration=128", *WIDE, *NO_TRAINING)


def go(folder, *overrides):
    printed = io.StringIO()
    with redirect_stdout(printed):
        result = run(configure(*overrides), output_dir=folder)
    return result, printed.getvalue()


def fresh():
    node = configure(*WIDE).model.copy()
    OmegaConf.set_struct(node, False)
    node.pop("weights")
    return build(node)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a network that was trained by an earlier job."""
    folder = tmp_path_factory.mktemp("dense")
    settings = ("pruner=none", "trainer.dense_epochs=4", "trainer.prune_epochs=0", "dataset.batch_size=64")
    go(folder, *settings, *WIDE)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    return *go(folder, *CUT, f"model.weights={weights}"), folder


@pytest.mark.slow
def test_the_network_is_that_of_the_library_and_both_are_measured(made, weights):
    result, printed, folder = made
    cfg, trainer = configure(*CUT), Trainer(device="cpu")
    seed_everything(cfg.seed)
    data, dense = build(cfg.dataset), fresh()
    load_weights(dense, weights)
    seed_everything(cfg.seed + 2)
    data.train.generator.manual_seed(cfg.seed + 2)
    budget = {"macs": 0.5}
    rules = [gsprune.Rule(Fisher(), budget=budget)]
    found = cut(dense, data.train, cross_entropy, rules=rules, calibration=128, progress=False)
    small = load_pruned(folder, fresh())
    assert all(torch.equal(v, found.model.state_dict()[k]) for k, v in small.state_dict().items())
    assert all(torch.equal(mask, found.keeps[name]) for name, mask in load_masks(folder / "masks.safetensors").items())
    for network, prefix in ((small, ""), (dense, "baseline_")):
        assert result[f"{prefix}accuracy"] == trainer.evaluate(network, data.test)["accuracy"]
        assert result[f"{prefix}val_accuracy"] == trainer.evaluate(network, data.val)["accuracy"]
    assert result["accuracy"] > 0.5
    assert 0.3 < result["macs"] / result["macs_dense"] <= 0.52
    assert (result["epochs"], result["budget"], result["target_sparsity"], result["shrunk"]) == (0, budget, None, True)
    told = result["cut"]
    assert (result["mode"], told["criterion"], told["calibration"]) == ("cut", "Fisher", 128)
    assert told["val_accuracy"] == result["val_accuracy"]
    sure, lost = told["how_much"], result["baseline_val_accuracy"] - result["val_accuracy"]
    assert (sure["samples"], sure["max_drop"]) == (180, None)
    assert (sure["lost"] - sure["gained"]) / 180 == pytest.approx(lost)
    assert 100 * lost < sure["bound"] < 100
    assert f"at most {sure['bound']:.2f} points, with 95 % confidence (180 validation samples)" in printed
    assert told["repaired"]
    assert all(after < before for before, after in told["repaired"].values())
    assert "128 training samples" in printed


@pytest.mark.slow
def test_what_a_cut_leaves_is_what_a_run_leaves(made):
    _, _, folder = made
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "pruning.json", "masks.safetensors", "masks/epoch_0000.safetensors"} <= names
    assert {"figures/masks.png", "figures/sparsity_by_layer.png", "checkpoint/dense.safetensors"} <= names
    assert not any(name.startswith(("checkpoint/epoch_", "figures/history")) for name in names)
    (*_, row) = read_metrics(folder / "metrics.jsonl")
    assert row["accuracy"] == json.loads((folder / "result.json").read_text())["accuracy"]
    assert row["cut/val_accuracy"] == row["val_accuracy"]


@pytest.mark.slow
def test_what_was_cut_is_not_cut_again_and_recovery_resumes_with_the_same_bits(tmp_path, weights, monkeypatch):
    settings = (*CUT, f"model.weights={weights}", "trainer.prune_epochs=2", "trainer.distill=0.5")
    whole, _ = go(tmp_path / "whole", *settings)
    assert whole["epochs"] == 2
    assert whole["cut"]["val_accuracy"] != whole["val_accuracy"]
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["sparsity"] for row in rows if "train/loss" in row] == [whole["sparsity"]] * 2
    fit = Trainer.fit

    def killed(self, *args, on_rest, **settings):
        def rest(at):
            on_rest(at)
            if settings["epochs"] == 2 and (at.epoch, at.step) == (0, 3):
                raise KeyboardInterrupt

        fit(self, *args, on_rest=rest, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "killed", *settings, "trainer.checkpoint_minutes=0")
    monkeypatch.setattr(cutting, "Cutter", lambda *_, **__: pytest.fail("it was cut again"))
    go(tmp_path / "killed", *settings)
    with_seconds = ["checkpoint/cut/cut.json differs", "result.json differs"]  # of the cut itself
    assert [text for text in differences(tmp_path / "whole", tmp_path / "killed") if text not in with_seconds] == []
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert all(result["cut"].pop("seconds") > 0 for result in results)
    clocked = ("seconds", "timings")
    ours, theirs = ({k: v for k, v in result.items() if k not in clocked} for result in results)
    assert ours == theirs


@pytest.mark.slow
def test_a_cut_that_is_damaged_or_of_another_network_is_made_again(tmp_path, weights, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(job_module, "write_files", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(tmp_path, *CUT, f"model.weights={weights}")
    path = tmp_path / "checkpoint" / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    calls, cutter = [], cutting.Cutter
    monkeypatch.setattr(cutting, "Cutter", lambda *a, **k: (calls.append(1), cutter(*a, **k))[1])
    result, _ = go(tmp_path, *CUT, f"model.weights={weights}")
    assert (result["status"], len(calls)) == ("finished", 1)
    assert load_file(path).keys() == load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.slow
def test_the_largest_cut_that_is_certified_on_the_validation_split(tmp_path, weights):
    amounts = ("mode=cut", "pruner=fisher", "cut.max_drop=8", "cut.confidence=0.9", *WIDE, *NO_TRAINING)
    result, printed = go(tmp_path, *amounts, f"model.weights={weights}")
    told = result["cut"]["how_much"]
    assert (told["max_drop"], told["confidence"], told["samples"]) == (8.0, 0.9, 180)
    assert told["bound"] <= 8
    assert result["macs"] / result["macs_dense"] == pytest.approx(told["share"], rel=0.05)
    drop = 100 * (result["baseline_val_accuracy"] - result["val_accuracy"])
    assert drop == pytest.approx(100 * (told["lost"] - told["gained"]) / 180)
    assert drop <= told["bound"]
    assert (result["budget"], result["target_sparsity"]) == (None, None)
    assert f"{told['bound']:.2f} points, with 90 % confidence" in printed


@pytest.mark.slow
def test_single_weights_are_pruned_and_stay_so_while_the_network_recovers(tmp_path, weights):
    settings = ("mode=cut", "pruner=elementwise", "cut.calibration=128", *WIDE, f"model.weights={weights}")
    share, amount = "pruner.target_sparsity=0.7", {}
    for name, more in (("now", (share,)), ("pattern", ("pruner.pattern='2:4'", "pruner.exclude=[stem]"))):
        result, printed = go(tmp_path / name, *settings, *more, *NO_TRAINING)
        masks, found = (
            load_masks(tmp_path / name / "masks.safetensors"),
            load_file(tmp_path / name / "model.safetensors"),
        )
        assert all(not found[tensor][~mask].any() for tensor, mask in masks.items())
        amount[name] = result["target_sparsity"], round(result["sparsity"], 3)
        assert result["shrunk"] is False
        assert "Cut by Elementwise on 128 training samples" in printed
    assert amount == {"now": (0.7, 0.7), "pattern": (0.5, 0.5)}
    result, _ = go(tmp_path / "recovered", *settings, share, "trainer.dense_epochs=0", "trainer.prune_epochs=1")
    masks = load_masks(tmp_path / "recovered" / "masks.safetensors")
    found, before = (load_file(tmp_path / name / "model.safetensors") for name in ("recovered", "now"))
    assert all(not found[tensor][~mask].any() for tensor, mask in masks.items())
    assert any(not torch.equal(found[tensor], before[tensor]) for tensor in masks)
    assert (result["epochs"], round(result["sparsity"], 3)) == (1, 0.7)


@pytest.mark.slow
def test_as_many_weights_go_as_a_drop_allows_and_the_curve_is_of_sparsities(tmp_path, weights):
    settings = ("mode=cut", "pruner=wanda", f"model.weights={weights}", "cut.calibration=64", *WIDE, *NO_TRAINING)
    result, printed = go(tmp_path, *settings, "cut.max_drop=8", "cut.curve=[0.5,0.9]")
    told, sure = result["cut"], result["cut"]["how_much"]
    assert (told["criterion"], sure["max_drop"], sure["samples"]) == ("Wanda", 8, 180)
    assert sure["share"] == pytest.approx(1 - result["sparsity"], abs=0.05)
    assert 100 * (result["baseline_val_accuracy"] - result["val_accuracy"]) < sure["bound"] <= 8
    assert "180 validation samples" in printed
    assert result["target_sparsity"] is None
    assert [(row["name"], row["of"], row["budget"]) for row in told["curve"]] == [
        ("weights-90", "weights", 0.9),
        ("weights-50", "weights", 0.5),
    ]
    assert [row["left"] for row in told["curve"]] == pytest.approx([0.9, 0.5], abs=0.02)
    half = load_pruned(tmp_path / "curve" / "weights-50", fresh())
    cfg, trainer = configure(*settings), Trainer(device="cpu")
    seed_everything(cfg.seed)
    assert told["curve"][1]["accuracy"] == trainer.evaluate(half, build(cfg.dataset).test)["accuracy"]
    assert (tmp_path / "figures" / "curve.png").exists()


@pytest.mark.slow
def test_two_processes_cut_what_one_cuts_and_train_it_on_together(tmp_path, weights):
    settings = (*CUT, f"model.weights={weights}", "cut.calibration=64")
    go(tmp_path / "one", *settings)
    both, _ = go(tmp_path / "two", *settings, "trainer.devices=2", "trainer.prune_epochs=1", "audit=true")
    one, two = (load_file(tmp_path / name / "checkpoint/cut/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert (both["epochs"], both["status"]) == (1, "finished")
    after = load_file(tmp_path / "two" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in two.items()}
    assert not torch.equal(after["head.weight"], two["head.weight"])
    assert [row["criterion"] for row in both["audit"]["rows"]] == ["Fisher", "Magnitude", "Random"]


@pytest.mark.slow
def test_a_pattern_of_blocks_keeps_two_of_four(tmp_path, weights):
    blocks = ("pruner=sparsegpt", "pruner.pattern='2:4'", "pruner.exclude=[stem]")
    result, _ = go(tmp_path, "mode=cut", *blocks, f"model.weights={weights}", "cut.calibration=64", *WIDE, *NO_TRAINING)
    assert (result["sparsity"], result["target_sparsity"]) == (0.5, 0.5)
    weight = load_pruned(tmp_path, fresh()).head.weight
    assert weight.unflatten(1, (-1, 4)).count_nonzero(-1).max() <= 2
    assert result["cut"]["how_much"]["bound"] > 0


@pytest.mark.slow
def test_batchnorm_alone_and_no_repair_change_what_they_say(tmp_path, weights):
    found = {}
    for method in ("batchnorm", "null"):
        result, _ = go(tmp_path / method, *CUT, f"cut.repair={method}", f"model.weights={weights}")
        found[method] = load_file(tmp_path / method / "model.safetensors")
        assert bool(result["cut"]["repaired"]) == (method == "batchnorm")
    changed = {name for name, value in found["null"].items() if not torch.equal(value, found["batchnorm"][name])}
    assert changed
    assert all("running" in name for name in changed)


@pytest.mark.slow
def test_a_curve_is_a_table_a_picture_networks_and_logged_models(tmp_path, weights):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = (*CUT, f"model.weights={weights}", "tracking=mlflow", f"tracking.tracking_uri={uri}")
    result, _ = go(tmp_path / "run", *settings, "cut.curve=[0.25,0.75]")
    rows, trainer, data = result["cut"]["curve"], Trainer(device="cpu"), build(configure(*CUT).dataset)
    assert [(row["name"], row["budget"]) for row in rows] == [("macs-75", 0.75), ("macs-25", 0.25)]
    lines = (tmp_path / "run" / "curve.csv").read_text().splitlines()
    assert lines[0].split(",") == [*rows[0]]
    assert len(lines) == 3
    assert (tmp_path / "run" / "figures" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(result["mlflow_run_id"])
    models = {model.name: model for model in client.search_logged_models([run.info.experiment_id])}
    own = set(models) - {"macs-75", "macs-25"}  # weights were given: the dense network is another run's
    assert len(own) == 1
    for row in rows:
        small = load_pruned(tmp_path / "run" / "curve" / row["name"], fresh())
        program = torch.export.load(tmp_path / "run" / "curve" / row["name"] / "model.pt2").module()
        x = torch.rand(3, 1, 8, 8)
        assert (program(x) - small(x)).abs().max() < 1e-5
        assert row["accuracy"] == trainer.evaluate(small, data.test)["accuracy"]
        assert row["left"] == pytest.approx(row["macs"] / result["macs_dense"])
        assert abs(row["left"] - row["budget"]) < 0.05
        model = client.get_logged_model(models[row["name"]].model_id)
        assert model.params == {"budget.macs": f"{row['budget']:g}", "criterion": "Fisher"}
        assert {m.key: m.value for m in model.metrics}["model_accuracy"] == row["accuracy"]
    history = client.get_metric_history(result["mlflow_run_id"], "model_val_accuracy")
    found = {m.step: m.value for m in history}
    assert found.items() >= {round(100 * row["budget"]): row["val_accuracy"] for row in rows}.items()
    mine = client.get_logged_model(models[own.pop()].model_id)
    assert {m.key: m.value for m in mine.metrics}["model_val_accuracy"] == result["val_accuracy"]


@pytest.mark.slow
def test_without_weights_the_network_is_trained_first(tmp_path):
    settings = [override.replace("fisher", "obs") for override in CUT]
    result, _ = go(tmp_path, *settings, "trainer.dense_epochs=3", "dataset.batch_size=64")
    assert result["cut"]["criterion"] == "OBS"
    assert (result["epochs"], result["baseline_epochs"]) == (3, 3)
    assert result["macs"] < 0.52 * result["macs_dense"]


def test_jobs_that_cut_and_jobs_that_prune_share_a_dense_network():
    trained = ("trainer.dense_epochs=3", "trainer.prune_epochs=2")
    assert dense_key(configure("mode=cut", *trained)) == dense_key(configure(*trained))
    assert config_hash(configure("mode=cut", *trained)) != config_hash(configure(*trained))


def test_the_amount_is_that_of_the_rule_or_of_the_schedule_at_its_end():
    amounts = {
        (): (0.5, None, {}),
        ("pruner.target_sparsity=0.25",): (0.25, None, {}),
        ("pruner.schedule.target_sparsity=0.75",): (0.75, None, {}),
        ("pruner.budget.params=0.3",): (None, ("params", 0.3), {}),
        ("pruner.keep.channels=4",): (None, None, {"channels": 4}),
    }
    for overrides, amount in amounts.items():
        (rule,) = rules_of(configure("pruner=fisher", *overrides).pruner)
        assert (rule.target_sparsity, rule.goal, rule.counts) == amount
    assert [rule.target_sparsity for rule in rules_of(configure("pruner=heads_and_neurons").pruner)] == [0.5, 0.5]


WRONG = {
    ("pruner=none",): ("pruner=none", "cuts nothing"),
    ("pruner=units_and_weights",): ("single weights", "mode=train"),
    ("pruner=elementwise", "cut.repair=batchnorm"): ("cut.repair=batchnorm", "single weights"),
    ("pruner=wanda", "pruner.pattern='2:4'", "cut.curve=[0.5]"): ("cut.curve=[0.5]", "2:4", "0.5"),
    ("pruner=wanda", "pruner.pattern='2:4'", "cut.max_drop=9"): ("cut.max_drop=9", "2:4", "0.5"),
    ("pruner=wanda", "cut.max_drop=0.5"): ("180 samples", "0.5 points", "certified"),
    ("pruner=wanda", "cut.max_drop=9", "pruner.target_sparsity=0.3"): ("cut.max_drop=9", "0.3", "both"),
    ("pruner=sparsegpt", "pruner.pattern='4x1'"): ("SparseGPT", "4x1"),
    ("pruner=elementwise", "pruner.pattern='2:4'", "pruner.target_sparsity=0.9"): ("0.9", "0.5"),
    ("pruner.shrink=each_update",): ("pruner.shrink=each_update", "no effect"),
    ("pruner.scores=here",): ("pruner.scores=here", "no effect"),
    ("cut.repair=magic",): ("cut.repair=magic", "least_squares, batchnorm", "null"),
    ("cut.max_drop=0",): ("cut.max_drop=0", "above 0"),
    ("cut.max_drop=1", "pruner.budget.macs=0.5"): ("cut.max_drop=1", "pruner.budget.macs=0.5", "both"),
    ("cut.max_drop=1", "pruner.keep.channels=4"): ("cut.max_drop=1", "pruner.keep={'channels': 4}", "both"),
    ("cut.max_drop=0.5",): ("180 samples", "0.5 points", "certified"),
    ("pruner=heads_and_neurons", "cut.max_drop=8"): ("cut.max_drop=8", "one rule"),
    ("cut.confidence=1.0",): ("cut.confidence=1.0", "below 1"),
    ("cut.curve=[0.5,1.5]",): ("cut.curve=[0.5, 1.5]", "below 1"),
    ("cut.curve=[0.5]",): ("cut.curve=[0.5]", "pruner.budget.macs"),
    ("cut.calibration=0",): ("cut.calibration=0", "1 or more"),
    ("trainer.dense_epochs=0",): ("trained network", "model.weights", "trainer.dense_epochs"),
    ("mode=cutting",): ("mode=cutting", "train, cut"),
}


@pytest.mark.parametrize("overrides", WRONG, ids=" ".join)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(tmp_path, overrides, monkeypatch):
    groups = ("mode=cut", next((o for o in overrides if o.startswith("pruner=")), "pruner=fisher"))
    cfg = configure(*groups, *(o for o in overrides if "." in o))
    if overrides == ("mode=cutting",):
        cfg.mode = "cutting"
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("it trained"))
    for check in (lambda: run(cfg, output_dir=tmp_path), lambda: rehearse(cfg, here=True)):
        with refused(*WRONG[overrides]):
            check()


@pytest.mark.slow
def test_a_network_that_guesses_is_not_cut(tmp_path):
    from safetensors.torch import save_file

    save_file(fresh().state_dict(), tmp_path / "random.safetensors")
    with refused("mode=cut", "10 classes", "model.weights"):
        go(tmp_path, *CUT, f"model.weights={tmp_path / 'random.safetensors'}")


@pytest.mark.slow
def test_a_sweep_of_budgets_from_the_command_line(tmp_path, weights):
    done = train(
        tmp_path,
        *("--multirun", *CUT, f"model.weights={weights}", "pruner.budget.macs=0.3,0.6", "tracking=none"),
        *("trainer.device=cpu", "hydra.sweep.dir=out"),
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / "out" / number / "result.json").read_text()) for number in "01"]
    assert results[0]["macs"] < results[1]["macs"] < results[1]["macs_dense"]
    assert [result["epochs"] for result in results] == [0, 0]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "macs=0.3" in report
    refused_job = train(tmp_path, "mode=cut", "tracking=none", "trainer.device=cpu", "hydra.run.dir=no", *WIDE)
    assert refused_job.returncode != 0
    assert "model.weights" in refused_job.stderr
