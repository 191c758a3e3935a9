"""Rivals of `gsprune.cut`: other rules to choose units and to make up for those that are gone.

All of them remove units of the same structures, down to the same MACs by the same counter, from the same calibration
batches; no structure keeps less than `FLOOR` of its units. What differs is the score, what is ranked together, and
what is done afterwards:

- torch-pruning's importances: its own objects, groups and reductions (`GroupMagnitudeImportance`,
  `GroupTaylorImportance`, `GroupHessianImportance`), one shot, global and isomorphic, with and without re-estimated
  BatchNorm statistics. Its Hessian importance keeps the last gradient only (its sums are looked up by name and stored
  by tensor); here the sums are as its documentation says.
- FLAP: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023.
- Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", 2022.
- magnitude (each structure by itself) and random.

Legend: n = rows (samples x positions), i = inputs of a layer, o = its outputs, u = units.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from cut_tasks import Batch, Task, call
from torch import Tensor, nn

from gsprune import find_structures
from gsprune.cost.costs import make_cost
from gsprune.cost.counting import count_macs
from gsprune.cutting.calibration import Calibration
from gsprune.cutting.scoring import gate_gradients
from gsprune.structures.structure import Structure
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import plan_cut

FLOOR = 0.1  # of a structure's units stay (torch-pruning's max_pruning_ratio 0.9)
ROWS = 2048  # positions of a batch, for least squares over masks
Scores = Mapping[str, Tensor]  # structure name -> (units,)


class Bench:
    """A task, its structures and what they cost; everything that calibration data has no part in is done once."""

    def __init__(self, task: Task) -> None:
        self.task, self.model = task, task.model
        found = find_structures(task.model, task.example, include=task.include).structures
        self.structures = [s for s in found if s.kind != "residual"]  # which a rule has to ask for
        self.cost = make_cost("macs", task.model, self.structures, task.example)
        self.macs = count_macs(task.model, task.example)
        self.by_name = {s.name: s for s in self.structures}
        self.shares: Sequence[float] = ()  # of the MACs, that a method is about to be asked for
        self._scores: dict[tuple[Any, int], Scores] = {}

    def share(self, small: nn.Module) -> float:
        """The share of the MACs that is left, counted."""
        return count_macs(small, self.task.example) / self.macs

    def cut(self, keeps: Sequence[Tensor]) -> nn.Module:
        small = copy.deepcopy(self.model)
        apply_cut(small, plan_cut(self.structures, keeps))
        return small

    def remembered(self, score: Callable[..., Scores], batches: Sequence[Batch], seed: int) -> Scores:
        """The scores of a seed's calibration data, computed once for all that rank by them."""
        key = (score, seed)
        if key not in self._scores:
            self._scores = {old: kept for old, kept in self._scores.items() if old[1] == seed}
            self._scores[key] = score(self, batches, seed)
        return self._scores[key]

    # ---- choosing

    def choose(self, scores: Scores, scopes: Sequence[Sequence[str]], macs: float) -> list[Tensor]:
        """Of each scope the same share of units goes, lowest scores first; the choice that comes nearest to `macs`.

        Between two shares next to each other the units that differ go one at a time.
        """
        low, high = 0.0, 1.0
        for _ in range(20):
            share = (low + high) / 2
            low, high = (share, high) if self.cost(self.kept(scores, scopes, share)) > macs else (low, share)
        found = self.kept(scores, scopes, low)
        steps = [found]
        for i, (more, less) in enumerate(zip(found, self.kept(scores, scopes, high), strict=True)):
            for u in (more & ~less).nonzero().flatten().tolist():
                keep = steps[-1][i].clone()
                keep[u] = False
                steps.append([*steps[-1][:i], keep, *steps[-1][i + 1 :]])
        return min(steps, key=lambda keeps: abs(self.cost(keeps) - macs))

    def kept(self, scores: Scores, scopes: Sequence[Sequence[str]], share: float) -> list[Tensor]:
        keeps = {}
        for scope in scopes:
            held = torch.cat([self._held(scores[name]) for name in scope])
            gone = torch.zeros(len(held), dtype=torch.bool)
            gone[held.argsort(stable=True)[: round(share * len(held))]] = True
            gone &= held < torch.inf
            keeps |= zip(scope, (~gone).split([len(scores[name]) for name in scope]), strict=True)
        return [keeps[s.name] for s in self.structures]

    def _held(self, scores: Tensor) -> Tensor:
        """Scores with the best `FLOOR` of the units out of reach."""
        scores = scores.detach().cpu().double().clone()
        scores[scores.argsort(descending=True)[: max(1, round(FLOOR * len(scores)))]] = torch.inf
        return scores

    @property
    def local(self) -> list[list[str]]:
        return [[s.name] for s in self.structures]

    @property
    def by_kind(self) -> list[list[str]]:
        """Heads apart from channels and neurons, as torch-pruning ranks them globally."""
        kinds = defaultdict(list)
        for s in self.structures:
            kinds[s.kind == "heads"].append(s.name)
        return list(kinds.values())

    def rows_left(self, layer: str, kept: Mapping[str, Tensor]) -> Tensor:
        """Which outputs of a layer are left: it may produce units itself."""
        left = torch.ones(len(self.model.get_parameter(f"{layer}.weight")), dtype=torch.bool)
        for s in self.structures:
            for member in s.producers:
                if member.tensor == f"{layer}.weight" and member.dim == 0:
                    left[member.index[~kept[s.name]].flatten()] = False
        return left

    # ---- torch-pruning

    @cached_property
    def groups(self) -> dict[str, Any]:
        """Structure name -> torch-pruning's group; traced once, on the dense network itself."""
        modules = dict(self.model.named_modules())
        heads, wanted = {}, set()
        for s in self.structures:
            layers = [modules[name] for name in s.modules()]
            wanted |= set(layers)
            heads |= {layer: s.units for layer in layers if s.kind == "heads"}
        roots = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm)
        ignored = [m for m in modules.values() if isinstance(m, roots) and m not in wanted]
        options: dict[str, Any] = {"ignored_layers": ignored, "num_heads": heads, "prune_num_heads": True}
        self._pruner = tp.pruner.BasePruner(
            self.model,
            self.task.example,
            importance=tp.importance.GroupMagnitudeImportance(),
            prune_head_dims=False,
            output_transform=lambda out: out.logits.sum() if hasattr(out, "logits") else out.sum(),
            **options,
        )
        found: dict[str, Any] = {}
        for group in self._pruner.DG.get_all_groups(ignored, self._pruner.root_module_types):
            touched = {dep.target.module for dep, _ in group if self._pruner.DG.is_out_channel_pruning_fn(dep.handler)}
            for s in self.structures:
                if modules[s.modules()[0]] in touched:
                    found[s.name] = group
        missing = self.by_name.keys() - found.keys()
        assert not missing, f"torch-pruning has no group for {sorted(missing)}"
        return found

    @property
    def isomorphic(self) -> list[list[str]]:
        """torch-pruning's scopes of isomorphic pruning (Fang et al., 2024): groups with the same chain of layers."""
        groups = self.groups
        is_out = self._pruner.DG.is_out_channel_pruning_fn
        scopes = defaultdict(list)
        for name, group in groups.items():
            ends = [(d.source.module, d.trigger, d.target.module, d.handler) for d, _ in group]
            tag = tuple((type(a), is_out(h), type(b), is_out(h)) for a, _, b, h in ends)
            scopes[(self.by_name[name].kind == "heads", tag)].append(name)
        return list(scopes.values())

    def importances(self, importance: Any) -> dict[str, Tensor]:
        """torch-pruning's importance of each unit; of a head the mean over its dimensions."""
        found = {}
        for name, group in self.groups.items():
            imp = importance(group)
            found[name] = imp.view(self.by_name[name].units, -1).mean(1)
        return found


