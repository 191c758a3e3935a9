"""Other people's loops: when a step counts, what is scored in it, and that masks hold in the end."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from facts import refused
from torch import Tensor, nn
from torch.nn import functional as F

from gsprune import Pruner, Rule
from gsprune.criteria import Abs, Elementwise, Magnitude, Weighted
from gsprune.pruner.attaching import FEWEST
from gsprune.schedules import Cubic, OneShot

STEPS = 4
X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
NEVER = OneShot(start_epoch=99)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def loss(model: nn.Module, part: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(X[part]), Y[part])


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def weights(model: nn.Module, criterion: Any = None, **settings: Any) -> Pruner:
    settings = {"target_sparsity": 0.5, "schedule": OneShot(start_epoch=1), "steps_per_epoch": STEPS, **settings}
    return Pruner(model, criterion or Elementwise(decay=1.0), **settings)


def units(model: nn.Module, **settings: Any) -> Pruner:
    return weights(model, Weighted(decay=1.0), example_input=X[:2], **settings)


def zeros(model: nn.Module, masks: dict[str, Tensor]) -> bool:
    """Whether what is pruned is zero, and nothing else is."""
    return all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())


class Wrapper(torch.optim.Optimizer):
    """The shape of most Lookaheads: an optimizer around another, with groups of its own."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__([dict(group) for group in base.param_groups], {})
        self.fast = base

    def step(self, closure: Any = None) -> Any:
        result = self.fast.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    slow = self.state[p].setdefault("slow", p.detach().clone())
                    p.copy_(slow.lerp_(p, 0.5))
        return result


