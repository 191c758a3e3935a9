"""An optimizer's own step calls the pruner's hooks, for training loops that do not: `attach`, train, `finish`."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gsprune.surgery.optimizers import Optimizers, every_optimizer, held, leaves, names_of

__all__ = ["Attachable"]

FEWEST = 100  # backward passes that may be summed up before a step, whatever the length of an epoch
_PRUNERS: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Attachable]] = weakref.WeakKeyDictionary()  # by optimizer


class Attachable:
    """The part of `Pruner` that lets an optimizer's own step call the hooks, for training loops that do not."""

    model: nn.Module
    parts: list[Any]
    steps_per_epoch: int | None
    epoch: int
    step: int
    on_train_begin: Callable[[], None]
    on_step_begin: Callable[[int], None]
    on_step_end: Callable[[], None]
    on_train_end: Callable[[], None]
    restore_masks: Callable[[], None]
    trained: Callable[[], dict[str, Tensor]]
    _score: Callable[..., None]
    _mask_gradients: Callable[[], None]
    _handles: list[Any]  # each with a `remove`
    _optimizer: Optimizers | None
    _stepped: set[int]  # the optimizers that have made this training step
    _loaded: bool  # whether something was loaded into the model since the last step
    _early: set[int]  # those whose next step was scored before: in the first of SAM's two steps

    # ---- what calls the hooks

    @property
    def optimizer(self) -> Optimizers | None:
        """The optimizer, or several, as given."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, given: Optimizers | None) -> None:
        self.optimizers = every_optimizer(given)  # with those inside others
        self._optimizer = given

    @property
    def attached(self) -> bool:
        """Whether an optimizer's step calls the hooks."""
        return bool(self._handles)

    def attach(self, *optimizers: Optimizer) -> None:
        """Let the optimizers' own steps call the hooks: `attach`, train, then `finish`.

        Give all optimizers that train what is pruned; the default is those that the pruner was made with. Wrappers
        (accelerate's, SAM, Lookahead, anything that keeps an optimizer in an attribute) are resolved.

        A training step ends once all optimizers have stepped, or when one of them steps again before the others did
        (a discriminator that is trained five times for each step of its generator). Each gradient is scored once a
        step, before the first optimizer that holds a tensor of what is read changes a weight. Gradients are those that
        the optimizer sees, so after clipping. With `optimizer.step(closure)` they are those of the closure's first
        backward pass, before any weight changes; with SAM, those of its first step. A step that a gradient scaler skips
        adds nothing, also if a fused optimizer unscales and skips by itself.

        Weights that `model.load_state_dict` loads are masked at once, other changes after the next step. If that
        replaces tensors that the optimizers hold (`assign=True`), the next step is an error.

        Raises:
            ValueError: the optimizers do not hold all that is pruned and not frozen; an optimizer has no hooks; the
                pruner has no `steps_per_epoch`, which turns steps into progress; the pruner is attached already.
        """
        if not self.parts:
            return  # nothing is pruned
        if self._handles:
            raise ValueError("the pruner is attached already: finish() it before attaching it again")
        if self.steps_per_epoch is None:
            raise ValueError("attach needs the pruner's steps_per_epoch, to know how far training is")
        given = optimizers if len(optimizers) != 1 else optimizers[0]
        found = every_optimizer(given) or self.optimizers
        if not found:
            raise ValueError("attach needs an optimizer: give it all that train what is pruned")
        self.restore_masks()  # other tensors may lie in the model now than when the pruner was made
        self._check_held(found)
        for leaf in leaves(found):
            if not hasattr(leaf, "_optimizer_step_pre_hooks"):
                raise ValueError(
                    f"{type(leaf).__name__} has no step hooks (it does not call Optimizer.__init__): call the pruner's "
                    f"own hooks from the loop instead of attach"
                )
        if optimizers:
            self.optimizer = given
        self._detach_others()
        self.on_train_begin()
        self.on_step_begin(self.step)
        self._hook()

    def detach(self) -> None:
        """Remove the hooks from the optimizers; masks and model stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> nn.Module:
        """End the training of an attached pruner: removes the hooks, sets the final mask, cuts out pruned units.

        Masks are applied to the weights that the model has now, also if others (of the best epoch) were loaded.

        Returns:
            The model given to the constructor, pruned.
        """
        self.detach()
        self.on_train_end()
        return self.model

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached to the copies of the optimizers."""
        return {**vars(self), "_handles": [], "_attached": self.attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached", False)
        vars(self).update(state)
        if attached:
            self._hook()

    # ---- inside

    def _check_held(self, found: list[Any]) -> None:
        mine, trained = held(found), self.trained()
        missing = [name for name, tensor in trained.items() if id(tensor) not in mine]
        if missing and len(missing) == len(trained):
            raise ValueError(f"{names_of(found)} holds nothing of what is pruned: is it another model's?")
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{missing[0]}{more} is pruned, but {names_of(found)} does not hold it: attach all optimizers that "
                f"train what is pruned, as in attach(first, second); exclude it, or freeze it (requires_grad_(False))"
            )

    def _check_trains(self) -> None:
        """After tensors of the model were replaced."""
        mine = held(self.optimizers)
        lost = next((name for name, tensor in self.trained().items() if id(tensor) not in mine), None)
        if lost is not None:
            raise ValueError(
                f"{lost} was replaced in the model (as load_state_dict(assign=True) does), and "
                f"{names_of(self.optimizers)} trains what was there before: load without assign, or make the "
                f"optimizer anew and attach it"
            )

    def _detach_others(self) -> None:
        """An older pruner of this model would go on masking and cutting what this one does."""
        mine = {id(parameter) for parameter in self.model.parameters()}
        for leaf in leaves(self.optimizers):
            for other in [*_PRUNERS.get(leaf, ())]:
                if other is not self and other.attached and any(id(p) in mine for p in other.model.parameters()):
                    other.detach()
                    warnings.warn(
                        f"{names_of([leaf])} had another pruner of this model attached: that one is detached now",
                        stacklevel=3,
                    )

    def _hook(self) -> None:
        self._stepped, self._early, self._loaded = set(), set(), False
        for optimizer in self.optimizers:
            hooks = hasattr(optimizer, "_optimizer_step_post_hooks")
            if optimizer in (ends := leaves([optimizer])):
                _PRUNERS.setdefault(optimizer, weakref.WeakSet()).add(self)
                self._handles.append(optimizer.register_step_pre_hook(_Hook(self, "_before_step")))
                self._handles.append(optimizer.register_step_post_hook(_Hook(self, "_after_step")))
            elif hooks:  # what it does after the step of the inner one may revive weights
                self._handles.append(optimizer.register_step_post_hook(_Hook(self, "_after_outer_step")))
            if not ends and callable(getattr(optimizer, "first_step", None)):
                self._handles.append(_FirstStep(optimizer, _Hook(self, "_before_first_step")))
        if not self.epoch and not self.step:
            self._handles.append(_Unstepped(self))
        loading: Any = self.model.register_load_state_dict_post_hook  # untyped in torch
        self._handles.append(loading(_Hook(self, "_after_loading")))

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _nested(optimizer):
            return None
        if self._loaded:
            self._loaded = False
            self._check_trains()
        if id(optimizer) in self._stepped:
            self._end_step()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if id(optimizer) in self._early:
            return None
        if closure is None:
            self._score_held(optimizer)
            return None
        watched = _Closure(self, optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if _nested(optimizer):
            return
        self._stepped.add(id(optimizer))
        self._early.discard(id(optimizer))
        self._count_no_more()
        self.on_step_end()
        if self._stepped >= {id(leaf) for leaf in leaves(self.optimizers)}:
            self._end_step()

    def _count_no_more(self) -> None:
        """Of backward passes without a step: there was one, or the tensor that counts them is about to be cut."""
        for handle in self._handles:
            if isinstance(handle, _Unstepped):
                handle.remove()

    def _after_outer_step(self, *_: Any) -> None:
        self.on_step_end()

    def _before_first_step(self, optimizer: Any) -> None:
        """SAM: the gradient here is that of the weights themselves, and what is pruned is not to be perturbed."""
        for leaf in leaves(every_optimizer(optimizer)):
            if id(leaf) in self._stepped:
                self._end_step()
            self._score_held(leaf)
            self._early.add(id(leaf))
        self._mask_gradients()

    def _after_loading(self, *_: Any) -> None:
        self.restore_masks()
        self._loaded = True

    def _score_held(self, optimizer: Any) -> None:
        """A fused optimizer is handed scaled gradients, the scale and whether one is inf."""
        several = len(leaves(self.optimizers)) > 1
        scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        mine = held([optimizer]).keys() if several or found_inf is not None else None
        self._score(scale, found_inf, held=mine if several else None, judged=mine if found_inf is not None else ())

    def _found_inf(self) -> Tensor | None:
        """What a guard or gradient scaler says of this step, on the device: 1 for one that will be skipped."""
        said = (getattr(optimizer, "found_inf", None) for optimizer in self.optimizers)
        return next((value for value in said if value is not None), None)

    def _end_step(self) -> None:
        assert self.steps_per_epoch is not None
        self._stepped.clear()
        epochs, step = divmod(self.step + 1, self.steps_per_epoch)
        self.epoch += epochs
        self.on_step_begin(step)


class _Hook:
    """Calls a pruner; in a copy of what it hangs on, nothing: the copy is nobody's to prune."""

    def __init__(self, pruner: Attachable | None, method: str) -> None:
        self.pruner, self.method = pruner, method

    def __call__(self, *args: Any) -> Any:
        return getattr(self.pruner, self.method)(*args) if self.pruner is not None else None

    def __deepcopy__(self, memo: object) -> _Hook:
        return _Hook(None, self.method)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self.method)