# ---- scores


def magnitude(bench: Bench, batches: Sequence[Batch], seed: int) -> Scores:
    return bench.importances(tp.importance.GroupMagnitudeImportance())


def taylor(bench: Bench, batches: Sequence[Batch], seed: int) -> Scores:
    """torch-pruning's Taylor importance with the gradient of the mean loss over all calibration data."""
    with _gradients(bench.model):
        for batch in batches:
            (bench.task.loss_of(bench.model, batch) / len(batches)).backward()
        return bench.importances(tp.importance.GroupTaylorImportance())


class _Hessian(tp.importance.GroupHessianImportance):
    def accumulate_grad(self, model: nn.Module) -> None:
        for p in model.parameters():
            if p.grad is not None:
                self._accu_grad[p] = self._accu_grad.get(p, 0) + p.grad**2
                self._counter[p] = self._counter.get(p, 0) + 1


def hessian(bench: Bench, batches: Sequence[Batch], seed: int) -> Scores:
    """torch-pruning's Hessian importance with squared gradients of single samples."""
    importance = _Hessian()
    importance.zero_grad()
    with _gradients(bench.model):
        for batch in batches:
            for one in _singles(batch):
                bench.model.zero_grad()
                bench.task.loss_of(bench.model, one).backward()
                importance.accumulate_grad(bench.model)
        return bench.importances(importance)


