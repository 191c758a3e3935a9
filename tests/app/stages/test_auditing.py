"""`audit=true`: the dense network's units are removed one by one, and nothing else of the job changes."""

from __future__ import annotations

import json

import pytest
import torch
from facts import refused
from jobs import configure, finished
from safetensors.torch import load_file

from gsprune.app.configuration import build
from gsprune.app.job import rehearse
from gsprune.app.stages import auditing
from gsprune.app.stages.auditing import audited_rules, is_audited
from gsprune.app.stages.cutting import cross_entropy
from gsprune.criteria import Abs, Magnitude, Random
from gsprune.cutting.audit import audit
from gsprune.settings.identity import dense_key
from gsprune.tracking.tracker import read_metrics
from gsprune.training.trainer import seed_everything

FAST = ("trainer.latency_repeats=0", "trainer.prune_epochs=1", "cut.calibration=40", "model.width=4")


@pytest.mark.slow
def test_the_rows_are_those_of_the_library_on_the_dense_network_and_the_job_is_as_without(tmp_path, monkeypatch):
    cfg = ("pruner=abs", "audit=true", *FAST)
    result = finished(tmp_path / "with", *cfg)
    without = finished(tmp_path / "without", "pruner=abs", *FAST)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert (result["accuracy"], without.get("audit")) == (without["accuracy"], None)
    node = configure(*cfg)
    seed_everything(node.seed)
    data, model = build(node.dataset), build({k: v for k, v in node.model.items() if k != "weights"})
    model.load_state_dict(load_file(tmp_path / "with" / "checkpoint" / "dense.safetensors"))
    seed_everything(node.seed + 2)
    data.train.generator.manual_seed(node.seed + 2)
    criteria = [Abs(), Magnitude(), Random()]
    found = audit(model, data.train, cross_entropy, criteria=criteria, calibration=40, progress=False)
    told = json.loads((tmp_path / "with" / "result.json").read_text())["audit"]
    assert told["rows"] == json.loads(json.dumps(found.to_json()["rows"]))
    assert (told["units"], told["scored"], told["measured"]) == (len(found.removals), 20, 20)
    (*_, row) = read_metrics(tmp_path / "with" / "metrics.jsonl")
    assert row["audit/Abs/channels"] == pytest.approx(told["rows"][0]["size"][0])
    assert (tmp_path / "with" / "figures" / "audit.png").read_bytes().startswith(b"\x89PNG")

    # what is on disk is not measured again, by a job that was killed after it
    record = json.loads((tmp_path / "with" / "result.json").read_text())
    (tmp_path / "with" / "result.json").write_text(json.dumps(record | {"status": "running"}))
    monkeypatch.setattr(auditing, "audit", None)
    assert finished(tmp_path / "with", *cfg)["audit"] == result["audit"]


@pytest.mark.slow
def test_a_job_that_cuts_audits_the_network_before_the_cut(tmp_path):
    dense = ("trainer.dense_epochs=3", "trainer.prune_epochs=0", "dataset.batch_size=64")
    cfg = ("mode=cut", "pruner=fisher", "pruner.budget.macs=0.5", "audit=true", *FAST, *dense)
    told = finished(tmp_path, *cfg)["audit"]
    assert [(row["criterion"], row["kind"]) for row in told["rows"]] == [
        (name, "channels") for name in ("Fisher", "Magnitude", "Random")
    ]
    assert told["units"] > 8  # of the dense network: half of them are cut


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (("pruner=elementwise",), ("audit=true", "pruner=abs")),
        (("mode=cut", "pruner=magnitude", "trainer.dense_epochs=1"), ("audit=true", "units")),
        (("pruner=abs", "cut.calibration=1"), ("cut.calibration=1", "2")),
        (("pruner=abs", "audit=7"), ("audit=7", "true or false")),
    ],
)
def test_what_cannot_be_audited_is_refused_before_training(overrides, facts):
    with refused(*facts):
        rehearse(configure("audit=true", *FAST, *overrides), here=True)


def test_a_loss_that_is_not_finite_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(auditing, "cross_entropy", lambda outputs, labels: outputs.sum() * float("nan"))
    with refused("audit=true", "nan"):
        rehearse(configure("audit=true", "pruner=abs", *FAST), here=True)


def test_the_control_has_nothing_to_audit_and_several_rules_are_audited_once():
    assert not is_audited(configure("pruner=none", "audit=true"))
    assert is_audited(configure("pruner=abs", "audit=true"))
    cfg = configure("mode=cut", "pruner=heads_and_neurons", "audit=true")
    rules = audited_rules(cfg, None)
    assert [type(c).__name__ for c in auditing._criteria(rules)] == ["Abs", "Weighted", "Magnitude", "Random"]
    assert auditing._names(rules) == {"kinds": ["heads", "neurons"]}


def test_jobs_with_and_without_an_audit_share_a_dense_network():
    cfgs = [configure("pruner=abs", *more) for more in ((), ("audit=true",))]
    assert dense_key(cfgs[0], torch="2") == dense_key(cfgs[1], torch="2")
