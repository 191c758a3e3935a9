"""The Hugging Face Hub: `class Net(nn.Module, PrunedHubMixin)` saves, pushes and loads what was pruned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gsprune.cost.counting import count_parameters
from gsprune.extras import need
from gsprune.files.disk import read_object
from gsprune.formats.network import RECORD, WEIGHTS, load_pruned, read_cut_plan, save_pruned
from gsprune.surgery.cut_plan import CutPlan
from gsprune.text.display import label

__all__ = ["PrunedHubMixin", "Pruning"]

LINES = 40  # tensors that a card lists

if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin
else:
    PyTorchModelHubMixin = need("huggingface_hub").PyTorchModelHubMixin


@dataclass(frozen=True)
class Pruning:
    """What was pruned, for the files and the card.

    Attributes:
        plan: what stays of the dense network (`Pruner.plan`, `Cut.plan`); None if only single weights are pruned.
        numbers: name -> (of the dense network, of the pruned one), such as {"accuracy": (0.951, 0.947)}.
        command: that pruned it.
    """

    plan: CutPlan | None
    numbers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    command: str = ""


class PrunedHubMixin(PyTorchModelHubMixin):
    """`huggingface_hub.PyTorchModelHubMixin` for networks that are pruned after they were built.

    Set `net.pruning = Pruning(plan, numbers, command)` once it is pruned. `save_pretrained` and `push_to_hub` write the
    files of `gsprune.save_pruned`, the constructor's arguments and a card that says what was cut, what that costs and
    how it was made; `from_pretrained` builds the dense network, cuts it to size and loads the weights. A network
    without `pruning` is saved and loaded as by `PyTorchModelHubMixin`.

    Raises:
        ValueError: by `from_pretrained`, where the files do not fit each other or the class.

    Example:
        >>> import tempfile, torch, gsprune
        >>> class Net(nn.Sequential, PrunedHubMixin):
        ...     def __init__(self, width: int = 8):
        ...         super().__init__(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        >>> net = Net(width=6)
        >>> cut = gsprune.cut(net, [torch.randn(8, 4)], sparsity=0.5, progress=False)
        >>> cut.model.pruning = Pruning(cut.plan, {"accuracy": (0.9, 0.8)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cut.model.save_pretrained(folder)
        ...     Net.from_pretrained(folder)[0]
        Linear(in_features=4, out_features=3, bias=True)
    """

    pruning: Pruning | None = None

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / RECORD).unlink(missing_ok=True)
        if self.pruning is None:
            super()._save_pretrained(save_directory)
            return
        told = {"numbers": {name: list(pair) for name, pair in self.pruning.numbers.items()}}
        network: Any = self
        save_pruned(save_directory, network, self.pruning.plan, extra={**told, "command": self.pruning.command})

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | os.PathLike[str] | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        where: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "token": token,
        }
        if os.path.isdir(model_id):
            folder = Path(model_id)
        else:
            fetch = need("huggingface_hub").snapshot_download
            files = {"allow_patterns": [RECORD, WEIGHTS], "local_files_only": local_files_only}
            folder = Path(fetch(model_id, **files, **where))
        if not (folder / RECORD).is_file():
            more: dict[str, Any] = {
                "local_files_only": local_files_only,
                "map_location": map_location,
                "strict": strict,
            }
            return super()._from_pretrained(model_id=model_id, **where, **more, **model_kwargs)
        dense: Any = cls(**model_kwargs)
        model: Any = load_pruned(folder, dense).to(map_location)
        model.pruning = _noted(folder)
        return model

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        card = super().generate_model_card(*args, **kwargs)
        if self.pruning is None:
            return card
        network: Any = self
        return need("huggingface_hub").ModelCard(f"{card.content.rstrip()}\n\n{describe(network, self.pruning)}")


def describe(model: nn.Module, pruning: Pruning) -> str:
    """The part of a model card about pruning, as Markdown."""
    now, before = count_parameters(model), dense_parameters(model, pruning.plan)
    nonzero = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
    rows = [("parameters", f"{before:,}", f"{now:,}")]
    rows += [("not zero", "", f"{nonzero:,}")] if nonzero < now else []
    rows += [(label(name, 80), f"{dense:g}", f"{pruned:g}") for name, (dense, pruned) in pruning.numbers.items()]
    lines = ["## Pruning", "", "| | dense | pruned |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    kept = {} if pruning.plan is None else pruning.plan.kept
    cuts = [(name, dim, pruning.plan.sizes[name][dim], len(k)) for name in kept for dim, k in kept[name].items()]  # type: ignore[union-attr]
    if cuts:
        lines += ["", "What was cut:", ""]
        lines += [f"- `{name}`, dimension {dim}: {left} of {size} stay" for name, dim, size, left in cuts[:LINES]]
        lines += [f"- and {len(cuts) - LINES} more, in `{RECORD}`"] if len(cuts) > LINES else []
    if pruning.command:
        lines += ["", "Pruned by:", "", *(f"    {line}" for line in pruning.command.splitlines())]
    lines += ["", f"`{type(model).__name__}.from_pretrained` loads it, and needs gsprune."]
    return "\n".join(lines) + "\n"


def dense_parameters(model: nn.Module, plan: CutPlan | None) -> int:
    """Parameters of the dense network, by what the plan says of those that are left.

    >>> dense_parameters(nn.Linear(2, 3), None)
    9
    """
    kept, sizes = ({}, {}) if plan is None else (plan.kept, plan.sizes)
    total = 0
    for name, parameter in model.named_parameters():
        cuts = kept.get(name, {})
        shape = [sizes[name][dim] if dim in cuts else length for dim, length in enumerate(parameter.shape)]
        total += prod(shape)
    return total


def _noted(folder: Path) -> Pruning:
    """What `pruning.json` says, as far as it is what this module wrote."""
    extra = read_object(folder / RECORD).get("extra")
    extra = extra if isinstance(extra, dict) else {}
    numbers = extra.get("numbers")
    pairs = {
        str(name): (float(pair[0]), float(pair[1]))
        for name, pair in (numbers.items() if isinstance(numbers, dict) else ())
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(number, int | float) for number in pair)
    }
    command = extra.get("command")
    return Pruning(read_cut_plan(folder), pairs, command if isinstance(command, str) else "")
