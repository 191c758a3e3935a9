"""The pruner's hooks: when scores count, when a mask is due, what stays zero, what is refused; nothing waits."""

from __future__ import annotations

import copy
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import loops
import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gsprune import Pruner
from gsprune.criteria import Abs, Criterion, Elementwise, Fisher, Magnitude, Random, Weighted
from gsprune.formats.scores import load_scores, save_scores
from gsprune.pruner.pruner import no_pruning
from gsprune.schedules import Cubic, Linear, OneShot

STEPS = 4  # optimizer steps in an epoch of these tests


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(count: int, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def train(pruner: Any, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, *, begin: int = 0) -> None:
    loops.train(pruner, model, optimizer, lambda epoch: batches(STEPS, seed=epoch), first=begin, last=epochs)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)


def fill_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def scores(pruner: Pruner) -> dict[str, Tensor]:
    return pruner.state_dict()["rules"][0]["scores"]


# ---- scores


def test_accumulating_gradients_equals_the_large_batch() -> None:
    """4 backward passes of 4 samples with the loss divided by 4, against one of 16."""
    found = []
    for parts in (1, 4):
        model = mlp()
        pruner = Pruner(model, Elementwise(), target_sparsity=0.5, epochs=3)
        x, y = batches(1, size=16)[0]
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(model(xs), ys) / parts).backward()
        pruner.on_before_optimizer_step()
        found.append(scores(pruner))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-8)
        assert float(found[0][name].max()) > 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("criterion", [Elementwise(), Abs(), Weighted()], ids=lambda c: type(c).__name__)
def test_a_batch_with_a_bad_gradient_adds_nothing(criterion: Criterion, bad: float) -> None:
    model = mlp()
    pruner = Pruner(model, criterion, target_sparsity=0.5, epochs=3, example_input=torch.zeros(2, 6))
    fill_gradients(model)
    pruner.on_before_optimizer_step()
    before = scores(pruner)
    fill_gradients(model, seed=1)
    model[0].weight.grad[0, 0] = bad
    model[2].weight.grad[1, 3] = bad
    pruner.on_before_optimizer_step()
    assert all(torch.equal(before[name], after) for name, after in scores(pruner).items())
    assert pruner.state_dict()["rules"][0]["scored"] == 1


def test_a_step_the_gradient_scaler_skips_adds_nothing() -> None:
    """The optimizer skips a step whose gradients are inf, and so do we."""
    model = mlp()
    pruner = Pruner(model, Elementwise(), target_sparsity=0.5, schedule=Linear(end_epoch=9), steps_per_epoch=STEPS)
    assert loops.scored_under_a_scaler(pruner, model, sgd(model), batches(2)) == [0, 1]


@pytest.mark.slow
def test_a_compiled_kernel_gives_the_same_scores_and_masks() -> None:
    """Also in steps that do not count, of weights in another layout, and where a tensor has no gradient."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(20, 3))
        model = model.to(memory_format=torch.channels_last)
        pruner = build(Elementwise(compiled=compiled), model=model, schedule=OneShot(start_epoch=1))
        for step in range(4):
            fill_gradients(model, seed=step)
            if step == 1:
                model[0].weight.grad[0, 0, 0, 0] = math.nan
            if step == 2:
                model[2].weight.grad = None
            pruner._score(grad_scale=torch.tensor(8.0) if step == 3 else None)
        pruner.on_epoch_begin(1)
        pruner.on_step_begin(0)
        found.append((scores(pruner), {target.name: target.keep for target in pruner.targets}))
    (plain, kept), (fused, fused_kept) = found
    for name, keep in kept.items():
        assert torch.equal(keep, fused_kept[name])
        assert torch.allclose(plain[name][keep], fused[name][keep], rtol=1e-6)
        assert float(plain[name][keep].min()) > 0


def test_without_a_compiler_a_compiled_kernel_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("gsprune.pruner.compiled._kernel", broken)
    with pytest.raises(ValueError, match=r"compiled=True.*No working C\+\+ compiler"):
        build(Elementwise(compiled=True))


def test_a_compiled_kernel_is_refused_for_a_rule_that_it_does_not_compute() -> None:
    class Squared(Elementwise):
        def weights(self, weight: Tensor, grad: Tensor | None, *, name: str = "", out: Tensor | None = None) -> Tensor:
            return super().weights(weight, grad, name=name).square()

    build(Squared())
    with pytest.raises(ValueError, match=r"compiled=True.*Squared"):
        build(Squared(compiled=True))


def test_scores_are_taken_before_the_optimizer_step() -> None:
    """w(t) * g(t), not the ancestor's w(t+1) * g(t)."""
    model = mlp()
    pruner, optimizer = Pruner(model, Elementwise(), target_sparsity=0.5, epochs=3), sgd(model)
    fill_gradients(model)
    expected = (model[0].weight * model[0].weight.grad).abs().detach()
    pruner.on_before_optimizer_step()
    optimizer.step()
    torch.testing.assert_close(scores(pruner)["0.weight"], expected)
    assert not torch.allclose(expected, (model[0].weight * model[0].weight.grad).abs())


def test_each_batch_counts_once() -> None:
    model = mlp()
    pruner = Pruner(model, Elementwise(decay=1.0), target_sparsity=0.5, epochs=3)
    total = torch.zeros_like(model[0].weight)
    for seed in range(3):
        fill_gradients(model, seed)
        total += (model[0].weight * model[0].weight.grad).abs().detach()
        pruner.on_before_optimizer_step()
    torch.testing.assert_close(scores(pruner)["0.weight"], total)


def test_scoring_stops_with_the_final_mask() -> None:
    model = mlp()
    pruner = Pruner(model, Elementwise(), target_sparsity=0.5, schedule=OneShot())
    fill_gradients(model)
    pruner.on_before_optimizer_step()
    pruner.on_step_begin(1)
    assert pruner.finished
    before = scores(pruner)
    pruner.on_before_optimizer_step()
    assert all(torch.equal(before[name], after) for name, after in scores(pruner).items())