class Sam(torch.optim.Optimizer):
    """As davda54 wrote it: up the gradient, and the base optimizer's step from where it was, by the gradient there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"rho": 0.5})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        named = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in named]).norm()
        for p in named:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * (0.5 / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data = self.state[p]["old"]
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


# ---- several optimizers


def pair(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Matrices and vectors, as Muon and AdamW share them; a unit has something of both."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) is wide] for wide in (True, False))
    return torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.SGD(vectors, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("shrink", ["at_end", "each_update"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_optimizers_train_as_one_does(shrink: str, order: tuple[int, int]) -> None:
    one, two = mlp(), mlp()
    first, second = units(one, shrink=shrink), units(two, shrink=shrink)
    optimizer, several = sgd(one), pair(two)
    first.attach(optimizer)
    second.attach(*several)
    for step in range(3 * STEPS):
        for model, optimizers in ((one, [optimizer]), (two, [several[i] for i in order])):
            loss(model).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
        assert (first.epoch, first.step) == (second.epoch, second.step) == divmod(step + 1, STEPS)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(a, b)
    assert first.finish()[0].out_features == second.finish()[0].out_features == 4
    assert torch.equal(first.scores()["0"], second.scores()["0"])


def test_a_step_is_over_when_one_of_two_optimizers_steps_again() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})
    a, b = (torch.optim.SGD(model[name].parameters(), lr=0.1) for name in "ab")
    pruner = weights(model, schedule=NEVER)
    pruner.attach(a, b)
    expected, steps = {name: torch.zeros(3, 6) for name in "ab"}, []
    for name, optimizer in [("a", a), ("a", a), ("b", b), ("a", a), ("b", b)]:
        loss(model[name]).backward()
        expected[name] += (model[name].weight * model[name].weight.grad).abs().detach()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(pruner.step)
    assert steps == [0, 1, 2, 2, 3]
    for name in "ab":
        torch.testing.assert_close(pruner.scores()[f"{name}.weight"], expected[name])
    assert pruner.state_dict()["rules"][0]["scored"] == 3


@pytest.mark.parametrize("make", [weights, units])
def test_optimizers_that_miss_something_pruned_are_refused(make: Callable[[nn.Module], Pruner]) -> None:
    model = mlp()
    optimizers = sgd(model[0]), sgd(model[2])
    with pytest.raises(ValueError, match=r"2\.weight.* SGD optimizer does not hold it: attach all"):
        make(model).attach(optimizers[0])
    with pytest.raises(ValueError, match="attach needs an optimizer"):
        make(model).attach()
    with pytest.raises(ValueError, match=r"optimizer is a Linear: it must be a torch\.optim\.Optimizer"):
        make(model).attach(model[0])  # type: ignore[arg-type]
    pruner = make(model, optimizer=optimizers)  # type: ignore[call-arg]
    pruner.attach()
    assert pruner.attached


def test_what_is_frozen_needs_no_optimizer() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    pruner = weights(model, Magnitude(), schedule=OneShot())
    pruner.attach(sgd(model[2]))
    pruner.finish()
    assert zeros(model, pruner.masks())


def test_hooks_want_all_optimizers_only_where_the_model_shrinks_under_way() -> None:
    model = mlp()
    units(model, optimizer=sgd(model[0])).on_train_begin()
    with pytest.raises(ValueError, match=r"2\.weight.*does not hold it"):
        units(model, optimizer=sgd(model[0]), shrink="each_update").on_train_begin()


@pytest.mark.parametrize(
    ("criterion", "layer", "read"),
    [
        (Elementwise(decay=1.0), 0, lambda w, b: w.abs()),
        (Abs(decay=1.0), 2, lambda w, b: w.sum(0).abs()),
        (Weighted(decay=1.0), 0, lambda w, b: (w.sum(1) + b).abs()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_frozen_in_another_optimizers_step_is_scored_in_its_own(criterion: Any, layer: int, read: Any) -> None:
    model = mlp()
    optimizers = {0: sgd(model[0]), 2: sgd(model[2])}
    pruner = weights(model, criterion, schedule=NEVER, example_input=X[:2])
    pruner.attach(*optimizers.values())
    expected: Any = 0
    for at in (0, 2, 0, 2):  # as Lightning's toggle_optimizer does
        model[at].requires_grad_(True)
        model[2 - at].requires_grad_(False)
        optimizers[at].zero_grad()
        loss(model).backward()
        if at == layer:
            expected = expected + read(*((p * p.grad).detach() for p in model[at].parameters()))
        optimizers[at].step()
    torch.testing.assert_close(next(iter(pruner.scores().values())), expected)
    assert pruner.state_dict()["rules"][0]["scored"] == 2


# ---- an optimizer around another


@pytest.mark.parametrize("make", [lambda model: Wrapper(sgd(model)), Sam], ids=["lookahead", "sam"])
def test_state_inside_a_wrapper_follows(make: Callable[[nn.Module], Any]) -> None:
    found = []
    for shrink in ("at_end", "each_update"):
        model = mlp().double()
        optimizer = make(model)
        pruner = Pruner(
            model, Weighted(), target_sparsity=0.5, schedule=OneShot(start_epoch=1), steps_per_epoch=STEPS,
            example_input=X[:2].double(), shrink=shrink,
        )  # fmt: skip
        pruner.attach(optimizer)
        for _ in range(3 * STEPS):

            def again(model: nn.Module = model) -> Tensor:
                value = F.cross_entropy(model(X.double()), Y)
                value.backward()
                return value

            again()
            optimizer.step(again) if isinstance(optimizer, Sam) else optimizer.step()
            optimizer.zero_grad()
        assert (pruner.epoch, pruner.step) == (3, 0)
        assert model[0].out_features == (4 if shrink == "each_update" else 8)
        pruner.finish()
        found.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by_closure", [False, True])
def test_sam_is_scored_where_the_weights_are(by_closure: bool) -> None:
    model = mlp()
    optimizer = Sam(model)
    pruner = weights(model, schedule=NEVER)
    pruner.attach(optimizer)
    loss(model).backward()
    expected = (model[0].weight * model[0].weight.grad).abs().detach()
    if by_closure:
        optimizer.step(lambda: loss(model).backward())
    else:
        optimizer.first_step()
        loss(model).backward()
        optimizer.second_step()
    torch.testing.assert_close(pruner.scores()["0.weight"], expected)
    assert (pruner.step, pruner.state_dict()["rules"][0]["scored"]) == (1, 1)
    pruner.detach()
    assert "first_step" not in vars(optimizer)


def test_sam_does_not_perturb_what_is_pruned() -> None:
    model = mlp()
    optimizer = Sam(model)
    pruner = weights(model, Magnitude(), schedule=OneShot())
    pruner.attach(optimizer)
    loss(model).backward()
    optimizer.first_step()
    assert zeros(model, pruner.masks())


class Nested(torch.optim.SGD):
    """Its step calls its base class's, whose hooks torch runs too."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_the_step_of_a_base_class_is_no_step_of_its_own() -> None:
    model = mlp()
    sgd(model)  # makes torch put hooks into SGD.step
    optimizer = Nested(model.parameters(), lr=0.1)
    pruner = weights(model, schedule=NEVER)
    pruner.attach(optimizer)
    loss(model).backward()
    expected = (model[0].weight * model[0].weight.grad).abs().detach()
    optimizer.step()
    assert pruner.step == 1
    torch.testing.assert_close(pruner.scores()["0.weight"], expected)