def random_scores(bench: Bench, batches: Sequence[Batch], seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.rand(s.units, generator=generator) for s in bench.structures}


def wanda(bench: Bench, batches: Sequence[Batch], seed: int) -> Scores:
    """Wanda's score (Sun et al., 2023), abs(w) times the L2 norm of the input, summed over all a unit's columns."""
    layers, modules = consumers(bench.structures), dict(bench.model.named_modules())
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))

    def note(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        squares[name] = squares[name] + rows_of(layer, x).double().pow(2).sum(0)

    read(bench.model, list(layers), batches, note)
    scores = {s.name: torch.zeros(s.units, dtype=torch.float64) for s in bench.structures}
    for name, reads in layers.items():
        weight: Any = modules[name].weight
        columns_i = weight.detach().double().abs().transpose(0, 1).flatten(1).sum(1) * squares[name].sqrt()
        for s, index in reads:
            scores[s.name] += columns_i[index].sum(1)
    return scores


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Of all parameters but tables of embeddings, which are in no group and are the most of MiniLM's."""
    model.eval().zero_grad()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for p in model.parameters():
        p.requires_grad_(id(p) not in tables)
    yield
    model.zero_grad()


def _singles(batch: Batch) -> Iterator[Batch]:
    if isinstance(batch, dict):
        for i in range(len(batch["labels"])):
            length = int(batch["attention_mask"][i].sum())
            yield {k: v[i : i + 1, :length] if v.dim() > 1 else v[i : i + 1] for k, v in batch.items()}
    else:
        yield from zip(batch[0].split(1), batch[1].split(1), strict=True)


# ---- what is done afterwards


def batchnorm(small: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Re-estimate BatchNorm's statistics over all batches, in place."""
    norms = [m for m in small.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            call(small, batch)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return small.eval()


class _Enough(Exception):
    """Ends a pass of a network whose rest nobody reads."""


def read(model: nn.Module, names: Sequence[str], batches: Sequence[Batch], note: Callable[..., None]) -> None:
    """`note(name, layer, x, y)` at each call of the named layers; a pass ends once each was called."""
    modules = dict(model.named_modules())
    left: set[str] = set()

    def noted(m: nn.Module, x: tuple[Tensor, ...], y: Tensor, *, name: str) -> None:
        note(name, m, x[0], y)
        left.discard(name)
        if not left:
            raise _Enough

    hooks = [modules[name].register_forward_hook(partial(noted, name=name)) for name in names]
    try:
        with torch.no_grad():
            for batch in batches:
                left.update(names)
                with suppress(_Enough):
                    call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """(n, channels or features): what a layer reads or gives at each position."""
    return (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """(n, i * kernel): what each output of a linear layer or convolution is computed from."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    assert isinstance(layer, nn.Conv2d)
    assert layer.groups == 1
    rows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return rows.transpose(1, 2).flatten(0, 1)


def sampled(rows: Tensor) -> Tensor:
    """At most `ROWS` rows, the same ones of every tensor with as many."""
    if len(rows) <= ROWS:
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:ROWS]]


def consumers(structures: Sequence[Structure]) -> dict[str, list[tuple[Structure, Tensor]]]:
    """Layer name -> the structures it reads, with the columns (u, k) of their units."""
    found = defaultdict(list)
    for s in structures:
        for member in s.consumers:
            found[member.tensor.rpartition(".")[0]].append((s, member.index))
    return found


# ---- methods: (bench, batches, seed) -> cut(share of MACs) -> network

Cut = Callable[[float], nn.Module]
Method = Callable[[Bench, Sequence[Batch], int], Cut]


def ranked(score: Callable[[Bench, Sequence[Batch], int], Scores], scope: str) -> Method:
    """Units by a score, ranked in scopes, an attribute of `Bench`; the same scores serve every share of MACs."""

    def prepare(bench: Bench, batches: Sequence[Batch], seed: int) -> Cut:
        scores, scopes = bench.remembered(score, batches, seed), getattr(bench, scope)
        return lambda macs: bench.cut(bench.choose(scores, scopes, macs))

    return prepare


def flap(bench: Bench, batches: Sequence[Batch], seed: int) -> Cut:
    """FLAP. Score of an input: its variance over the calibration data times the squared norm of its weights, summed
    over a unit's inputs; standardised in each structure, one ranking; the mean of what went is added to biases."""
    layers, modules = consumers(bench.structures), dict(bench.model.named_modules())
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    counts: dict[str, int] = defaultdict(int)

    def note(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        x_ni = rows_of(layer, x).double()
        sums[name] = sums[name] + torch.stack([x_ni.sum(0), (x_ni**2).sum(0)])
        counts[name] += len(x_ni)

    read(bench.model, list(layers), batches, note)
    raw = {s.name: torch.zeros(s.units, dtype=torch.float64) for s in bench.structures}
    for name, reads in layers.items():
        mean, square = sums[name] / counts[name]
        norm = modules[name].weight.detach().double().pow(2).transpose(0, 1).flatten(1).sum(1)
        for s, index in reads:
            raw[s.name] += ((square - mean**2) * norm)[index].sum(1)
    scores = {name: (v - v.mean()) / v.std().clamp_min(1e-12) for name, v in raw.items()}

    def cut(macs: float) -> nn.Module:
        keeps = bench.choose(scores, [[s.name for s in bench.structures]], macs)
        small, kept = bench.cut(keeps), {s.name: keep for s, keep in zip(bench.structures, keeps, strict=True)}
        for name, reads in layers.items():
            lost = torch.cat([index[~kept[s.name]].flatten() for s, index in reads])
            weight = modules[name].weight.detach().double()
            weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
            extra = (weight[:, lost] @ (sums[name][0] / counts[name])[lost])[bench.rows_left(name, kept)].float()
            layer: Any = small.get_submodule(name)
            layer.bias = nn.Parameter(extra if layer.bias is None else layer.bias.detach() + extra)
        return small

    return cut


def kwon(bench: Bench, batches: Sequence[Batch], seed: int) -> Cut:
    """Kwon et al. Fisher information of masks from single samples; the best split of MACs between heads and the rest;
    masks rearranged within each structure by its block of the Fisher matrix; masks tuned layer by layer by least
    squares to what the dense layer and the residual stream beside it give."""
    gates = gate_gradients(bench.model, bench.structures, Calibration(batches, bench.task.loss, samples=10**9))
    fisher = {name: g_bu.double().pow(2).mean(0) for name, g_bu in gates.items()}
    layers = consumers(bench.structures)
    order: list[str] = []
    dense: dict[str, list[Tensor]] = defaultdict(list)
    read(bench.model, list(layers), batches[:1], lambda name, *_: order.append(name))
    with streams(bench.model, order) as stream:
        read(bench.model, order, batches, lambda n, m, x, y: dense[n].append(sampled(rows_of(m, y + stream.get(n, 0)))))

    def cut(macs: float) -> nn.Module:
        keeps = masks(bench, fisher, macs)
        keeps = [rearranged(gates[s.name], keep) for s, keep in zip(bench.structures, keeps, strict=True)]
        small, kept = bench.cut(keeps), {s.name: keep for s, keep in zip(bench.structures, keeps, strict=True)}
        for name in dict.fromkeys(order):
            targets = [y_no[:, bench.rows_left(name, kept)] for y_no in dense[name]]
            tune_masks(small, name, owners(layers[name], kept), targets, batches)
        return small

    return cut


def masks(bench: Bench, fisher: Scores, macs: float) -> list[Tensor]:
    """Every third number of heads with the most of the rest that `macs` allows; what loses the least information."""
    scopes = bench.by_kind
    if len(scopes) == 1:
        return bench.choose(fisher, scopes, macs)
    names = [s.name for s in bench.structures]
    heads = {s.name for s in bench.structures if s.kind == "heads"}
    total = sum(bench.by_name[name].units for name in heads)
    found: list[tuple[float, list[Tensor]]] = []
    for gone in range(0, total, 3):
        of_heads = bench.kept(fisher, scopes, gone / total)
        low, high, keeps = 0.0, 1.0, of_heads
        for _ in range(12):
            share = (low + high) / 2
            of_rest = bench.kept(fisher, scopes, share)
            keeps = [a if name in heads else b for name, a, b in zip(names, of_heads, of_rest, strict=True)]
            low, high = (share, high) if bench.cost(keeps) > macs else (low, share)
        if abs(bench.cost(keeps) - macs) < 0.005:
            found.append((sum(float(fisher[n][~keep].sum()) for n, keep in zip(names, keeps, strict=True)), keeps))
    return min(found, key=lambda pair: pair[0])[1]


def rearranged(g_bu: Tensor, keep: Tensor) -> Tensor:
    """A removed and a kept unit change places while ||sum of the removed units' gradients||^2 falls."""
    keep, g_bu = keep.clone(), g_bu.double()
    total = g_bu[:, ~keep].sum(1)
    for u in (~keep).nonzero().flatten().tolist():
        rest, kept = total - g_bu[:, u], keep.nonzero().flatten()
        change = 2 * (g_bu[:, kept].T @ rest) + g_bu[:, kept].pow(2).sum(0)
        if float(change.min()) < float(2 * (g_bu[:, u] @ rest) + g_bu[:, u].pow(2).sum()):
            other = int(kept[change.argmin()])
            keep[u], keep[other] = True, False
            total = rest + g_bu[:, other]
    return keep


def owners(reads: Sequence[tuple[Structure, Tensor]], kept: Mapping[str, Tensor]) -> Tensor:
    """Of each input that a cut layer still has the number of its unit, from 0."""
    size = max(int(index.max()) for _, index in reads) + 1
    owner, alive, count = torch.full((size,), -1), torch.ones(size, dtype=torch.bool), 0
    for s, index in reads:
        owner[index] = torch.arange(count, count + s.units)[:, None].expand_as(index)
        alive[index[~kept[s.name]].flatten()] = False
        count += s.units
    assert (owner >= 0).all(), "a layer reads inputs that are in no structure"
    return owner[alive].unique(return_inverse=True)[1]


def tune_masks(small: nn.Module, name: str, owner: Tensor, targets: Sequence[Tensor], batches: Sequence[Batch]) -> None:
    """Scale the columns of each unit that a layer reads: argmin ||sum over u of m_u (x_u W_u) + b - y||^2."""
    layer: Any = small.get_submodule(name)
    w_oi = layer.weight.detach().flatten(1).double()
    gram, cross = torch.zeros_like(w_oi.T @ w_oi), torch.zeros_like(w_oi[0])
    left = iter(targets)

    def note(n: str, m: nn.Module, x: Tensor, y: Tensor) -> None:
        x_ni, y_no = sampled(columns(m, x)).double(), next(left).double()
        if n in stream:
            y_no = y_no - sampled(rows_of(m, stream[n]))
        y_no = y_no if layer.bias is None else y_no - layer.bias.detach()
        gram.add_((x_ni.T @ x_ni) * (w_oi.T @ w_oi))
        cross.add_((x_ni * (y_no @ w_oi)).sum(0))

    with streams(small, [name]) as stream:
        read(small, [name], batches, note)
    pick = F.one_hot(owner.repeat_interleave(w_oi.shape[1] // len(owner))).double()
    a_uu, b_u = pick.T @ gram @ pick, pick.T @ cross
    damping = 1e-3 * a_uu.diagonal().mean()  # towards masks of 1
    mask = torch.linalg.solve(a_uu + damping * torch.eye(len(b_u)), b_u + damping)
    if mask.abs().max() <= 10:  # the paper's rule: masks that run away are left at 1
        with torch.no_grad():
            layer.weight.copy_((w_oi * (pick @ mask)).view_as(layer.weight))


@contextmanager
def streams(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Layer name -> the residual stream that its output is added to, where the layer's owner is called with both."""
    found: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        if len(args) == 2 and all(isinstance(arg, Tensor) for arg in args):
            found[name] = args[1]

    homes = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    hooks = [home.register_forward_pre_hook(partial(note, name=name)) for name, home in homes.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def once(method: Method) -> Method:
    """The same, which prepares and cuts once for each set of calibration data, and gives copies."""
    kept: dict[str, Any] = {}

    def prepare(bench: Bench, batches: Sequence[Batch], seed: int) -> Cut:
        if kept.get("of") != (bench, seed):
            kept.update(of=(bench, seed), cut=cache(method(bench, batches, seed)))
        cut = kept["cut"]
        return lambda macs: copy.deepcopy(cut(macs))

    return prepare


def with_norms(method: Method) -> Method:
    """The same, BatchNorm's statistics re-estimated afterwards."""

    def prepare(bench: Bench, batches: Sequence[Batch], seed: int) -> Cut:
        cut = method(bench, batches, seed)
        return lambda macs: batchnorm(cut(macs), batches)

    return prepare


METHODS: dict[str, Method] = {
    "random": ranked(random_scores, "local"),
    "magnitude": ranked(magnitude, "local"),
    "torch-pruning magnitude, global": ranked(magnitude, "by_kind"),
    "torch-pruning magnitude, isomorphic": ranked(magnitude, "isomorphic"),
    "torch-pruning Taylor, global": ranked(taylor, "by_kind"),
    "torch-pruning Taylor, isomorphic": ranked(taylor, "isomorphic"),
    "torch-pruning Hessian, global": ranked(hessian, "by_kind"),
    "torch-pruning Hessian, isomorphic": ranked(hessian, "isomorphic"),
    "Wanda, whole units": ranked(wanda, "local"),
    "FLAP": once(flap),
    "Kwon et al.": once(kwon),
}
CALIBRATION_FREE = tuple(name for name in METHODS if "magnitude" in name)  # the same for every seed
WITH_NORMS = {f"{name} + BN": with_norms(method) for name, method in METHODS.items() if "Wanda" not in name}


# ---- packages that are not installed beside gsprune: `pip install --no-deps --target FOLDER/NAME ...`


def package_methods(folder: Path) -> dict[str, Method]:
    """ModelOpt's FastNAS and fasterai's Pruner, for networks of pictures, where `folder` has them."""
    found = {"FastNAS": fastnas, "fasterai": fasterai}
    names = {"FastNAS": "modelopt", "fasterai": "fasterai"}
    there = {label: method for label, method in found.items() if (folder / names[label]).exists()}
    sys.path += [str(folder / names[label]) for label in there if str(folder / names[label]) not in sys.path]
    return there | {f"{label} + BN": with_norms(method) for label, method in there.items()}


def fastnas(bench: Bench, batches: Sequence[Batch], seed: int) -> Cut:
    """ModelOpt's FastNAS with tenths of the channels as choices (its default, multiples of 32, leaves none here);
    the score is the accuracy on the calibration data. The sensitivities are measured once for all shares."""
    import modelopt.torch.prune as mtp

    space = {
        "nn.Conv2d": {"*": {"channels_ratio": tuple(i / 10 for i in range(1, 11)), "channel_divisor": 1}},
        "nn.BatchNorm2d": {"*": {"feature_divisor": 1}},
    }
    checkpoint = Path(tempfile.mkdtemp()) / "search.pth"

    def cut(macs: float) -> nn.Module:
        small, _ = mtp.prune(
            copy.deepcopy(bench.model),
            mode=[("fastnas", space)],
            constraints={"flops": f"{100 * macs}%"},
            dummy_input=bench.task.example,
            config={
                "data_loader": batches,
                "collect_func": lambda batch: batch[0],
                "score_func": lambda model: bench.task.evaluate(model, batches),
                "checkpoint": str(checkpoint),
                "verbose": False,
            },
        )
        return small.eval()

    return cut


def fasterai(bench: Bench, batches: Sequence[Batch], seed: int) -> Cut:
    """fasterai's Pruner, global, large_final (the one of its criteria that needs no training), the ratio bisected."""
    from fasterai.core.criteria import large_final
    from fasterai.prune.all import Pruner

    def pruned(ratio: float) -> nn.Module:
        small = copy.deepcopy(bench.model)
        with contextlib.redirect_stdout(io.StringIO()):
            Pruner(small, ratio, "global", large_final, example_inputs=bench.task.example).prune_model()
        return small.eval()

    def cut(macs: float) -> nn.Module:
        low, high = 0.0, 1.0
        found = []
        for _ in range(10):
            ratio = (low + high) / 2
            found.append(pruned(ratio))
            low, high = (ratio, high) if bench.share(found[-1]) > macs else (low, ratio)
        return min(found, key=lambda small: abs(bench.share(small) - macs))

    return cut