# ---- masks


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize("criterion", [Elementwise(), Abs(), Weighted()], ids=lambda c: type(c).__name__)
def test_pruned_weights_stay_exactly_zero(
    criterion: Criterion, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    """Momentum and decoupled weight decay revive what is only multiplied by a mask once."""
    model = mlp()
    optimizer = make_optimizer(model)
    pruner = Pruner(
        model, criterion, target_sparsity=0.5, schedule=Cubic(end_epoch=2), steps_per_epoch=STEPS,
        example_input=torch.zeros(2, 6), optimizer=optimizer,
    )  # fmt: skip
    train(pruner, model, optimizer, 4)
    assert pruner.sparsity == 0.5
    dead = model[2].weight if pruner.structured else torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    if pruner.structured:
        keep = pruner.masks()["0"]
        assert int(keep.sum()) == 4
        assert bool((dead[:, ~keep] == 0).all())
        assert bool((dead[:, keep] != 0).all())
    else:
        assert int((dead == 0).sum()) == 36


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_memory_of_pruned_weights_is_zeroed_at_the_update(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    model = mlp()
    optimizer = make_optimizer(model)
    pruner = Pruner(
        model, Elementwise(), target_sparsity=0.5, schedule=OneShot(start_epoch=1), steps_per_epoch=STEPS,
        optimizer=optimizer,
    )  # fmt: skip
    train(pruner, model, optimizer, 1)
    pruner.on_epoch_begin(1)
    pruner.on_step_begin(0)
    gone = ~pruner.masks()["0.weight"]
    states = [v for v in optimizer.state[model[0].weight].values() if v.shape == gone.shape]
    assert states
    for state in states:
        assert bool((state[gone] == 0).all())
        assert bool((state[~gone] != 0).any())


def test_reached_sparsity_is_the_asked_one_at_every_update() -> None:
    model = mlp()
    optimizer, reached = sgd(model), []
    pruner = Pruner(
        model, Elementwise(), target_sparsity=0.9, schedule=Cubic(end_epoch=2, update_frequency=0.5),
        steps_per_epoch=STEPS,
    )  # fmt: skip
    record = pruner.on_epoch_end
    pruner.on_epoch_end = lambda: (reached.append(pruner.sparsity), record())  # type: ignore[method-assign]
    train(pruner, model, optimizer, 3)
    total = 6 * 8 + 8 * 3
    wanted = [0.9 - 0.9 * (1 - t) ** 3 for t in (0.25, 0.75)] + [0.9]
    assert reached == [math.floor(s * total + 0.5) / total for s in wanted]
    assert pruner.updates == 4


def test_masks_only_grow() -> None:
    model = mlp()
    optimizer, seen = sgd(model), []
    pruner = Pruner(model, Elementwise(), target_sparsity=0.9, schedule=Cubic(end_epoch=4), steps_per_epoch=STEPS)
    for epoch in range(5):
        train(pruner, model, optimizer, epoch + 1, begin=epoch)
        seen.append(torch.cat([mask.flatten() for mask in pruner.masks().values()]))
    for before, after in itertools.pairwise(seen):
        assert bool((before | ~after).all())
    assert int((~seen[-1]).sum()) == math.floor(0.9 * 72 + 0.5)


def test_local_scope_reaches_the_sparsity_in_every_tensor_and_global_does_not() -> None:
    for scope, expected in (("local", {24 / 48, 12 / 24}), ("global", None)):
        model = mlp()
        model[0].weight.data.mul_(0.01)
        pruner = Pruner(model, Magnitude(), target_sparsity=0.5, schedule=OneShot(), scope=scope)  # type: ignore[arg-type]
        pruner.on_step_begin(0)
        shares = {value for name, value in pruner.report().items() if name.startswith("sparsity/")}
        assert pruner.sparsity == 0.5
        assert shares == (expected or {36 / 48, 0.0})


def test_min_kept_saves_a_tensor_from_going_empty() -> None:
    model = mlp()
    model[2].weight.data.mul_(1e-6)
    pruner = Pruner(model, Magnitude(), target_sparsity=0.9, schedule=OneShot(), min_kept=2)
    pruner.on_step_begin(0)
    assert int(pruner.masks()["2.weight"].sum()) == 2
    assert round(pruner.sparsity * 72) == 65


def test_per_channel_reaches_the_sparsity_in_every_row() -> None:
    model = mlp()
    pruner = Pruner(model, Magnitude(), target_sparsity=0.5, schedule=OneShot(), scope="local", per_channel=True)
    pruner.on_step_begin(0)
    assert [mask.sum(1).tolist() for mask in pruner.masks().values()] == [[3] * 8, [4] * 3]


def test_two_of_four_on_the_way_and_at_the_end() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    pruner = Pruner(model, Magnitude(), target_sparsity=0.5, pattern="2:4", exclude=["2"], schedule=Linear(end_epoch=3))
    for epoch, pruned in enumerate((6, 12, 18, 24)):
        pruner.on_epoch_begin(epoch)
        pruner.on_step_begin(0)
        keep = pruner.masks()["0.weight"].reshape(-1, 4)
        assert int((~keep).sum()) == pruned
        assert int(keep.sum(1).min()) >= 2
    assert keep.sum(1).tolist() == [2] * 12


@pytest.mark.parametrize("pattern", ["2x2", "4x1"])
def test_tiles_go_as_a_whole(pattern: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.Flatten(), nn.Linear(8, 4)).to(
        memory_format=torch.channels_last
    )
    pruner = Pruner(model, Magnitude(), target_sparsity=0.5, pattern=pattern, schedule=OneShot())
    pruner.on_step_begin(0)
    rows, cols = map(int, pattern.split("x"))
    for mask in pruner.masks().values():
        tiles = mask.flatten(1).reshape(mask.shape[0] // rows, rows, -1, cols)
        assert bool((tiles.float().mean((1, 3)) % 1 == 0).all())
    assert pruner.sparsity == 0.5
    zeros = sum(int((m.weight == 0).sum()) for m in (model[0], model[2]))
    assert zeros == (144 + 32) // 2


def test_channels_last_weights_get_the_masks_of_contiguous_ones() -> None:
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to(memory_format=layout)
        pruner = Pruner(model, Elementwise(), target_sparsity=0.7, schedule=OneShot())
        for parameter in model.parameters():
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
        pruner.on_before_optimizer_step()
        pruner.on_step_begin(1)
        found.append(({k: m.clone() for k, m in pruner.masks().items()}, model[0].weight.detach().clone()))
    assert all(torch.equal(found[0][0][name], mask) for name, mask in found[1][0].items())
    assert torch.equal(found[0][1], found[1][1])


def test_nothing_is_pruned_before_anything_was_scored() -> None:
    model = mlp()
    pruner = Pruner(model, Elementwise(), target_sparsity=0.5, schedule=OneShot(), steps_per_epoch=STEPS)
    pruner.on_step_begin(0)
    assert pruner.updates == 0
    fill_gradients(model)
    pruner.on_before_optimizer_step()
    pruner.on_step_begin(1)
    assert (pruner.updates, pruner.sparsity) == (1, 0.5)


def test_a_kept_count_for_each_kind() -> None:
    torch.manual_seed(0)
    model = nets.ViT()
    pruner = Pruner(
        model, Magnitude(), structured=True, keep={"heads": 3, "neurons": 4, "channels": None}, schedule=OneShot(),
        example_input=nets.images(2),
    )  # fmt: skip
    pruner.on_step_begin(0)
    kept = {name: value for name, value in pruner.report().items() if name.startswith("kept/")}
    assert kept == {
        "kept/blocks.0.attn": 3, "kept/blocks.0.fc1": 4, "kept/blocks.1.attn": 3, "kept/blocks.1.fc1": 4,
    }  # fmt: skip
    assert pruner.target_sparsity == pytest.approx((2 * 1 + 2 * 6) / (2 * 4 + 2 * 10))


def test_normalize_makes_a_global_ranking_fair() -> None:
    """One structure's scores are a thousand times the other's: without the norm it keeps everything."""
    kept = []
    for normalize in (False, True, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        pruner = Pruner(
            model, Abs(normalize=normalize), target_sparsity=0.5, scope="global", schedule=OneShot(),
            example_input=torch.zeros(2, 4),
        )  # fmt: skip
        fill_gradients(model)
        model[2].weight.grad *= 1000
        pruner.on_before_optimizer_step()
        pruner.on_step_begin(1)
        kept.append(pruner.report()["kept/0"])
    assert kept == [5.0, 2.0, 2.0]  # of 12, 6 go; the other structure keeps its min_kept of 1


def test_scores_are_normalized_by_their_mean_and_so_a_wide_structure_is_not_starved() -> None:
    """All units of both structures score the same: by the L2 norm the wide one's would lie below the narrow one's."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 2))
    pruner = Pruner(
        model,
        Abs(normalize=True),
        target_sparsity=0.5,
        scope="global",
        schedule=OneShot(),
        example_input=torch.ones(1, 4),
    )
    ramp = torch.linspace(1, 2, 40)
    pruner.load_scores({"0": 100 * torch.tensor([1.0, 1.25, 1.75, 2.0]), "2": ramp})
    pruner.on_step_begin(0)
    assert pruner.report() | {"kept/0": 2.0, "kept/2": 20.0} == pruner.report()


# ---- what stays of every structure, and which are ranked together


def one_shot(scores: Mapping[str, Tensor], **settings: Any) -> dict[str, int]:
    """Units kept of a pyramid of layers with those scores."""
    widths = [len(score) for score in scores.values()]
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise([4, *widths, 2])]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    criterion = Abs(normalize=False)
    pruner = Pruner(model, criterion, schedule=OneShot(), example_input=torch.ones(1, 4), **settings)
    pruner.load_scores(scores)
    pruner.on_step_begin(0)
    return {name: int(mask.sum()) for name, mask in pruner.masks().items()}


WEAK = {"0": torch.linspace(1, 2, 20), "2": torch.linspace(10, 20, 20), "4": torch.linspace(10, 20, 20)}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"target_sparsity": 0.5}, [2, 14, 14]),  # a tenth of the weak structure
        ({"target_sparsity": 0.9}, [1, 2, 3]),  # a tenth of all stays: half of that at least in each
        ({"target_sparsity": 0.5, "min_share": 0.25}, [5, 12, 13]),
        ({"target_sparsity": 0.5, "min_share": 0.0}, [1, 14, 15]),
        ({"target_sparsity": 0.5, "min_share": 0.0, "min_kept": 3}, [3, 13, 14]),
        ({"target_sparsity": 0.5, "min_kept": 3}, [3, 13, 14]),
    ],
)
def test_a_share_of_every_structure_stays_in_a_ranking_of_all(settings: dict[str, Any], kept: list[int]) -> None:
    found = one_shot(WEAK, scope="global", **settings)
    assert [found["0"], *sorted((found["2"], found["4"]))] == kept


def test_the_floor_of_single_weights_is_what_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    for share, left in ((None, 1), (0.0, 1), (0.05, 5)):
        pruner = Pruner(model, Elementwise(), target_sparsity=0.9, schedule=OneShot(), min_share=share)
        pruner.load_scores({"0.weight": torch.rand(10, 10), "2.weight": 2 + torch.rand(10, 10)})
        pruner.on_step_begin(0)
        assert [int(mask.sum()) for mask in pruner.masks().values()] == [left, 20 - left]


def test_like_structures_are_ranked_together_and_each_set_reaches_the_sparsity() -> None:
    """Heads score a thousandth of what neurons do; among the heads the second block's score more."""
    model = nets.ViT()
    settings: dict[str, Any] = {"target_sparsity": 0.5, "scope": "isomorphic", "example_input": nets.images(2)}
    pruner = Pruner(model, Abs(normalize=False), schedule=OneShot(), **settings)
    assert [[pruner.targets[i].name for i in names] for names in pruner.parts[0].together] == [
        ["blocks.0.attn", "blocks.1.attn"],
        ["blocks.0.fc1", "blocks.1.fc1"],
    ]
    ramp = torch.linspace(1, 2, 10)
    heads = 1e-3 * ramp[:4]
    pruner.load_scores(
        {"blocks.0.attn": heads, "blocks.1.attn": 2 * heads, "blocks.0.fc1": 2 * ramp, "blocks.1.fc1": ramp}
    )
    pruner.on_step_begin(0)
    kept = {name: int(mask.sum()) for name, mask in pruner.masks().items()}
    assert kept == {"blocks.0.attn": 1, "blocks.0.fc1": 9, "blocks.1.attn": 3, "blocks.1.fc1": 1}


# ---- the end of training


def test_units_are_cut_out_once_and_the_optimizer_follows() -> None:
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(
        model, Weighted(), target_sparsity=0.5, schedule=Cubic(end_epoch=1), steps_per_epoch=STEPS,
        example_input=torch.zeros(2, 6), optimizer=optimizer,
    )  # fmt: skip
    train(pruner, model, optimizer, 2)
    x = batches(1)[0][0]
    masked = model(x)
    pruner.on_train_end()
    pruner.on_train_end()
    assert (model[0].out_features, model[2].in_features) == (4, 4)
    torch.testing.assert_close(model(x), masked)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    train(Pruner(model, rules=[]), model, optimizer, 1)


def test_training_that_ends_early_gets_its_final_mask_and_says_so() -> None:
    model = mlp()
    pruner = Pruner(model, Elementwise(), target_sparsity=0.5, schedule=Cubic(end_epoch=9), steps_per_epoch=STEPS)
    train(pruner, model, sgd(model), 2)
    with pytest.warns(UserWarning, match="training ended at epoch 2, before the schedule did"):
        pruner.on_train_end()
    assert pruner.sparsity == 0.5


class Fixed(nn.Module):
    """Its forward pass refuses any other width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if x.numel() != 8 * len(x):
            raise RuntimeError("another width")
        return self.last(x)


def test_a_model_that_cannot_shrink_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"no units of Fixed .*first: the shrunk network does not (run|compute)"):
        Pruner(Fixed(), Weighted(), target_sparsity=0.5, epochs=3, example_input=torch.zeros(2, 6))


def test_a_run_without_a_usable_batch_is_an_error_and_not_a_dense_model() -> None:
    model = mlp()
    pruner = build(model=model)
    fill_gradients(model)
    model[0].weight.grad[0, 0] = math.nan
    pruner.on_before_optimizer_step()
    with (
        pytest.warns(UserWarning, match="training ended"),
        pytest.raises(ValueError, match="nothing was pruned: no batch with finite gradients was seen"),
    ):
        pruner.finish()


def test_less_than_the_asked_sparsity_is_told() -> None:
    pruner = build(Magnitude(), target_sparsity=0.9, scope="local", min_kept=20, schedule=OneShot())
    pruner.on_step_begin(0)
    with pytest.warns(UserWarning, match=r"the sparsity reached is 0\.444 instead of 0\.900: min_kept=20"):
        pruner.on_train_end()


def test_a_diverged_model_is_told_so() -> None:
    model = mlp()
    pruner = build(Magnitude(), model=model, structured=True, schedule=OneShot(), example_input=INPUT)
    pruner.on_step_begin(0)
    model[2].bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"not finite \(did training diverge\?\)"):
        pruner.on_train_end()


def test_a_model_that_moves_after_the_pruner_was_made_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    pruner = build(Magnitude(), model=model, schedule=OneShot())
    pruner.on_step_begin(0)
    model.to(memory_format=torch.channels_last)
    with pytest.raises(
        ValueError, match="changed its device or memory format: move the model before making the Pruner"
    ):
        pruner.on_step_end()


@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_optimizer_under_a_gradient_scaler_scores_like_any_other(fused: bool) -> None:
    """It gets scaled gradients, and skips by itself: scores must not see the scale, nor the batch that was skipped."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    later = Cubic(start_epoch=2, end_epoch=3)
    pruner = Pruner(
        model, Elementwise(decay=1.0), target_sparsity=0.5, schedule=later, steps_per_epoch=STEPS
    )  # fmt: skip
    pruner.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (x, y), (bad, _) = batches(2)
    bad[0, 0] = math.inf
    expected = torch.zeros(8, 6)
    for inputs in (x, bad, x):
        scaler.scale(F.cross_entropy(model(inputs), y)).backward()
        if inputs is x:
            expected += (model[0].weight * model[0].weight.grad / scaler.get_scale()).abs().detach()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(scores(pruner)["0.weight"], expected)
    assert pruner.state_dict()["rules"][0]["scored"] == 2


@pytest.mark.parametrize("criterion", [Abs(decay=0.5), Fisher(decay=0.5)])
def test_the_scale_of_a_fused_optimizers_gradients_is_divided_out(criterion: Criterion) -> None:
    """A squared gradient has it twice."""
    found = []
    for scale in (1.0, 1024.0):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
        later = Cubic(start_epoch=2, end_epoch=3)
        settings: dict[str, Any] = {"example_input": INPUT, "schedule": later, "steps_per_epoch": STEPS}
        pruner = Pruner(model, criterion, target_sparsity=0.5, **settings)
        pruner.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for x, y in batches(2):
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(torch.cat([*scores(pruner).values()]))
    assert found[0].all()
    torch.testing.assert_close(found[1], found[0])


def test_attaching_twice_is_refused() -> None:
    model = mlp()
    pruner = build(model=model, steps_per_epoch=STEPS)
    pruner.attach(sgd(model))
    with pytest.raises(ValueError, match="the pruner is attached already"):
        pruner.attach(sgd(model))


def test_attach_equals_the_hooks() -> None:
    by_hooks, attached = mlp(), mlp()
    settings: dict[str, Any] = {
        "target_sparsity": 0.6, "schedule": Cubic(end_epoch=2, update_frequency=0.5), "steps_per_epoch": STEPS,
    }  # fmt: skip
    optimizer = sgd(by_hooks)
    pruner = Pruner(by_hooks, Elementwise(), optimizer=optimizer, **settings)
    train(pruner, by_hooks, optimizer, 3)
    pruner.on_train_end()

    optimizer = sgd(attached)
    other = Pruner(attached, Elementwise(), **settings)
    other.attach(optimizer)
    for epoch in range(3):
        for x, y in batches(STEPS, seed=epoch):
            F.cross_entropy(attached(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert other.finish() is attached
    for a, b in zip(by_hooks.parameters(), attached.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (pruner.updates, pruner.sparsity) == (other.updates, other.sparsity)
    updates = other.updates
    optimizer.step()
    assert other.updates == updates  # the hooks are gone


@pytest.mark.parametrize("criterion", [Elementwise(), Weighted()], ids=lambda c: type(c).__name__)
def test_a_resumed_run_is_bit_identical(criterion: Criterion) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = mlp()
        optimizer = sgd(model)
        pruner = Pruner(
            model, criterion, target_sparsity=0.6, schedule=Cubic(end_epoch=3, update_frequency=0.75),
            steps_per_epoch=STEPS, example_input=torch.zeros(2, 6), optimizer=optimizer,
        )  # fmt: skip
        return model, optimizer, pruner

    model, optimizer, pruner = build()
    train(pruner, model, optimizer, 2)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], saved)
    train(pruner, model, optimizer, 4, begin=2)

    again, optimizer, resumed = build()
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    for part, state in zip((again, optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    train(resumed, again, optimizer, 4, begin=2)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, score in scores(pruner).items():
        assert torch.equal(score, scores(resumed)[name])
    assert pruner.updates == resumed.updates


# ---- scores from elsewhere


CRITERIA = [Elementwise(), Abs(), Weighted()]


def seen(model: nn.Module, pruner: Pruner, steps: int = 3) -> dict[str, Tensor]:
    for seed in range(steps):
        fill_gradients(model, seed)
        pruner.on_before_optimizer_step()
    return pruner.scores()


def ramp(*shape: int) -> Tensor:
    """0, 1, 2, ... in an order that is not the memory's."""
    count = math.prod(shape)
    return torch.randperm(count, generator=torch.Generator().manual_seed(1)).float().reshape(shape)


def test_the_first_update_prunes_exactly_the_lowest_loaded_scores() -> None:
    given = {"0.weight": ramp(8, 6), "2.weight": ramp(3, 8) + 0.5}
    pruner = build(schedule=OneShot(), scores=given)
    pruner.on_step_begin(0)  # no batch was seen
    assert (pruner.updates, pruner.sparsity) == (1, 0.5)
    everything = torch.cat([score.flatten() for score in given.values()])
    cut = everything.sort().values[36]
    for name, mask in pruner.masks().items():
        assert torch.equal(mask, given[name] >= cut)
    given["0.weight"].zero_()
    assert float(pruner.scores()["0.weight"].max()) == 47.0  # what was given stays the caller's


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_a_pruner_goes_on_from_scores_as_the_one_that_gathered_them(criterion: Criterion, tmp_path: Path) -> None:
    model = mlp()
    first = build(criterion, model=model, example_input=INPUT, schedule=OneShot(start_epoch=1))
    gathered = seen(model, first)
    path = tmp_path / "scores.safetensors"
    save_scores(path, gathered, criterion=type(criterion).__name__, steps=3)
    others = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scores in (gathered, path, str(path)):
            others.append(build(criterion, example_input=INPUT, schedule=OneShot(start_epoch=1), scores=scores))
    for pruner in (first, *others):
        fill_gradients(pruner.model, seed=9)
        pruner.on_before_optimizer_step()
        pruner.on_epoch_begin(1)
        pruner.on_step_begin(0)
        assert all(torch.equal(score, first.scores()[name]) for name, score in pruner.scores().items())
        assert all(torch.equal(mask, first.masks()[name]) for name, mask in pruner.masks().items())


def test_scores_are_finite_also_where_something_is_pruned() -> None:
    model = mlp()
    pruner = build(model=model, schedule=OneShot())
    before = seen(model, pruner)
    pruner.on_step_begin(1)
    for name, score in pruner.scores().items():
        assert torch.equal(score, before[name] * pruner.masks()[name])
    pruner.scores()["0.weight"].fill_(7.0)
    assert float(pruner.scores()["0.weight"].max()) < 7.0  # a copy


def test_loaded_scores_do_not_bring_back_what_is_pruned() -> None:
    model = mlp()
    pruner = build(model=model, target_sparsity=0.75, schedule=Linear(end_epoch=2))
    seen(model, pruner)
    pruner.on_epoch_begin(1)
    pruner.on_step_begin(0)
    gone = torch.cat([~mask.flatten() for mask in pruner.masks().values()])
    assert 0 < int(gone.sum()) < 54
    high = {name: torch.where(mask, ramp(*mask.shape), 100.0) for name, mask in pruner.masks().items()}
    pruner.load_scores(high)
    assert max(float(score.max()) for score in pruner.scores().values()) < 100
    pruner.on_epoch_begin(3)
    pruner.on_step_begin(0)
    after = torch.cat([~mask.flatten() for mask in pruner.masks().values()])
    assert int(after.sum()) == 54
    assert bool((after | ~gone).all())


def test_scores_do_not_depend_on_the_target() -> None:
    """A sweep takes them once for all its targets, and 0 may be among them."""
    found = []
    for target in (0.0, 0.5):
        model = mlp()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a target of 0 has no effect
            found.append(seen(model, build(model=model, target_sparsity=target)))
    assert all(torch.equal(score, found[1][name]) for name, score in found[0].items())
    assert float(found[0]["0.weight"].min()) > 0


def test_scores_that_are_zero_everywhere_count_as_no_batch() -> None:
    pruner = build(schedule=OneShot(), scores=build().scores())
    pruner.on_step_begin(0)
    assert pruner.updates == 0
    fill_gradients(pruner.model)
    pruner.on_before_optimizer_step()
    pruner.on_step_begin(1)
    assert pruner.updates == 1


def test_a_loaded_state_replaces_the_scores_it_was_built_with() -> None:
    model = mlp()
    earlier = build(model=model, schedule=OneShot(start_epoch=1))
    resumed = build(schedule=OneShot(start_epoch=1), scores={"0.weight": ramp(8, 6), "2.weight": ramp(3, 8)})
    resumed.load_state_dict(earlier.state_dict())
    assert resumed.state_dict()["rules"][0]["scored"] == 0
    resumed.on_epoch_begin(1)
    resumed.on_step_begin(0)
    assert resumed.updates == 0  # as that one it has seen no batch
    seen(model, earlier)
    resumed.load_state_dict(earlier.state_dict())
    assert all(torch.equal(score, earlier.scores()[name]) for name, score in resumed.scores().items())


def test_channels_last_takes_the_scores_of_a_contiguous_network(tmp_path: Path) -> None:
    found = []
    given = {"0.weight": ramp(4, 3, 3, 3)}
    save_scores(tmp_path / "scores", given, criterion="Elementwise", steps=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=layout)
        pruner = build(model=model, schedule=OneShot(), scores=tmp_path / "scores")
        assert torch.equal(pruner.scores()["0.weight"], given["0.weight"])
        pruner.on_step_begin(0)
        found.append(pruner.masks()["0.weight"])
        save_scores(tmp_path / "again", pruner.scores(), criterion="Elementwise", steps=1)
        assert torch.equal(load_scores(tmp_path / "again").scores["0.weight"], given["0.weight"] * found[-1])
    assert torch.equal(*found)
    assert torch.equal(found[0], given["0.weight"] >= 54)


def changed(**changes: Any) -> dict[str, Any]:
    """Scores that fit `mlp`, with some tensors replaced, added or (None) left out."""
    given = {"0.weight": ramp(8, 6), "2.weight": ramp(3, 8)}
    given |= {name.replace("_", "."): value for name, value in changes.items()}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            changed(**{"0_weight": None}),
            "they have none of '0.weight', which is pruned here; the nearest is '2.weight'",
        ),
        (changed(**{"2_weight": ramp(3, 7)}), "'2.weight' has shape [3, 8] here but [3, 7] in the scores"),
        (
            changed(**{"0_weight": ramp(16, 6), "2_weight": ramp(3, 16)}),
            "'0.weight' has shape [8, 6] here but [16, 6] in the scores",
        ),
        (changed(head=ramp(3)), "they have one of 'head', which is not pruned here"),
        (changed(**{"0_weight": ramp(8, 6).double()}), "'0.weight' is torch.float64, but scores are torch.float32"),
        (changed(**{"2_weight": ramp(3, 8) - 1}), "'2.weight' holds a negative value"),
        (changed(**{"2_weight": ramp(3, 8) / 0}), "'2.weight' holds a value that is not finite"),
        (changed(**{"0_weight": [1.0]}), "'0.weight' is a list, but scores are tensors"),
        ({}, "they have none of '0.weight', which is pruned here"),
    ],
)
def test_scores_of_something_else_are_refused_and_change_nothing(given: dict[str, Any], sentence: str) -> None:
    model = mlp()
    pruner = build(model=model)
    before = seen(model, pruner)
    for refused in (lambda: pruner.load_scores(given), lambda: build(scores=given)):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
            refused()
        assert str(error.value) == f"the scores do not fit: {sentence}"
    assert all(torch.equal(score, before[name]) for name, score in pruner.scores().items())
    assert pruner.state_dict()["rules"][0]["scored"] == 3


def test_scores_of_a_file_are_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    save_scores(path, {"0": ramp(9)}, criterion="Abs", steps=1)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
        build(Abs(), example_input=INPUT, scores=str(path))
    assert str(error.value) == f"the scores of {path} do not fit: '0' has shape [8] here but [9] in the scores"
    with pytest.raises(ValueError, match="scores is a float: it must map names to tensors, or be the path of a file"):
        build(scores=0.5)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        build(scores=tmp_path / "nowhere")


def test_scores_of_another_criterion_are_taken_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    save_scores(path, {"0": ramp(8)}, criterion="Weighted", steps=1)
    with pytest.warns(UserWarning, match="goes on from them here") as caught:
        pruner = build(Abs(), example_input=INPUT, scores=path)
    assert [str(w.message) for w in caught] == [f"the scores of {path} are of Weighted, but Abs goes on from them here"]
    assert caught[0].filename == __file__
    assert torch.equal(pruner.scores()["0"], ramp(8))


# ---- nothing waits


class NoHostCopies(TorchDispatchMode):
    """Raises on what makes the host wait for the device, or a shape depend on data."""

    SYNCS = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.SYNCS:
            raise AssertionError(f"{name} waits for the device")
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else (kwargs or {}).get("device") or source.device
            if torch.device(target) != source.device:
                raise AssertionError(f"{name} from {source.device} to {target}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("criterion", [Elementwise(), Abs(), Weighted()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_a_step_makes_no_host_copy(
    criterion: Criterion, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    model = nets.settle(nets.ResNet())
    optimizer = make_optimizer(model)
    pruner = Pruner(
        model, criterion, target_sparsity=0.5, schedule=Cubic(end_epoch=9, update_frequency=1), steps_per_epoch=STEPS,
        optimizer=optimizer, example_input=nets.images(2),
    )  # fmt: skip
    model(nets.images()).sum().backward()
    pruner.on_before_optimizer_step()
    pruner.on_epoch_begin(2)
    pruner.on_step_begin(0)  # masks are active from here on
    assert 0 < pruner.sparsity < 0.5
    with NoHostCopies():
        pruner.on_step_begin(1)
        pruner.on_before_optimizer_step()
        pruner.on_step_end()
    with pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"), NoHostCopies():
        torch.ones(()).item()


# ---- refused


def build(criterion: Criterion = Elementwise(), model: nn.Module | None = None, **settings: Any) -> Pruner:  # noqa: B008
    settings.setdefault("epochs", 3)
    settings.setdefault("target_sparsity", None if settings.get("pattern") == "2:4" or "keep" in settings else 0.5)
    return Pruner(model or mlp(), criterion, **settings)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


INPUT = torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: build(target_sparsity=1.0), "target_sparsity is 1.0: it must be in [0, 1)"),
        (
            lambda: build(include=["0.wieght"]),
            "include pattern '0.wieght' matches nothing that can be pruned; the nearest name is '0.weight'",
        ),
        (
            lambda: build(exclude=["conv*"]),
            "exclude pattern 'conv*' matches nothing that can be pruned; there are 0, 0.weight, 2, 2.weight",
        ),
        (lambda: build(exclude=["*"]), "nothing is left to prune: include is ['*'], exclude is ['*']"),
        (
            lambda: build(target_sparsity=0.7, pattern="2:4", include=["2"]),
            "target_sparsity is 0.7, but the pattern fixes it: it must be 0.5",
        ),
        (
            lambda: build(pattern="5x1"),
            "pattern 5x1 does not divide 0.weight, seen as 8 x 6: take another pattern, or exclude it",
        ),
        (lambda: build("Abs"), "criterion is a str: it must be a gsprune.criteria.base.Criterion"),
        (lambda: build(schedule=0.5), "schedule is a float: it must be a gsprune.schedules.Schedule"),
        (
            lambda: build(Elementwise(), structured=True, example_input=INPUT),
            "Elementwise cannot score units: set structured=false or take another criterion",
        ),
        (
            lambda: build(Abs(), structured=False),
            "Abs cannot score single weights: set structured=true or take another criterion",
        ),
        (lambda: build(Abs()), "pruning units needs example_input, a batch to trace the model with"),
        (
            lambda: build(Abs(), keep={"heads": 2}, example_input=INPUT),
            "keep names 'heads', but the model has neurons",
        ),
        (
            lambda: build(Abs(), keep={"neurons": 9}, example_input=INPUT),
            "keep asks for 9 neurons in 0, which has 8: it must be 1 to 8",
        ),
        (
            lambda: build(keep={"heads": 2}),
            "keep={'heads': 2} counts units, but Elementwise prunes single weights here",
        ),
        (
            lambda: build(Abs(), keep={"neurons": 2}, scope="global", example_input=INPUT),
            "keep counts units in each structure, which a scope of global does not: set scope to local",
        ),
        (lambda: build(scope="everywhere"), 'scope is \'everywhere\': it must be "local", "global" or "isomorphic"'),
        (lambda: build(min_share="0.1"), "min_share is '0.1', a str: it must be a number"),
        (
            lambda: build(min_share=0.2, target_sparsity=0.9),
            "min_share is 0.2, but 0.9 of all is to go: it must be at most 0.1",
        ),
        (lambda: build(min_kept=0), "min_kept is 0: it must be 1 or more"),
        (lambda: build(steps_per_epoch=0), "steps_per_epoch is 0: it must be 1 or more"),
        (lambda: build(include="0"), "include is '0': it must be a list of patterns, ['0']"),
        (lambda: Pruner(mlp(), Elementwise()), "target_sparsity is not set: give it to the Pruner, or to the schedule"),
        (
            lambda: build(model=nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), pattern="2x1"),
            "0.weight has its inputs as rows (a transposed convolution): it takes pattern 1x1 only",
        ),
        (
            lambda: build(per_channel=True),
            "per_channel needs scope local: with one ranking over all, channels do not reach a sparsity",
        ),
        (
            lambda: build(model=tied()),
            "0.weight and 2.weight are one tensor and would be pruned twice: exclude one of them",
        ),
        (
            lambda: build().attach(sgd(mlp())),
            "attach needs the pruner's steps_per_epoch, to know how far training is",
        ),
        (
            lambda: build(schedule=Cubic(start_epoch=2, end_epoch=1)),
            "end_epoch 1 is before start_epoch 2",
        ),
    ],
)
def test_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
        make()
    assert str(error.value) == sentence


# ---- gradients that are missing


FROZEN = (
    "{} never gets a gradient (requires_grad is False), and {} scores by gradients: exclude it, or take a criterion "
    "without, such as Magnitude"
)


@pytest.mark.parametrize(
    ("criterion", "frozen", "name"),
    [
        (Elementwise(), ["0.weight"], "0.weight"),
        (Elementwise(), ["0.weight", "2.weight"], "0.weight (and 1 more)"),
        (Abs(), ["2.weight"], "2.weight"),
        (Weighted(), ["0.bias"], "0.bias"),
    ],
    ids=["one", "two", "what Abs reads", "what Weighted reads"],
)
def test_what_is_frozen_is_refused_when_the_pruner_is_made_or_in_the_first_step(
    criterion: Criterion, frozen: list[str], name: str
) -> None:
    model, sentence = mlp(), FROZEN.format(name, type(criterion).__name__)
    early = build(criterion, model=model, example_input=INPUT)
    for tensor in frozen:
        model.get_parameter(tensor).requires_grad_(False)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        build(criterion, model=model, example_input=INPUT)
    model(INPUT + torch.ones(2, 6)).mul(torch.ones(2, 3, requires_grad=True)).sum().backward()
    with pytest.raises(ValueError, match=re.escape(sentence)):
        early.on_before_optimizer_step()


@pytest.mark.parametrize(("criterion", "frozen"), [(Abs(), "0.weight"), (Weighted(), "2.weight"), (Magnitude(), "*")])
def test_what_no_gradient_is_read_of_may_be_frozen(criterion: Criterion, frozen: str) -> None:
    model = mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not fnmatchcase(name, frozen))
    pruner = build(criterion, model=model, structured=True, example_input=INPUT, schedule=OneShot(), steps_per_epoch=1)
    if criterion.cumulative:
        model(torch.ones(2, 6)).sum().backward()
        pruner.on_before_optimizer_step()
    pruner.on_step_begin(0)
    assert pruner.sparsity == 0.5


