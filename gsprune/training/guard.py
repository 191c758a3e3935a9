"""`Guard`: skips a training step with non-finite gradients, and ends the run after too many in a row.

The decision is made on the device, without a sync point, unless the optimizer has no fused form.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LOOK = 8  # steps between two looks at the counters; each reads the copy that the one before it requested


class BadNumbers(ValueError):
    """Too many steps in a row had gradients that are not finite."""


class Guard:
    """Watches the steps of one training run, in this order:

        guard.begin()                   # before the forward pass
        loss.backward()                 # x accumulation steps, then unscale
        guard.judge()
        with guard.shown():             # the optimizer carries `found_inf`, as under a gradient scaler
            pruner.on_before_optimizer_step()
        guard.clip(max_norm)
        guard.step()                    # optimizer.step(), unless the step is bad
        guard.look()                    # raises BadNumbers, up to 2 * LOOK steps late

    A step is bad if the 2-norm (in float32) of a gradient is not finite. Parameters, the optimizer's state and buffers
    (BatchNorm's statistics, which one NaN would make useless) are then bit for bit the same as before the step. Buffers
    are floating-point ones of any shape and scalar counters.

    Args:
        model: network that is trained.
        optimizer: of the model's parameters. A fused one skips a bad step inside its kernel; for any other, `step` is
            a sync point.
        limit: bad steps in a row that are allowed; one more ends the run.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> guard = Guard(layer, torch.optim.SGD(layer.parameters(), lr=0.1), limit=0)
        >>> guard.begin()
        >>> layer.weight.grad, layer.bias.grad = torch.tensor([[1.0, float("inf")]]), torch.ones(1)
        >>> guard.judge(), guard.step(), guard.skipped, guard.streak
        (None, None, 1, 1)
        >>> guard.look(now=True)
        Traceback (most recent call last):
        gsprune.training.guard.BadNumbers: 1 step in a row had gradients that are not finite, first that of 'weight' \
(inf), 1 of 2: lower optimizer.lr (or trainer.prune_lr), set trainer.clip_norm, look at the data, or raise \
trainer.max_bad_steps=0
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, limit: int) -> None:
        self.model, self.optimizer, self.limit = model, optimizer, limit
        self._fused = _skips_by_itself(optimizer)
        self._unbounded = unbounded(model)
        self._kept: dict[tuple[torch.dtype, torch.device], _Kept] = {}
        device = parameters_of(optimizer)[0].device
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._skipped, self._streak, self._longest = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        self._norm = torch.zeros((), device=device)
        self._first = torch.zeros(0, device=device)  # the gradients' norms in the first step of the streak
        self._judged: list[Tensor] = []  # the parameters whose gradients they were
        self._steps = 0
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    # ---- one step

    @torch.no_grad()
    def begin(self) -> None:
        """Before the forward pass: save the buffers."""
        for key, buffers in _buffers(self.model).items():
            if key not in self._kept or not self._kept[key].fit(buffers):
                self._kept[key] = _Kept(buffers)
            self._kept[key].save(buffers)

    @torch.no_grad()
    def judge(self) -> None:
        """After the backward pass, with gradients unscaled and not yet clipped: one pass over them, no sync point."""
        self._judged = [p for p in parameters_of(self.optimizer) if p.grad is not None]
        norms = _norms(self._judged, self._first)
        self._bad, self._norm = norms.isfinite().all().logical_not(), torch.linalg.vector_norm(norms)
        self._skipped = self._skipped + self._bad
        self._streak = (self._streak + 1) * self._bad
        # of the streak that ends the run, not of a later one that begins before the host has read the counters
        begun = (self._streak == 1) & (self._longest <= self.limit)
        self._first = torch.where(begun, norms, self._first if len(self._first) == len(norms) else norms)
        self._longest = torch.maximum(self._longest, self._streak)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the optimizer has `found_inf`: 1.0 for a bad step, on the device."""
        self.optimizer.found_inf = self._bad.float()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> None:
        """Scale the gradients to a global norm of at most `max_norm`; those of a bad step are unchanged."""
        if max_norm is not None:
            norm = self._norm.masked_fill(self._bad, 0)
            nn.utils.clip_grads_with_norm_(parameters_of(self.optimizer), max_norm, norm)

    def step(self) -> None:
        """`optimizer.step()`; after a bad step, no update, and the buffers as saved by `begin`."""
        if self._fused:
            with self.shown():
                self.optimizer.step()
            if self._steps == 0:
                self._clear_new_momentum()
        elif not self._bad.item():  # a sync point, only for an optimizer without a fused form
            self.optimizer.step()
        self._steps += 1
        with torch.no_grad():
            for key, buffers in _buffers(self.model).items():
                if key in self._kept and self._kept[key].fit(buffers):
                    self._kept[key].put_back(buffers, where=self._bad)

    def _clear_new_momentum(self) -> None:
        """A fused SGD that skips its first step leaves uninitialised momentum."""
        for state in self.optimizer.state.values():
            if isinstance(momentum := state.get("momentum_buffer"), Tensor):
                momentum.masked_fill_(self._bad, 0)

    # ---- the count

    @property
    def skipped(self) -> int:
        """Bad steps so far. This is a sync point."""
        return int(self._skipped)

    @property
    def streak(self) -> int:
        """Bad steps in a row, up to the last one; 0 after a good step. This is a sync point."""
        return int(self._streak)

    def state_dict(self) -> dict[str, int]:
        """The counters, for a checkpoint. This is a sync point."""
        return {"skipped": self.skipped, "streak": self.streak, "longest": int(self._longest), "steps": self._steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for counter, name in ((self._skipped, "skipped"), (self._streak, "streak"), (self._longest, "longest")):
            counter.fill_(state[name])
        self._steps = state["steps"]

    def look(self, *, now: bool = False) -> None:
        """After every step: check the counters of up to 2 * LOOK steps ago; with `now`, those of now (sync).

        Raises:
            BadNumbers: more than `limit` bad steps in a row; names the first tensor with a bad gradient.
        """
        if now:
            self._check(int(self._longest))
        elif self._steps % LOOK == 0:
            if self._asked is not None:
                longest, copied = self._asked
                if copied is not None:
                    copied.synchronize()  # requested LOOK steps ago
                self._check(int(longest.numpy()))
            self._asked = self._ask()

    def _ask(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """Start to copy the longest streak to the host."""
        if not self._longest.is_cuda:
            return self._longest.to("cpu", copy=True), None
        host = torch.empty_like(self._longest, device="cpu", pin_memory=True)
        host.copy_(self._longest, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._longest.device))
        return host, copied

    def _check(self, longest: int) -> None:
        if longest > self.limit:
            spoiled, steps = self._spoiled(), f"{longest} step{'s' * (longest > 1)}"
            more = "" if spoiled else f", or raise trainer.max_bad_steps={self.limit}"
            raise BadNumbers(
                f"{steps} in a row had gradients that are not finite, {spoiled or self._first_bad()}: lower "
                f"optimizer.lr (or trainer.prune_lr), set trainer.clip_norm, look at the data{more}"
            )

    def _spoiled(self) -> str | None:
        """The first tensor of the model that is not finite itself: no later step can be good."""
        for name, tensor in not_finite(self.model, but_for=self._unbounded).items():
            return f"and {name!r} itself holds {'nan' if bool(tensor.isnan().any()) else 'inf'}"
        return None

    def _first_bad(self) -> str:
        """The first of the gradients that are not finite in the first step of the streak."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        norms = self._first.tolist()
        bad = [i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        name = names.get(id(self._judged[bad[0]]), "a parameter that the model does not have")
        return f"first that of {name!r} ({norms[bad[0]]:g}), {len(bad)} of {len(norms)}"


class _Kept:
    """A flat copy of tensors of one dtype, so that choosing between two states is one operation."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes = [tensor.shape for tensor in tensors]
        sizes = [tensor.numel() for tensor in tensors]
        self.before, self.after = (tensors[0].new_empty(sum(sizes)) for _ in range(2))
        self._befores, self._afters = (
            [part.view(shape) for part, shape in zip(torch.split(flat, sizes), self.shapes, strict=True)]
            for flat in (self.before, self.after)
        )

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        return [tensor.shape for tensor in tensors] == self.shapes

    def save(self, tensors: list[Tensor]) -> None:
        torch._foreach_copy_(self._befores, tensors)

    def put_back(self, tensors: list[Tensor], *, where: Tensor) -> None:
        torch._foreach_copy_(self._afters, tensors)
        torch.where(where, self.before, self.after, out=self.after)
        torch._foreach_copy_(tensors, self._afters)


def _buffers(model: nn.Module) -> dict[tuple[torch.dtype, torch.device], list[Tensor]]:
    """Buffers that a forward pass may change; integer constants such as position indices are left out."""
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for buffer in model.buffers():
        if buffer.is_floating_point() or buffer.dim() == 0:
            found[buffer.dtype, buffer.device].append(buffer.detach())
    return found


def _norms(parameters: Sequence[Tensor], like: Tensor) -> Tensor:
    """The 2-norm of each gradient, (parameters,), in float32 or wider."""
    grads = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
    dtype = torch.float64 if any(grad.dtype is torch.float64 for grad in grads) else torch.float32
    return torch.stack(torch._foreach_norm(grads, dtype=dtype)) if grads else like.new_zeros(0)


def _skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer's own kernel honours `found_inf`, the way torch's fused forms do."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return bool(fused) and "grad_scaler" not in inspect.signature(optimizer.step).parameters


def not_finite(model: nn.Module, *, but_for: Collection[str] = ()) -> dict[str, Tensor]:
    """Parameters and buffers that hold nan or inf, by name. This is a sync point.

    >>> norm = nn.BatchNorm1d(2)
    >>> _ = norm.running_var.fill_(math.inf)
    >>> list(not_finite(norm)), list(not_finite(norm, but_for={"running_var"}))
    (['running_var'], [])
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    floats = {name: tensor for name, tensor in named if tensor.is_floating_point() and name not in but_for}
    return {name: tensor for name, tensor in floats.items() if not bool(tensor.isfinite().all())}


def unbounded(model: nn.Module) -> frozenset[str]:
    """Names of the buffers that hold inf on purpose, as attention masks do, in a model that is sound."""
    return frozenset(dict(model.named_buffers()).keys() & not_finite(model).keys())


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