def test_an_optimizer_without_hooks_is_refused() -> None:
    class Bare:
        def __init__(self, model: nn.Module) -> None:
            self.param_groups = [{"params": list(model.parameters())}]

        def step(self) -> None: ...

    model = mlp()
    with pytest.raises(ValueError, match="Bare has no step hooks"):
        weights(model).attach(Bare(model))  # type: ignore[arg-type]


@pytest.mark.parametrize("steps_per_epoch", [4, 120])
def test_an_epoch_without_a_step_is_told(steps_per_epoch: int) -> None:
    model = mlp()
    attached, other = sgd(model), sgd(model)
    pruner = weights(model, steps_per_epoch=steps_per_epoch)
    pruner.attach(attached)
    passes = max(steps_per_epoch, FEWEST)

    def train(count: int) -> None:
        for _ in range(count):
            loss(model).backward()
            other.step()
            other.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(passes - 1)
    with pytest.warns(UserWarning, match="SGD.*not made a step"):
        train(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(passes)
    with pytest.warns(UserWarning, match="ended at epoch 0"), refused("nothing was pruned", "no training step", "SGD"):
        pruner.finish()


def test_what_was_cut_is_cut_again_before_the_first_step() -> None:
    def attached() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = mlp()
        optimizer = sgd(model)
        pruner = units(model, schedule=OneShot(start_epoch=0), shrink="each_update")
        pruner.attach(optimizer)
        return model, optimizer, pruner

    model, optimizer, pruner = attached()
    for _ in range(2 * STEPS):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert model[0].out_features == 4  # type: ignore[index]
    other, _, resumed = attached()
    resumed.load_state_dict(pruner.state_dict())
    assert other[0].out_features == 4  # type: ignore[index]


def test_gradients_that_are_summed_up_are_no_epoch_without_a_step() -> None:
    model = mlp()
    optimizer = sgd(model)
    weights(model).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(300):
            loss(model).backward()
            if number % 64 == 63:
                optimizer.step()
                optimizer.zero_grad()


# ---- closures


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_is_scored_by_its_own_gradients(kind: Any, keyword: bool) -> None:
    model = mlp()
    optimizer = kind(model.parameters(), lr=0.1)
    pruner = weights(model, schedule=NEVER)
    pruner.attach(optimizer)
    expected = torch.zeros(8, 6)
    for part in (slice(0, 8), slice(8, 16)):
        seen = []

        def closure(part: slice = part, seen: list[Tensor] = seen) -> Tensor:
            optimizer.zero_grad()
            value = loss(model, part)
            value.backward()
            seen.append((model[0].weight * model[0].weight.grad).abs().detach())
            return value

        assert isinstance(optimizer.step(closure=closure) if keyword else optimizer.step(closure), Tensor)
        expected += seen[0]
    torch.testing.assert_close(pruner.scores()["0.weight"], expected)
    assert pruner.state_dict()["rules"][0]["scored"] == 2


def test_lbfgs_searches_among_masked_networks() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=8, line_search_fn="strong_wolfe")
    pruner = weights(model, Magnitude(), schedule=OneShot())
    pruner.attach(optimizer)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(zeros(model, pruner.masks()))
        value = loss(model)
        value.backward()
        return value

    before = float(loss(model).detach())
    for _ in range(3):
        optimizer.step(closure)
    assert len(seen) > 6
    assert all(seen)
    assert float(loss(model).detach()) < 0.5 * before


# ---- what is loaded, and who else has the weights


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [weights, units])
def test_weights_loaded_back_are_masked_at_once_and_in_the_end(make: Callable[..., Pruner], assign: bool) -> None:
    model = mlp()
    dense = copy.deepcopy(model.state_dict())
    dense["2.weight"][0, 0] = float("nan")
    pruner = make(model, schedule=OneShot(start_epoch=0.25))
    optimizer = sgd(model)
    pruner.attach(optimizer)
    loss(model).backward()
    optimizer.step()
    assert pruner.finished
    model.load_state_dict(dense, assign=assign)
    masks = pruner.masks()
    keep = masks["2.weight"] if "2.weight" in masks else masks["0"].expand(3, 8)
    assert torch.equal(model[2].weight != 0, keep)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    model = pruner.finish()
    assert zeros(model, masks) if "0.weight" in masks else model[2].weight.shape == (3, 4)