def test_a_layer_may_be_frozen_after_its_first_gradient() -> None:
    model = mlp()
    pruner = build(Elementwise(decay=0.5), model=model)
    fill_gradients(model)
    pruner.on_before_optimizer_step()
    before = scores(pruner)
    model[0].weight.requires_grad_(False).grad = None
    pruner.on_before_optimizer_step()
    assert torch.equal(scores(pruner)["0.weight"], before["0.weight"])
    assert torch.allclose(scores(pruner)["2.weight"], 1.5 * before["2.weight"])


class Tasks(nn.Module):
    """A trunk and two heads, of which a batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor, task: str = "a") -> Tensor:
        hidden = self.trunk(x).relu()
        return torch.cat([self.a(hidden), self.b(hidden)], 1) if task == "both" else getattr(self, task)(hidden)


@pytest.mark.parametrize("criterion", [Elementwise(decay=0.5), Abs(decay=0.5), Weighted(decay=0.5)])
def test_a_missing_gradient_adds_nothing_and_lets_nothing_decay(criterion: Criterion) -> None:
    """Units of the trunk are read by both heads: what one of them does not say, the other does."""
    model = Tasks()
    pruner = build(criterion, model=model, example_input=(INPUT, "both"))
    x, wanted = torch.randn(4, 6), {}
    for task in "aba":
        model.zero_grad()
        model(x, task).square().sum().backward()
        changes = {}
        for name, target in zip(pruner.masks(), pruner.targets, strict=True):
            tensors = target.scored(criterion)
            if isinstance(criterion, Elementwise):
                change = None if tensors[name].grad is None else (tensors[name] * tensors[name].grad).abs()
            elif isinstance(criterion, Abs):
                read = [t for t in tensors.values() if t.grad is not None]
                change = sum((t * t.grad).sum(0) for t in read).abs()
            else:
                change = sum((t * t.grad).reshape(8, -1).sum(1) for t in tensors.values()).abs()
            if change is not None:
                changes[name] = 0.5 * wanted.get(name, 0.0) + change.detach()
        wanted |= changes
        pruner.on_before_optimizer_step()
    assert {*wanted} == {*scores(pruner)}
    for name, score in scores(pruner).items():
        assert torch.allclose(score, wanted[name], atol=1e-6), name


@pytest.mark.parametrize("block", [1, 5, 64])
def test_missing_gradients_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsprune.pruner.weights.BLOCK", block)
    model = Tasks()
    pruner = build(Elementwise(decay=0.5), model=model)
    fill_gradients(model)
    pruner.on_before_optimizer_step()
    before = scores(pruner)
    model.a.weight.grad = None
    pruner.on_before_optimizer_step()
    for name, score in scores(pruner).items():
        assert torch.allclose(score, before[name] * (1.0 if name == "a.weight" else 1.5)), name


def test_a_step_without_any_gradient_is_no_batch() -> None:
    model = Tasks()
    pruner = build(model=model, include=["b"], schedule=OneShot(), steps_per_epoch=4)
    model(torch.ones(1, 6), "a").sum().backward()
    pruner.on_before_optimizer_step()
    pruner.on_step_begin(1)
    assert (pruner.sparsity, pruner.updates) == (0.0, 0)
    model(torch.ones(1, 6), "b").sum().backward()
    pruner.on_before_optimizer_step()
    pruner.on_step_begin(2)
    assert (pruner.sparsity, pruner.updates) == (0.5, 1)


def test_a_mask_waits_for_the_first_gradient_of_everything_for_an_epoch() -> None:
    """Also over a restart; then it is an error that names what the loss does not use."""
    model = Tasks()
    pruner = build(model=model, schedule=OneShot(), steps_per_epoch=3)
    for step in range(2):
        pruner.on_step_begin(step)
        model(torch.ones(1, 6), "a").sum().backward()
        pruner.on_before_optimizer_step()
        assert pruner.updates == 0
    again = build(model=model, schedule=OneShot(), steps_per_epoch=3)
    again.load_state_dict(pruner.state_dict())
    for waiting in (pruner, again):
        waiting.on_step_begin(2)
        assert waiting.updates == 0
        waiting.on_before_optimizer_step()
        waiting.on_epoch_end()
        with pytest.raises(ValueError, match=r"^b\.weight had no gradient in 3 steps"):
            waiting.on_step_begin(0)


def test_what_never_had_a_gradient_is_named_at_the_end_of_a_short_training() -> None:
    model = Tasks()
    pruner = build(model=model, steps_per_epoch=100)
    model(torch.ones(1, 6), "a").sum().backward()
    pruner.on_before_optimizer_step()
    with (
        pytest.warns(UserWarning, match="training ended at epoch 0"),
        pytest.raises(ValueError, match=r"^b\.weight had no gradient in 1 steps"),
    ):
        pruner.on_train_end()


def test_a_score_that_overflowed_is_refused_by_name() -> None:
    model = mlp()
    pruner = build(Elementwise(decay=1.0), model=model, schedule=OneShot(start_epoch=1))
    for _ in range(2):
        fill_gradients(model)
        model[2].weight.data[0, 0] = 3e38
        model[2].weight.grad[0, 0] = 1.0
        pruner.on_before_optimizer_step()
    pruner.on_epoch_begin(1)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
        pruner.on_step_begin(0)
    assert str(error.value) == ("the score of 2.weight is not finite (inf): its gradients or weights grew too large")


def test_a_state_of_other_targets_is_refused() -> None:
    state = build(include=["0"]).state_dict()
    with pytest.raises(ValueError, match=r"do not have the same targets: 2\.weight is in one only"):
        build().load_state_dict(state)
    state = build().state_dict()
    state["rules"][0]["scores"]["2.weight"] = torch.zeros(3, 7)
    pruner = build()
    with pytest.raises(ValueError, match=r"2\.weight has shape 3 x 8, the saved state 3 x 7"):
        pruner.load_state_dict(state)
    assert float(pruner.targets[0].score.abs().max()) == 0.0  # nothing was taken over
    with pytest.raises(ValueError, match="this is not a pruner's state: it has no 'cut'"):
        pruner.load_state_dict({})
    for wrong in ("most", math.nan, 10**400):
        state = build().state_dict()
        state["rules"][0]["applied"][0] = wrong
        with pytest.raises(ValueError, match="'applied'"):
            build().load_state_dict(state)


@pytest.mark.parametrize(
    ("criterion", "share", "pruned", "lower", "higher"),
    [
        (Elementwise, lambda target: {"target_sparsity": target}, "80.0% of the weights", 0.3, 0.9),
        (Abs, lambda target: {"target_sparsity": target}, "80.0% of the neurons", 0.3, 0.9),
        (Abs, lambda target: {"budget": {"macs": 1 - target}}, "80.0% of the macs", 0.3, 0.9),
    ],
)
def test_a_state_with_more_pruned_than_is_asked_for_is_refused(
    criterion: type[Criterion], share: Callable[[float], dict[str, Any]], pruned: str, lower: float, higher: float
) -> None:
    """What is pruned does not come back: the result would be another than the asked one, in silence."""

    def make(target: float) -> Pruner:
        model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
        more: dict[str, Any] = {} if criterion is Elementwise else {"example_input": torch.zeros(2, 6)}
        return Pruner(model, criterion(), steps_per_epoch=1, schedule=OneShot(), **share(target), **more)

    pruner = make(0.8)
    fill_gradients(pruner.model)
    pruner.on_before_optimizer_step()
    pruner.on_step_begin(1)
    state = pruner.state_dict()
    assert pruner.updates == 1
    with pytest.raises(ValueError, match=rf"{re.escape(pruned)}.*{lower:.1%}"):
        make(lower).load_state_dict(state)
    for target in (0.8, higher):
        again = make(target)
        again.load_state_dict(state)
        assert again.sparsity == pruner.sparsity


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: build(schedule=Cubic(end_epoch=3)),
            "the schedule ends at epoch 3 of 3: the last of the pruning gets no training after it",
        ),
        (lambda: build(target_sparsity=0.0), "target_sparsity=0 has no effect: nothing will be pruned"),
        (lambda: no_pruning(mlp(), target_sparsity=0.5), "target_sparsity=0.5 has no effect: nothing is pruned here"),
        (lambda: no_pruning(mlp(), scores="nowhere"), "scores have no effect: nothing is pruned here"),
        (
            lambda: build(Magnitude(), scores="nowhere"),
            "scores have no effect: Magnitude computes its own when a mask is due",
        ),
        (lambda: build(Random()).load_scores({}), "scores have no effect: Random computes its own when a mask is due"),
    ],
)
def test_a_setting_without_effect_warns(make: Callable[[], object], sentence: str) -> None:
    with pytest.warns(UserWarning, match=sentence):
        make()


def test_sensible_settings_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for criterion in (Elementwise(), Abs(), Weighted(), Magnitude(), Random()):
            pruner = build(criterion, target_sparsity=0.5, example_input=INPUT)
            assert (pruner.target_sparsity, pruner.sparsity) == (0.5, 0.0)


def test_no_pruning_leaves_everything_alone() -> None:
    model, control = mlp(), mlp()
    train(Pruner(model, rules=[]), model, sgd(model), 2)
    optimizer = sgd(control)
    for epoch in range(2):
        for x, y in batches(STEPS, seed=epoch):
            F.cross_entropy(control(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), control.parameters(), strict=True))


def test_deep_copies_of_a_pruner_do_not_share_scores() -> None:
    pruner = build()
    twin = copy.deepcopy(pruner)
    fill_gradients(pruner.model)
    pruner.on_before_optimizer_step()
    assert float(twin.targets[0].score.max()) == 0.0 < float(pruner.targets[0].score.max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet"}, "model is a str: it must be a torch.nn.Module"),
        ({"criterion": "abs"}, "criterion is a str: it must be a gsprune.criteria.base.Criterion"),
        ({"keep": {"neurons": "4"}}, "keep.neurons is '4': it must be a whole number of units"),
        ({"keep": {"neurons": 4.5}}, "keep.neurons is 4.5: it must be a whole number of units"),
        ({"keep": {"neurons": True}}, "keep.neurons is True: it must be a whole number of units"),
    ],
)
def test_arguments_of_another_kind(arguments: dict[str, Any], message: str) -> None:
    settings = {"model": mlp(), "criterion": Abs(), "example_input": torch.ones(1, 6), **arguments}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Pruner(settings.pop("model"), settings.pop("criterion"), **settings)


@pytest.mark.parametrize("criterion", [Abs(), Elementwise()])
def test_another_models_optimizer_is_seen_before_training(criterion: Criterion) -> None:
    pruner = Pruner(
        mlp(), criterion, target_sparsity=0.5, example_input=torch.ones(1, 6), optimizer=sgd(mlp()), steps_per_epoch=1
    )
    message = "the SGD optimizer holds nothing of what is pruned: is it another model's?"
    with pytest.raises(ValueError, match=re.escape(message)):
        pruner.on_train_begin()


# ---- what scores and settings must not be


def test_equal_scores_are_told_by_name_or_refused() -> None:
    model = mlp()
    pruner = build(model=model, schedule=OneShot(start_epoch=1))
    fill_gradients(model)
    model[2].weight.grad.zero_()
    pruner.on_before_optimizer_step()
    pruner.on_epoch_begin(1)
    with pytest.warns(UserWarning, match=r"scores of 2\.weight are equal \(0\)"):
        pruner.on_step_begin(0)
    pruner = build(model=(model := mlp()), schedule=OneShot(start_epoch=1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.on_before_optimizer_step()
    pruner.on_epoch_begin(1)
    with pytest.raises(ValueError, match=r"all scores are equal \(0\) in 0\.weight"):
        pruner.on_step_begin(0)
    assert pruner.sparsity == 0


def test_an_update_that_prunes_nothing_more_is_none() -> None:
    model = mlp()
    pruner = build(Magnitude(), model=model, target_sparsity=0.1, schedule=Linear(end_epoch=99, update_frequency=1))
    masks = []
    for epoch in range(100):
        pruner.on_epoch_begin(epoch)
        pruner.on_step_begin(0)
        masks.append(round(pruner.sparsity * 72))
    assert pruner.updates == len(set(masks) - {0}) == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(Weighted, example_input=INPUT), r"criterion is the class Weighted: .* Weighted\(\.\.\.\)"),
        (lambda: build(schedule=Cubic), "schedule is the class Cubic: give an instance"),
        (lambda: build(target_sparsity="0.5"), "target_sparsity is '0.5', a str: it must be a number"),
        (lambda: build(target_sparsity=True), "target_sparsity is True, a bool"),
        (lambda: build(steps_per_epoch=2.5), "steps_per_epoch is 2.5, a float: it must be a whole number"),
        (lambda: build(min_kept="1"), "min_kept is '1', a str"),
        (lambda: build(min_kept=None), "min_kept is None, a NoneType: it must be a whole number"),
        (lambda: build(epochs="3"), "epochs is '3', a str"),
        (lambda: build(epochs=-1), "epochs is -1: it must be 0 or more, and finite"),
        (lambda: build(epochs=float("nan")), "epochs is nan"),
        (lambda: build(epochs=float("inf")), "epochs is inf"),
        (lambda: build(Abs(), keep=8, example_input=INPUT), "keep is 8: it must map kinds of units to how many stay"),
        (lambda: build(Abs(), kinds="neurons", example_input=INPUT), "kinds is 'neurons': it must list kinds of units"),
        (lambda: build(Abs(), kinds=[], example_input=INPUT), r"kinds is \[\]: it must list"),
        (lambda: build(Abs(), kinds=3, example_input=INPUT), "kinds is 3: it must list"),
        (lambda: build(Magnitude(), structured="false"), "structured is 'false', a str: it must be True or False"),
        (lambda: build(per_channel="no", scope="local"), "per_channel is 'no', a str: it must be True or False"),
        (lambda: build(include="0*"), r"include is '0\*': it must be a list of patterns"),
        (lambda: build(Abs(), include="0*", example_input=INPUT), r"include is '0\*': it must be a list of patterns"),
        (lambda: build(Abs(), exclude=None, example_input=INPUT), "exclude is None: it must be a list of patterns"),
        (lambda: build(exclude=[1]), r"exclude is \[1\]: it must be a list of patterns"),
        (lambda: build(copies=None), "copies is a NoneType: it must be a list of networks"),
        (lambda: build(copies=mlp()), "copies is a Sequential: it must be a list of networks"),
        (lambda: build(copies=["ema"]), "copies is str: it must be a list of networks"),
        (lambda: build(model=nn.Dropout()), "there is nothing in this model that could be pruned"),
        (lambda: build(Abs(), model=nn.Sequential(nn.ReLU()), example_input=INPUT), "there is nothing in this model"),
        (lambda: build(model=nn.Linear(2, 2, device="meta")), "the model is on the meta device"),
        (
            lambda: build(Abs(), model=nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)), example_input=INPUT),
            r"0\.weight has no shape yet",
        ),
        (
            lambda: build(Abs(), budget={"macs": 0.5}, target_sparsity=0.9, example_input=INPUT),
            r"budget=\{macs: 0\.5\} and target_sparsity=0\.9 both say",
        ),
        (
            lambda: build(Abs(), keep={"neurons": 4}, target_sparsity=0.9, example_input=INPUT),
            r"keep=\{'neurons': 4\} and target_sparsity=0\.9 both say",
        ),
        (lambda: build(Abs(), pattern="2x2", example_input=INPUT), "pattern and per_channel are for single weights"),
        (lambda: build(Abs(), per_channel=True, example_input=INPUT), "pattern and per_channel are for single weights"),
        (lambda: build(shrink="each_update"), "shrink=each_update has no effect on single weights"),
        (lambda: build(scope="isomorphic"), "scope isomorphic ranks like structures, but Elementwise prunes single"),
        (lambda: build(min_share=1.0), r"min_share is 1.0: it must be in \[0, 1\)"),
        (lambda: build(min_share=0.2, scope="local"), "min_share=0.2 has no effect under scope local"),
        (lambda: build(Abs(normalize=True), example_input=INPUT), "normalize has no effect under scope local"),
        (lambda: build(model=nn.Sequential(nn.Linear(0, 4))), r"0\.weight"),
        (lambda: build(model=nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))), r"0\.weight.*complex"),
        (
            lambda: build(
                Abs(),
                model=nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 2, dtype=torch.complex64)),
                example_input=torch.ones(1, 4, dtype=torch.complex64),
            ),
            r"0\.weight is complex",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_settings_and_models_that_cannot_be_meant(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_repr_is_a_few_lines() -> None:
    pruner = build(Abs(), example_input=INPUT, steps_per_epoch=STEPS)
    pruner.attach(sgd(pruner.model))
    pruner.skipped = {}
    assert repr(pruner).splitlines() == [
        "Pruner of 8 neurons in 1 structure, by Abs(decay=0.95, normalize=None), local",
        "  pruned: 0 of 8 (0.0 %), wanted: 50.0 %; the mask is not final",
        "  at epoch 0, 0 mask updates, attached to SGD",
    ]
    pruner.skipped = {"<b>x</b>": "no reason"}
    assert "left out: 1, such as '<b>x</b>'" in repr(pruner)
    assert "&lt;b&gt;x" in pruner._repr_html_()
    assert "<b>x</b>" not in pruner._repr_html_()
