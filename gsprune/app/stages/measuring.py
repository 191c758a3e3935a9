"""The measuring stage: accuracy, size and speed of the dense and the pruned network."""

from __future__ import annotations

import math
import platform
from typing import Any

from torch import nn

from gsprune import latency
from gsprune.app.stages.checkpoint import Dense
from gsprune.app.stages.context import Context
from gsprune.app.stages.history import History, counts
from gsprune.app.stages.setup import Setup
from gsprune.cost import counting
from gsprune.export.runtimes import EAGER, Measure
from gsprune.forecast import predict


def measure(job: Context, setup: Setup, history: History, dense: Dense, pruner: Any) -> None:
    """Measure both networks, into the result. All processes evaluate their part; the first does the rest."""
    with job.watch.part("measure"):
        test, val = (setup.trainer.evaluate(setup.model, split) for split in (setup.data.test, setup.data.val))
        if not job.first:
            return
        budget = pruner.budget
        job.result |= {
            "accuracy": test["accuracy"],
            "loss": test["loss"],
            "val_accuracy": val["accuracy"],  # of the final network: that of the last epoch may be of an older one
            "val_samples": len(getattr(setup.data.val, "dataset", ())) or None,
            "sparsity": pruner.sparsity,
            "sparsity_of": counts(pruner),
            "layers": {name: [share.pruned, share.total] for name, share in pruner.shares().items()},
            "target_sparsity": pruner.target_sparsity,
            "budget": budget and {budget.kind: budget.share},
            "updates": pruner.updates,
            "epochs": setup.epochs,
            "baseline_epochs": setup.trainer.dense_epochs,
            "skipped_steps": int(sum(row.get("train/skipped_steps", 0) for row in history.rows)),
            "shrunk": pruner.plan is not None,
            "skipped": dict(pruner.skipped),
            "coverage": pruner.coverage,
            "collapsed": predict.collapsed(getattr(pruner, "targets", ())),
            "at_chance": _at_chance(setup, val["accuracy"], dense=job.result["baseline_val_accuracy"]),
            "params_nonzero": sum(int(p.count_nonzero()) for p in setup.model.parameters()),
        }
        for suffix, model in (("", setup.model), ("_dense", dense.model)):
            job.result[f"params{suffix}"] = counting.count_parameters(model)
            job.result[f"macs{suffix}"] = counting.count_macs(model, setup.example)
            job.result[f"file_bytes{suffix}"] = counting.file_bytes(model)
        if setup.trainer.latency_repeats:
            job.result |= _latency(job, setup, dense.model, pruner)


def _at_chance(setup: Setup, accuracy: float, *, dense: float) -> dict[str, Any] | None:
    """What to say where the final network does not beat guessing on the validation split; None where it does."""
    samples = len(getattr(setup.data.val, "dataset", ()))
    lost, never = (is_guessing(value, samples=samples, classes=setup.classes) for value in (accuracy, dense))
    return {"accuracy": accuracy, "classes": setup.classes, "dense": never} if lost else None


def is_guessing(accuracy: float, *, samples: int, classes: int) -> bool:
    """Whether an accuracy is no better than guessing: at most two standard errors above 1 / classes.

    Of n samples and c classes that is 1/c + 2 * sqrt(1/c * (1 - 1/c) / n).

    >>> [is_guessing(a, samples=100, classes=10) for a in (0.1, 0.16, 0.17)], is_guessing(0.5, samples=0, classes=1)
    ([True, True, False], False)
    """
    if samples < 1 or classes < 2:
        return False
    chance = 1 / classes
    return accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / samples) + 1e-12


def _latency(job: Context, setup: Setup, dense: nn.Module, pruner: Any) -> dict[str, Any]:
    """In turns with the dense network; in a sweep once for all networks of an architecture."""
    trainer, pair = setup.trainer, (dense.to(setup.trainer.torch_device), setup.model)
    timed = [p.budget.measure for p in getattr(pruner, "parts", ()) if p.budget and p.budget.kind == "latency"]
    measure = Measure(trainer.latency_runtime) if trainer.latency_runtime else next(iter(timed), EAGER)
    settings: dict[str, Any] = {"repeats": trainer.latency_repeats, "max_seconds": trainer.latency_seconds}
    settings["prepare"] = None if measure.runtime == "eager" else measure.prepared
    example = measure.inputs(setup.latency_example)
    with measure.running():
        if job.sweep is None:
            found = latency.compare(*pair, example, **settings)
        else:
            with job.sweep.lock(f"latency {platform.node()}").held(waiting_for="that measures latency"):
                folder = job.sweep.directory / ".gsprune" / "latency"
                found = latency.shared(folder, *pair, example, where=str(measure), **settings)
    return {
        "latency_in": measure.runtime,
        **{"latency_ms": found.ms, "latency_dense_ms": found.dense_ms, "latency_note": found.note},
        **{"speedup": found.speedup, "speedup_low": found.low, "speedup_high": found.high},
    }
