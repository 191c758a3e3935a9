"""A phase of training: the trainer's loop, with the metrics, masks and checkpoints that come of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gsprune import collectives
from gsprune.app.cut_settings import is_cut
from gsprune.app.stages.checkpoint import JobCheckpoints, Phase
from gsprune.app.stages.context import Context
from gsprune.app.stages.history import History, counts
from gsprune.app.stages.setup import Setup
from gsprune.training.loop_state import LoopState
from gsprune.training.signals import Interrupted


def _label(job: Context, phase: Phase) -> str:
    """What the screen calls a phase: a control prunes nothing, and a network that was cut recovers."""
    if phase.name == "dense":
        return phase.name
    return "recover" if is_cut(job.cfg) else "prune" if phase.pruner.parts else "train"


@dataclass
class Training:
    """Trains the phases of a job, from the beginning or from where its checkpoint is."""

    job: Context
    setup: Setup
    history: History
    checkpoints: JobCheckpoints

    def run(self, phase: Phase) -> None:
        """Train to the end of the phase; a phase whose last checkpoint is there makes no step.

        Raises:
            Interrupted: a signal has come; a checkpoint is written.
        """
        job, setup = self.job, self.setup
        start = self.checkpoints.restore(phase) if self.checkpoints.resumes(phase.name) else None
        steps = setup.steps_per_epoch
        done = start["epoch"] * steps + start["step"] if start else 0
        at = {"done": done, "before": phase.offset}
        job.progress.phase(
            _label(job, phase), epochs=phase.epochs, steps_per_epoch=steps, of=counts(phase.pruner), **at
        )
        self._written_at = time.monotonic()
        with job.watch.part("train"), job.stop.deferred():
            setup.trainer.fit(
                setup.model,
                setup.data.train,
                setup.data.val,
                optimizer=phase.optimizer,
                lr_schedule=phase.lr_schedule,
                pruner=phase.pruner,
                epochs=phase.epochs,
                teacher=phase.teacher,
                on_epoch=lambda epoch, values: self.history.record_epoch(
                    epoch + phase.offset + 1, values, phase.pruner
                ),
                on_step=job.progress.on_step,
                on_rest=lambda at: self._rest(phase, at),
                on_redraw=self._end_if_asked,
                start=start,
            )

    def _rest(self, phase: Phase, at: LoopState) -> None:
        """Between two steps: write a checkpoint if it is due, and end here if a signal asks for it.

        All processes do what one of them wants.
        """
        minutes = self.setup.trainer.checkpoint_minutes
        is_due = minutes is not None and time.monotonic() - self._written_at >= 60 * minutes
        signum, due = divmod(collectives.agreed(2 * self.job.stop.signum + is_due), 2)
        if at.step and not due and not signum:
            return
        with self.job.watch.part("files"):
            self.checkpoints.write(phase, at)
        self._written_at = time.monotonic()
        if signum:
            raise Interrupted(signum)

    def _end_if_asked(self) -> None:
        """Where nothing has changed since the last checkpoint."""
        if signum := collectives.agreed(self.job.stop.signum):
            raise Interrupted(signum)