@pytest.mark.parametrize("parts", ["weights", "units", "both"])
def test_an_average_is_as_sparse_as_its_model(parts: str) -> None:
    model = mlp()
    average = copy.deepcopy(model)
    settings = {"steps_per_epoch": STEPS, "copies": [average]}
    rules = {"units": Rule(Abs(), target_sparsity=0.5), "weights": Rule(Elementwise(), target_sparsity=0.8)}
    chosen = [*rules.values()] if parts == "both" else [rules[parts]]
    pruner = Pruner(model, rules=chosen, schedule=OneShot(start_epoch=1), example_input=X[:2], **settings)
    optimizer = sgd(model)
    pruner.attach(optimizer)
    for step in range(3 * STEPS):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mine, other in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(other, 0.1)
        if step == 2 * STEPS:
            assert torch.equal(average[2].weight == 0, model[2].weight == 0)
            assert bool((average[2].weight == 0).any())
    pruner.finish()
    for mine, other in zip(average.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine == 0, other == 0)


def test_a_copy_of_single_weights_is_checked() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="shares parameters"):
        weights(model, copies=[model])
    with pytest.raises(ValueError, match=r"'0\.weight' differs between the model and a copy"):
        weights(model, copies=[nn.Linear(6, 8)])


@pytest.mark.parametrize("make", [weights, units])
@pytest.mark.parametrize("attach", [False, True])
def test_an_optimizer_of_tensors_that_were_replaced_is_refused(make: Callable[..., Pruner], attach: bool) -> None:
    model = mlp()
    dense = copy.deepcopy(model.state_dict())
    optimizer = sgd(model)
    pruner = make(model, optimizer=optimizer)
    pruner.attach() if attach else pruner.on_train_begin()
    model.load_state_dict(dense, assign=True)
    loss(model).backward()
    with pytest.raises(ValueError, match=r"0\.weight was replaced in the model .* the SGD optimizer trains what was"):
        optimizer.step() if attach else pruner.on_step_begin(0)


@pytest.mark.parametrize("make", [weights, units])
def test_a_layer_that_was_replaced_is_pruned_with_its_new_optimizer(make: Callable[..., Pruner]) -> None:
    model = mlp()
    pruner = make(model)
    pruner.attach(sgd(model))
    model[2] = nn.Linear(8, 3)
    pruner.detach()
    pruner.attach(optimizer := sgd(model))
    for _ in range(2 * STEPS):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = pruner.masks()
    kept = masks["2.weight"] if make is weights else masks["0"].expand(3, 8)
    assert torch.equal(model[2].weight != 0, kept)


