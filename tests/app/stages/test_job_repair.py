"""`cut.repair` in jobs that prune while they train: the pruner repairs after each mask update, on the job's samples."""

from __future__ import annotations

import pytest
import torch
from facts import refused
from jobs import configure, finished
from kills import differences
from safetensors.torch import load_file

from gsprune.app.job import run
from gsprune.pruner.repairing import Repairs
from gsprune.training.trainer import Trainer

JOB = ("pruner=weighted", "model.width=8", "dataset.batch_size=64", "trainer.latency_repeats=0", "cut.calibration=128")
REPAIR = "cut.repair=least_squares"


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("shrink", ["at_end", "each_update"])
def test_every_update_is_repaired_and_a_killed_run_resumes_with_the_same_bits(tmp_path, monkeypatch, shrink):
    settings = (*JOB, f"pruner.shrink={shrink}", "trainer.checkpoint_minutes=0")
    finished(tmp_path / "without", *settings)
    reports, mend, fit = [], Repairs.mend, Trainer.fit

    def seen(self, *given, **settings):
        mend(self, *given, **settings)
        reports.append(self.report)

    def killed(self, *args, on_rest, **settings):
        def rest(at):
            on_rest(at)
            if settings["epochs"] == 2 and (at.epoch, at.step) == (0, 15):
                raise KeyboardInterrupt

        fit(self, *args, on_rest=rest, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Repairs, "mend", seen)
        whole = finished(tmp_path / "whole", *settings, REPAIR)
    assert len(reports) == whole["updates"] > 2
    assert any(layer.after < layer.before for report in reports for layer in report.repaired)
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "without")
    assert any(ours[name].shape != theirs[name].shape or not torch.equal(ours[name], theirs[name]) for name in ours)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            finished(tmp_path / "killed", *settings, REPAIR)
    finished(tmp_path / "killed", *settings, REPAIR)
    assert list(differences(tmp_path / "whole", tmp_path / "killed")) == []


@pytest.mark.slow
def test_the_control_takes_the_setting_and_is_not_repaired(tmp_path):
    control = ("pruner=none", "trainer.latency_repeats=0")
    finished(tmp_path / "with", *control, REPAIR)
    finished(tmp_path / "without", *control)
    ours, theirs = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


WRONG = {
    ("pruner=elementwise", REPAIR): ("repair", "units"),
    ("pruner=units_and_weights", REPAIR): ("repair", "units"),
    ("cut.repair=magic",): ("cut.repair=magic", "least_squares, batchnorm"),
    ("cut.max_drop=1",): ("cut.max_drop=1", "mode=cut"),
    ("cut.curve=[0.5]",): ("cut.curve=[0.5]", "mode=cut"),
}


@pytest.mark.parametrize("overrides", WRONG, ids=" ".join)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(tmp_path, overrides, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("it trained"))
    with refused(*WRONG[overrides]):
        run(configure(*overrides), output_dir=tmp_path)
