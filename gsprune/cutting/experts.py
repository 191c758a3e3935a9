"""Whole experts of mixtures go, with the router's rows: scored by what the network would feel, cut, proven."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from gsprune.cutting.calibration import Calibration, Loss
from gsprune.cutting.cut import Cut, check_model, shown
from gsprune.cutting.progress import Report
from gsprune.cutting.scoring import sharing_copy
from gsprune.cutting.size import size_of
from gsprune.discovery.experts import Experts, check_experts, closed, find_experts, first_of, plan_experts
from gsprune.structures.attention import no_fast_path
from gsprune.structures.running import device_of, evaluating, hooked, same_randomness, to_device_of
from gsprune.structures.twin import copy_of, every_tensor
from gsprune.surgery.apply import apply_cut, home_of
from gsprune.text.display import percent
from gsprune.text.names import check_patterns, choose

ROUNDS = 4  # in which experts are chosen: two that replace one another are not both taken for needless


def cut_experts(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    sparsity: float,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    calibration: int = 512,
    example_input: Any = None,
    progress: bool | Report = True,
) -> Cut:
    """Remove whole experts of every mixture of a trained network, the router's rows with them. No training.

    The score of expert e is what the outputs z of the network feel if no token is given to it,

        s_e = mean over samples b of (sum over tokens of dl_b/dy * (y_e - y))^2,    l_b = r_b . z_b,

    with y the layer's output, y_e that with the router's logit of e at minus infinity (its tokens go to the next best
    expert), and random signs r_b, so that no label is read; of a network without outputs a sample, l is the loss. The
    experts with the lowest scores go, in `ROUNDS` rounds, each scored anew without those that are gone.

    Each layer keeps as many, so that where all layers have as many experts the configuration of a network of
    transformers says so, and its own `save_pretrained` writes files that its `from_pretrained` reads. Tokens are still
    given to as many experts each: parameters go, multiply-accumulates stay. What is left is a network like any other
    for `gsprune.cut`; `second.plan.after(first.plan)` is the plan of both.

    Args:
        model: not changed.
        batches, loss, calibration, example_input, progress: as of `gsprune.cut`.
        sparsity: share of the experts removed from every layer, in (0, 1).
        include, exclude: `*` patterns for the names of what holds a layer's experts.

    Returns:
        As of `gsprune.cut`; a layer whose experts cannot be removed is in `skipped`.

    Raises:
        ValueError: a setting out of its range; there is no mixture of experts, or none that can be cut; a layer would
            keep fewer experts than it gives a token to.

    Source: Lu et al., "Not all experts are equal", 2024, for removal with the router's rows; Theis et al., "Faster gaze
    prediction with dense networks and Fisher pruning", 2018, for the score.

    Example:
        >>> class Mixture(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router = nn.Linear(4, 3)
        ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x):
        ...         best = self.router(x).argmax(-1)
        ...         return torch.stack([self.experts[int(i)](row) for row, i in zip(x, best)])
        >>> net = nn.Sequential(Mixture(), nn.Linear(4, 2))
        >>> cut = cut_experts(net, [torch.randn(32, 4)], sparsity=0.5)
        >>> cut.model[0].router, len(cut.model[0].experts)
        (Linear(in_features=4, out_features=1, bias=True), 1)
    """
    check_model(model)
    check_patterns(include, exclude)
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 < sparsity < 1:
        raise ValueError(f"sparsity is {sparsity!r}: it is the share of experts to remove, above 0 and below 1")
    since = time.perf_counter()
    data = Calibration(batches, loss, samples=calibration)
    if loss is not None:
        data.check_loss()
    example = to_device_of(model, data.example_for(model) if example_input is None else example_input)
    with shown(progress) as report:
        report("finding experts", 0.0)
        every = _found(model, example)
        found = _chosen(every, include, exclude)
        skipped = {layer.structure.name: _ALL for layer in found if layer.least == layer.structure.units}
        skipped |= {layer.structure.name: _NOT_CALLED for layer in found if not layer.is_called}
        layers = [layer for layer in found if layer.structure.name not in skipped]
        counts = {layer.structure.name: _left(layer, float(sparsity)) for layer in layers}
        layers, broken, proof = _proven(model, layers, counts, example)
        skipped |= broken
        if not layers:
            name, why = next(iter(skipped.items()))
            raise ValueError(f"no experts can be removed: those of {name!r}, {why}")
        if proof:
            warnings.warn(f"{type(model).__name__}: {proof}", stacklevel=2)
        dense = size_of(model, data, data.dense_loss)
        keeps, scores = _ranked(model, layers, counts, data, report)
        report("cutting", 0.0)
        problem, _ = check_experts(model, layers, keeps, example)
        if problem is not None:
            raise ValueError(f"the experts that score lowest cannot be removed: {problem}")
        plan = plan_experts(model, layers, keeps, are_all=len(layers) == len(every))
        small = copy_of(model)
        apply_cut(small, plan)
        small.eval()
    return Cut(
        model=small,
        plan=plan,
        keeps=keeps,
        structures=[layer.structure for layer in layers],
        skipped=skipped,
        dense=dense,
        small=size_of(small, data, data.mean_loss),
        criterion="Fisher",
        repaired=None,
        samples=data.size,
        scored=data.size,
        settled=None,
        seconds=time.perf_counter() - since,
        scores=scores,
        proof=proof,
    )


_ALL = "each token is given to all of them"
_NOT_CALLED = "what holds them is not called as a module, or gives no tensor, so that they cannot be scored"


def _found(model: nn.Module, example: Any) -> list[Experts]:
    found = find_experts(model, example)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no mixture of experts: no matrix chooses among as many modules or tensors as "
            "it has rows"
        )
    return found


def _chosen(found: Sequence[Experts], include: Sequence[str], exclude: Sequence[str]) -> list[Experts]:
    layers = {layer.structure.name: layer for layer in found}
    chosen = choose({name: (name,) for name in layers}, tuple(include), tuple(exclude), skipped={})
    return [layer for name, layer in layers.items() if name in chosen]


def _left(layer: Experts, sparsity: float) -> int:
    """How many experts of each group stay."""
    units, groups = layer.structure.units // layer.groups, layer.groups
    left = units - round(sparsity * units)
    if left * groups < layer.least:
        raise ValueError(
            f"sparsity={sparsity:g} leaves {left * groups} of the {layer.structure.units} experts of "
            f"{layer.structure.name!r}, which needs {layer.least}: at most "
            f"{percent(1 - layer.least / layer.structure.units)} can go"
        )
    if left == units:
        raise ValueError(
            f"sparsity={sparsity:g} removes none of the {layer.structure.units} experts of {layer.structure.name!r}"
        )
    return left


def _proven(
    model: nn.Module, layers: Sequence[Experts], counts: Mapping[str, int], example: Any
) -> tuple[list[Experts], dict[str, str], str]:
    """The layers that can lose so many experts, why the others cannot, and what the proof shows where that is less."""
    generator = torch.Generator().manual_seed(0)

    def drawn(layer: Experts) -> Tensor:
        return _best(torch.rand(layer.structure.units, generator=generator), counts[layer.structure.name], layer.groups)

    keeps = {layer.structure.name: drawn(layer) for layer in layers}
    problem, proof = check_experts(model, layers, keeps, example) if layers else (None, "")
    if problem is None:
        return [*layers], {}, proof
    problems = {layer.structure.name: check_experts(model, [layer], keeps, example)[0] for layer in layers}
    broken = {name: problem for name, problem in problems.items() if problem is not None}
    return [layer for layer in layers if layer.structure.name not in broken], broken, proof


def _best(scores: Tensor, left: int, groups: int) -> Tensor:
    """So many with the highest scores of each group, bool (experts,)."""
    table = scores.reshape(groups, -1)
    keep = torch.zeros_like(table, dtype=torch.bool)
    return keep.scatter(1, table.topk(left, dim=1).indices, True).flatten()


def _ranked(
    model: nn.Module, layers: Sequence[Experts], counts: Mapping[str, int], data: Calibration, report: Report
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which experts stay, and what they were ranked by last."""
    felt = data.of_outputs(model)
    if felt is None:
        felt = data if data.labelled and data.has_loss else data.drawn_from(model)
    twin = sharing_copy(model, requires_grad=False)
    for name in (name for layer in layers for name in layer.biases):  # which are written into
        home, leaf = home_of(twin, name)
        own = getattr(home, leaf).detach().clone()
        setattr(home, leaf, nn.Parameter(own, False) if leaf in home._parameters else own)
    keeps = {layer.structure.name: torch.ones(layer.structure.units, dtype=torch.bool) for layer in layers}
    scores: dict[str, Tensor] = {}
    sizes = {layer.structure.name: layer.structure.units // layer.groups for layer in layers}
    rounds = [
        {name: units - round(number / ROUNDS * (units - counts[name])) for name, units in sizes.items()}
        for number in range(ROUNDS + 1)
    ]
    rounds = [after for before, after in pairwise(rounds) if after != before]  # of few experts some rounds take none
    for number, left in enumerate(rounds):
        found = _scores(twin, layers, keeps, felt, lambda share, n=number: report("scoring", (n + share) / len(rounds)))
        for layer in layers:
            name = layer.structure.name
            if not found[name].isfinite().all():
                raise ValueError(f"a score of {name!r} is not finite: the loss or its gradient is not")
            ranked = found[name].masked_fill(~keeps[name], -torch.inf)
            scores[name] = torch.where(keeps[name], found[name], scores.get(name, found[name]))
            keeps[name] = _best(ranked, left[name], layer.groups)
    return keeps, scores


def _scores(
    twin: nn.Module, layers: Sequence[Experts], keeps: Mapping[str, Tensor], data: Calibration, report: Any
) -> dict[str, Tensor]:
    """Layer -> what the outputs feel of each of its experts' removal, (experts,), where some are gone already."""
    device, tensors = device_of(twin), every_tensor(twin)
    total = {layer.structure.name: torch.zeros(layer.structure.units, device=device) for layer in layers}
    alone = {layer.structure.name: [layer] for layer in layers}
    gone = {name: ~keep for name, keep in keeps.items()}
    done = 0
    with evaluating([twin]), no_fast_path(), same_randomness(twin):
        for batch in data.batches:
            calls: list[_Call] = []
            with torch.enable_grad(), _watched(twin, layers, calls), closed(tensors, layers, gone):
                value = data.loss(twin, batch.to(device))
                slopes = torch.autograd.grad(value, [seen.output for seen in calls], allow_unused=True)
            with torch.no_grad():
                for seen, slope in zip(calls, slopes, strict=True):
                    name = seen.name
                    if slope is None:
                        continue
                    for expert in keeps[name].nonzero().flatten().tolist():
                        without = {name: gone[name].clone().index_fill_(0, torch.tensor(expert), True)}
                        with closed(tensors, alone[name], without):
                            changed = seen.again() - seen.output.detach()
                        samples = batch.size if changed.shape[0] % batch.size == 0 else 1
                        felt = (slope * changed).float().reshape(samples, -1).sum(1) * batch.size
                        total[name][expert] += felt.square().sum() * batch.size / samples
            done += batch.size
            report(done / data.size)
    return {name: value.cpu() / data.size for name, value in total.items()}


class _Call:
    """A call of a layer: what it was given, and its first output."""

    def __init__(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        self.name, self.module, self.args, self.kwargs, self.output = name, module, args, kwargs, output

    def again(self) -> Tensor:
        answer: Tensor = first_of(self.module.forward(*self.args, **self.kwargs))
        return answer


@contextmanager
def _watched(twin: nn.Module, layers: Sequence[Experts], calls: list[_Call]) -> Iterator[None]:
    """Inside the block every call of a layer is noted; its output has a gradient."""

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        first = first_of(output)
        if not first.requires_grad:
            first = first.detach().requires_grad_()
            output = (first, *output[1:]) if isinstance(output, tuple) else first
        calls.append(_Call(name, module, args, kwargs, first))
        return output

    hooks = (
        twin.get_submodule(layer.layer).register_forward_hook(
            lambda m, a, k, o, name=layer.structure.name: note(name, m, a, k, o), with_kwargs=True
        )
        for layer in layers
    )
    with hooked(hooks):
        yield