class ScheduleFree(torch.optim.Optimizer):
    """Trains an average of two networks; `eval` puts that of the second's in the weights' place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.detach().clone())
            z.sub_(p.grad, alpha=0.1)
            p.lerp_(z, 0.5)

    @torch.no_grad()
    def eval(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.lerp_(self.state[p]["z"], -0.5)


def test_weights_that_an_optimizer_makes_of_its_state_stay_pruned() -> None:
    model = mlp()
    optimizer = ScheduleFree(model)
    pruner = weights(model)
    pruner.attach(optimizer)
    for _ in range(2 * STEPS):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    optimizer.eval()
    assert zeros(model, pruner.masks())


# ---- two pruners, copies of one


def test_a_second_pruner_takes_the_place_of_the_first() -> None:
    model = mlp()
    optimizer = sgd(model)
    first, second = weights(model), weights(model)
    first.attach(optimizer)
    with pytest.warns(UserWarning, match="SGD optimizer had another pruner of this model attached"):
        second.attach(optimizer)
    loss(model).backward()
    optimizer.step()
    assert (first.attached, second.attached) == (False, True)
    assert (first.step, second.step) == (0, 1)


def test_pruners_of_two_models_share_an_optimizer() -> None:
    a, b = mlp(), mlp()
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    pruners = [weights(a), weights(b)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pruner in pruners:
            pruner.attach(optimizer)
    (loss(a) + loss(b)).backward()
    optimizer.step()
    assert [pruner.step for pruner in pruners] == [1, 1]


def test_an_attached_pruner_lives_as_long_as_its_optimizer() -> None:
    model = mlp()
    optimizer = sgd(model)
    weights(model, Magnitude(), schedule=OneShot()).attach(optimizer)
    gc.collect()
    for _ in range(2):
        loss(model).backward()
        optimizer.step()
    assert int((model[0].weight == 0).sum() + (model[2].weight == 0).sum()) == 36


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch"])
@pytest.mark.parametrize("make", [weights, units])
def test_a_copied_pruner_goes_on_with_copies_of_all(make: Callable[..., Pruner], way: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    pruner = make(model, schedule=Cubic(end_epoch=2, update_frequency=0.5))
    pruner.attach(optimizer)

    def train(pruner: Pruner, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            loss(pruner.model).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(pruner, optimizer, 3)
    if way == "deepcopy":
        other, its = copy.deepcopy((pruner, optimizer))
    elif way == "pickle":
        other, its = pickle.loads(pickle.dumps((pruner, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((pruner, optimizer), file)
        file.seek(0)
        other, its = torch.load(file, weights_only=False)
    assert other.attached
    assert other.model is not model
    train(pruner, optimizer, 2 * STEPS)
    assert other.step == 3  # the copy has not moved
    train(other, its, 2 * STEPS)
    mine, theirs = pruner.finish(), other.finish()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(mask, other.masks()[name]) for name, mask in pruner.masks().items())


def test_a_copied_model_is_nobodys_to_prune() -> None:
    model = mlp()
    pruner = weights(model, Magnitude(), schedule=OneShot())
    pruner.attach(sgd(model))
    dense = mlp().state_dict()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(dense)
        assert bool((other[0].weight != 0).all())


# ---- skipped steps


RULE = Rule(Elementwise(), target_sparsity=0.5)
RULES: dict[str, list[Rule]] = {
    "none": [],
    "one": [RULE],
    "several": [replace(RULE, include=["0"]), replace(RULE, exclude=["0"])],
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("attach", [False, True])
def test_a_step_that_is_skipped_is_not_scored(rules: str, attach: bool) -> None:
    model = mlp()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    pruner = Pruner(model, rules=RULES[rules], schedule=NEVER, optimizer=optimizer, steps_per_epoch=STEPS)
    if attach:
        pruner.attach(optimizer)
    found = []
    for skipped in (0.0, 1.0, 0.0):
        loss(model).backward()
        optimizer.found_inf = torch.tensor(skipped)
        if not attach:
            pruner.on_before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        found.append(pruner.scores())
    assert [*found[0]] == (["0.weight", "2.weight"] if rules != "none" else [])
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])
        assert float(found[2][name].sum()) > float(found[1][name].sum()) > 0


@pytest.mark.parametrize("attach", [False, True])
def test_gradients_that_a_guard_has_judged_are_not_looked_through_again(attach: bool) -> None:
    """Finite ones whose sum is not: who sums them takes them for infinite."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(1e-30)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    pruner = Pruner(model, Elementwise(), target_sparsity=0.5, schedule=NEVER, optimizer=optimizer, steps_per_epoch=9)
    if attach:
        pruner.attach(optimizer)
    found = []
    for said in (None, torch.tensor(0.0), torch.tensor(1.0)):
        model.weight.grad = torch.full((1, 2), 3e38)
        if said is not None:
            optimizer.found_inf = said
        if not attach:
            pruner.on_before_optimizer_step()
        optimizer.step()
        found.append(pruner.scores()["weight"])
    assert not found[0].any()
    assert torch.equal(found[1], torch.full((1, 2), 1e-30) * 3e38)
    assert torch.equal(found[2], found[1])


# ---- a sparse model that is tuned


def test_masks_keep_a_sparse_model_sparse() -> None:
    model = mlp()
    sparse = weights(model, Magnitude(), schedule=OneShot())
    sparse.on_step_begin(0)
    sparse.finish()
    masks = sparse.masks()
    optimizer = sgd(model)
    pruner = Pruner.from_masks(model, masks, optimizer=optimizer)
    assert (pruner.sparsity, pruner.finished, pruner.horizon) == (0.5, True, 0)
    pruner.attach()
    before = float(loss(model).detach())
    for _ in range(5):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert zeros(model, masks)
    assert float(loss(model).detach()) < before
    model.load_state_dict(mlp().state_dict())
    assert zeros(pruner.finish(), masks)
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks().items())


def test_masks_of_units_are_cut_out_in_the_end() -> None:
    keep = torch.arange(8) % 4 != 0
    pruner = Pruner.from_masks(mlp(), {"0": keep}, example_input=X[:2])
    model = pruner.finish()
    assert pruner.plan is not None
    assert pruner.plan.kept["0.weight"][0].tolist() == [1, 2, 3, 5, 6, 7]
    assert model[0].out_features == 6


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "have one at least"),
        ({"0.weight": torch.ones(8, 6)}, r"mask of 0\.weight is torch\.float32"),
        ({"0.weight": torch.ones(8, 5, dtype=torch.bool)}, r"0\.weight has shape 8 x 6, the saved state 8 x 5"),
        ({"0.weight": torch.zeros(8, 6, dtype=torch.bool)}, r"the mask of 0\.weight keeps nothing"),
        ({"0.weight": torch.ones(8, 6, dtype=torch.bool, device="meta")}, r"the mask of 0\.weight has no values"),
        ({"0": torch.ones(8, dtype=torch.bool)}, "a mask of '0', which is no tensor of the model: give example_input"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruner.from_masks(mlp(), masks)