class _Closure:
    """What `optimizer.step` was given, with the gradients scored where they belong to the weights of before the step.

    An optimizer that evaluates often (LBFGS) searches among the masked networks: weights before each further
    evaluation, and all its gradients, are masked.
    """

    def __init__(self, pruner: Attachable, optimizer: Any, closure: Callable[[], Any]) -> None:
        self.pruner, self.optimizer, self.closure, self.calls = pruner, optimizer, closure, 0
        self.often = any("lbfgs" in kind.__name__.lower() for kind in type(optimizer).__mro__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls and self.often:
            self.pruner.on_step_end()
        result = self.closure(*args, **kwargs)
        if not self.calls:
            self.pruner._score_held(self.optimizer)
        if self.often:
            self.pruner._mask_gradients()
        self.calls += 1
        return result


class _Unstepped:
    """Counts the backward passes before the first step, and warns once there are as many as an epoch has steps."""

    def __init__(self, pruner: Attachable) -> None:
        assert pruner.steps_per_epoch is not None
        self._whose, self._left = names_of(pruner.optimizers), max(pruner.steps_per_epoch, FEWEST)
        tensor: Any = next(iter(pruner.trained().values()), None)  # untyped in torch
        self._handle = None if tensor is None else tensor.register_post_accumulate_grad_hook(self._count)

    def _count(self, _: Tensor) -> None:
        self._left -= 1
        if not self._left:
            self.remove()
            warnings.warn(
                f"a pruner is attached to {self._whose}, which has not made a step in an epoch of backward passes: "
                f"nothing is scored; attach the optimizers that train the model",
                stacklevel=2,
            )

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


class _FirstStep:
    """The first of SAM's two steps, with a hook before it."""

    def __init__(self, optimizer: Any, hook: Callable[[Any], Any]) -> None:
        original = optimizer.first_step

        @functools.wraps(original)
        def first_step(*args: Any, **kwargs: Any) -> Any:
            hook(optimizer)
            return original(*args, **kwargs)

        optimizer.first_step = first_step
        self.optimizer = optimizer

    def remove(self) -> None:
        vars(self.optimizer).pop("first_step", None)


def _nested(optimizer: Any) -> bool:
    """Whether this is the step of a base class that the optimizer's own `step` calls: torch runs its hooks too."""
    kinds = [kind for kind in type(optimizer).__mro__ if "step" in vars(kind) and kind is not Optimizer]
    if len(kinds) < 2:
        return False
    codes = {vars(kind)["step"].__code__ for kind in kinds if hasattr(vars(kind)["step"], "__code__")}
    frame: FrameType | None = sys._getframe(1)
    calls = 0
    while frame is not None:
        calls += frame.f_code in codes and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return calls > 1
