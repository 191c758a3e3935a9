"""Jobs that end early, at a step of one's choice, and what they leave."""

from __future__ import annotations

import json

from jobs import finished

from gsprune.training.checkpoints import Checkpoints
from gsprune.training.trainer import Trainer

WEIGHTED = ("pruner=weighted", "trainer.latency_repeats=0")


def go(folder, *overrides):
    return finished(folder, *WEIGHTED, *overrides)


class AtStep:
    """Does something at the n-th optimizer step of a job; a job has 15 here, 5 in each of 3 epochs."""

    def __init__(self, monkeypatch):
        self.count, self.plan, self.place = 0, {}, None
        fit = Trainer.fit

        def counted(trainer, *args, pruner, on_rest, **settings):
            def rest(at):
                before, self.place = self.place, (pruner, at.epoch, at.step)
                if at.step and self.place != before:  # a rest while it validates is at the same place
                    self.count += 1
                    self.plan.get(self.count, lambda: None)()
                on_rest(at)

            fit(trainer, *args, pruner=pruner, on_rest=rest, **settings)

        monkeypatch.setattr(Trainer, "fit", counted)

    def do(self, number, action):
        self.count, self.plan, self.place = 0, {number: action}, None


class Crash(Exception):
    """Whatever may end a run."""


def crash():
    raise Crash("gone")


def names(folder):
    return [path.name for path in Checkpoints(folder / "checkpoint").paths()]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())
