"""What a job says before its first epoch: device, data, network, what will be pruned, what is left whole and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gsprune.app.configuration import hydra_choices
from gsprune.app.cut_settings import is_cut, settings_of
from gsprune.cost.counting import count_macs, count_parameters
from gsprune.forecast import predict
from gsprune.forecast.show import headline
from gsprune.structures.example import shape_text
from gsprune.text.names import lines_by_reason
from gsprune.text.table import noun

if TYPE_CHECKING:
    import torch

    from gsprune.app.stages.setup import Setup
    from gsprune.training.trainer import Trainer

REASONS = 3  # lines about what is left whole


def facts(setup: Setup, pruner: Any) -> Iterator[tuple[str, str]]:
    """Pairs of a name and a text.

    Args:
        pruner: as the job will make it, on the dense network.
    """
    choices = hydra_choices()["choices"]
    yield "device", _device(setup.trainer)
    yield "data", f"{choices.get('dataset', type(setup.data).__name__)}: {_data(setup)}"
    macs = count_macs(setup.model, setup.example)
    shape = shape_text(setup.example)
    name = choices.get("model", type(setup.model).__name__)
    counted = f"{macs:,} MACs for an input of {shape}" if macs else f"MACs not counted for an input of {shape}"
    yield "network", f"{name}: {count_parameters(setup.model):,} parameters, {counted}"
    yield from _pruning(setup, pruner, choices.get("pruner"))
    yield "epochs", _epochs(setup, control=not pruner.parts)


def _device(trainer: Trainer) -> str:
    device = trainer.torch_device
    several = f", {noun(count, 'process', 'processes')}" if (count := trainer.devices * trainer.nodes) > 1 else ""
    return f"{device}{_hardware(device)}, {trainer.precision}{several}"


def _hardware(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return f" ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f" ({noun(torch.get_num_threads(), 'thread')} of {noun(os.cpu_count() or 1, 'core')})"
    return ""


def _data(setup: Setup) -> str:
    sizes = []
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        loader = getattr(setup.data, split)
        samples = getattr(loader, "dataset", None)
        count = f"{len(samples):,}" if samples is not None else noun(len(loader), "batch", "batches")
        sizes.append(f"{count} {name}")
    batch = setup.cfg.dataset.get("batch_size")
    batches = f", in batches of {batch}" if batch else ""
    return f"{', '.join(sizes)} samples{batches}; {setup.classes} classes"


def _pruning(setup: Setup, pruner: Any, choice: str | None) -> Iterator[tuple[str, str]]:
    if not pruner.parts:
        yield "pruning", "none: the control, which trains as long as a pruned network does"
        return
    what = "cutting" if is_cut(setup.cfg) else "pruning"
    if (drop := settings_of(setup.cfg).max_drop) is not None:
        yield what, f"{choice or pruner.criterion_name}: the largest cut that loses at most {drop:g} points"
        return
    try:
        planned = predict.plan(setup.model, pruner, setup.example)
    except ValueError as error:  # the job itself will say whether that matters
        yield what, f"not foretold: {error}"
        return
    left = dict[str, str]()
    for rule in planned.rules:
        yield what, " ".join(headline(rule))
        what = ""
        left |= rule.skipped
    lines = lines_by_reason(left)
    for number, line in enumerate(lines[:REASONS]):
        yield "" if number else "left whole", line
    if len(lines) > REASONS:
        yield "", f"and more for {noun(len(lines) - REASONS, 'other reason')}: plan=true lists them"


def _epochs(setup: Setup, *, control: bool) -> str:
    dense, after = setup.trainer.dense_epochs, setup.trainer.prune_epochs
    then = "of recovery" if is_cut(setup.cfg) else "more, without pruning" if control else "in which it is pruned"
    counted = [f"{dense} dense" if dense else "", f"{after} {then}" if after else ""]
    told = ", then ".join(filter(None, counted)) or "none: nothing is trained"
    return f"{told}; {noun(setup.steps_per_epoch, 'step')} each" if dense or after else told
