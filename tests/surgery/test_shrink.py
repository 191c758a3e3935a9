"""Cutting units out: every way of coupling them, what stays as it was, and plans on disk."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, ClassVar

import nets
import pytest
import torch
import torch.nn.functional as F
from conformance import OUTPUT, Network, NetworkTester
from facts import refused
from torch import Tensor, nn

from gsprune.discovery.find import find_structures
from gsprune.structures.structure import Structure
from gsprune.surgery.apply import apply_cut
from gsprune.surgery.cut_plan import CutPlan, plan_cut
from gsprune.surgery.shrink import check_shrink, shrink

SEQUENCE = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
TINY = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
VIT = [
    (f"blocks.{i}.{name}", kind, n) for i in (0, 1) for name, kind, n in (("attn", "heads", 4), ("fc1", "neurons", 10))
]


def of_images(make: Callable[[], nn.Module], *channels: tuple[str, int], **options: Any) -> Network:
    return Network(make, nets.images(), [(name, "channels", units) for name, units in channels], **options)


class TestCouplings(NetworkTester):
    """Every way in which units hang together."""

    optimizers = ("sgd", "adamw")
    networks: ClassVar = {
        "mlp": Network(nets.mlp, TINY, [("0", "neurons", 8), ("2", "neurons", 5)], again=True),
        "resnet": of_images(nets.ResNet, ("stem", 8), ("conv1", 6), again=True, onnx=True),
        "flat": of_images(nets.flat, ("0", 4)),
        "flat-pool": of_images(lambda: nets.flat(2), ("0", 4)),
        "mobile": of_images(nets.Mobile, ("expand", 8), ("fc1", 4), again=True),
        "dense": of_images(nets.Dense, ("stem", 4), ("conv1", 6), ("conv2", 5), again=True),
        "cat-add": of_images(nets.CatAdd, ("a", 4), ("b", 6)),
        "cat-add-c-first": of_images(lambda: nets.CatAdd(first="c"), ("c", 4), ("b", 6)),
        "vit": Network(nets.ViT, nets.images(), VIT, {OUTPUT}, again=True, onnx=True),
        "vit-softmax": Network(lambda: nets.ViT(fused=False), nets.images(), VIT, {OUTPUT}),
        "bert": Network(
            lambda: nn.Sequential(nets.BertAttention(), nn.Linear(8, 2)),
            SEQUENCE,
            [("0", "heads", 4)],
            {OUTPUT, "the model's input"},
        ),
    }


def build(name: str) -> tuple[nn.Module, Tensor]:
    network = TestCouplings.networks[name]
    return network.build(), network.input()


def half(structures: tuple[Structure, ...]) -> list[Tensor]:
    """About half of the units of every structure, at random; the first is kept in none with more than two."""
    generator = torch.Generator().manual_seed(6)
    keeps = []
    for s in structures:
        order = torch.randperm(s.units, generator=generator)
        keeps.append(torch.zeros(s.units, dtype=torch.bool).index_fill_(0, order[: (s.units + 1) // 2], True))
    return keeps


def output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)  # type: ignore[no-any-return]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    F.mse_loss(output(model, x), torch.ones_like(output(model, x)) / 3).backward()
    optimizer.step()


def test_only_the_wanted_units_are_gone_and_order_stays() -> None:
    model, x = build("mlp")
    before = copy.deepcopy(model.state_dict())
    structures = find_structures(model, x).structures
    keeps = [torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool), torch.ones(5, dtype=torch.bool)]
    plan = shrink(model, structures, keeps, example_input=x)
    assert {name: {d: k.tolist() for d, k in cuts.items()} for name, cuts in plan.kept.items()} == {
        "0.weight": {0: [0, 2, 3, 6]},
        "0.bias": {0: [0, 2, 3, 6]},
        "2.weight": {1: [0, 2, 3, 6]},
    }
    assert torch.equal(model[0].weight, before["0.weight"][[0, 2, 3, 6]])
    assert torch.equal(model[0].bias, before["0.bias"][[0, 2, 3, 6]])
    assert torch.equal(model[2].weight, before["2.weight"][:, [0, 2, 3, 6]])
    assert torch.equal(model[2].bias, before["2.bias"])
    assert (model[0].in_features, model[0].out_features) == (6, 4)
    assert (model[2].in_features, model[2].out_features) == (4, 5)


def test_attributes_of_convolutions_norms_and_depthwise() -> None:
    model, x = build("mobile")
    structures = find_structures(model, x).structures
    keeps = [torch.arange(8) % 4 != 1, torch.tensor([True, False, True, True])]
    shrink(model, structures, keeps, example_input=x)
    conv = {n: (m.in_channels, m.out_channels, m.groups) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert conv == {
        "expand": (3, 6, 1),
        "depth": (6, 6, 6),
        "fc1": (6, 3, 1),
        "fc2": (3, 6, 1),
        "project": (6, 5, 1),
    }
    assert (model.bn1.num_features, model.bn2.num_features) == (6, 6)
    assert model.bn1.running_var.shape == (6,)
    assert "6" in repr(model.bn1)


def test_a_depthwise_convolution_down_to_one_channel() -> None:
    model, x = build("mobile")
    structures = find_structures(model, x, include=("expand",)).structures
    shrink(model, structures, [torch.arange(8) == 5], example_input=x)
    assert (model.depth.in_channels, model.depth.out_channels, model.depth.groups) == (1, 1, 1)
    output(model.train(), x).sum().backward()


def test_attributes_of_attention_flatten_and_prelu() -> None:
    model, x = build("vit")
    found = {s.name: s for s in find_structures(model, x).structures}
    shrink(model, [found["blocks.1.attn"]], [torch.tensor([False, True, True, True])], example_input=x)
    attn = model.blocks[1].attn
    assert (attn.num_heads, attn.head_dim) == (3, 3)
    assert [attn.q.out_features, attn.k.out_features, attn.v.out_features, attn.proj.in_features] == [9] * 4
    assert model.blocks[0].attn.num_heads == 4

    model, x = build("bert")
    shrink(model, find_structures(model, x).structures, [torch.tensor([1, 0, 0, 1]).bool()], example_input=x)
    assert (model[0].num_attention_heads, model[0].all_head_size, model[0].attention_head_size) == (2, 6, 3)

    model, x = build("flat-pool")
    shrink(model, find_structures(model, x).structures, [torch.tensor([1, 1, 0, 1]).bool()], example_input=x)
    assert (model[0].out_channels, model[1].num_parameters, model[4].in_features) == (3, 3, 48)


def test_concatenated_consumers_keep_what_all_structures_keep() -> None:
    model, x = build("dense")
    structures = find_structures(model, x).structures  # stem 4, conv1 6, conv2 5
    keeps = [torch.tensor([1, 0, 1, 1]), torch.tensor([0, 1, 1, 0, 1, 1]), torch.tensor([1, 1, 0, 0, 1])]
    plan = plan_cut(structures, [k.bool() for k in keeps])
    assert plan.kept["conv2.weight"][1].tolist() == [0, 2, 3, 5, 6, 8, 9]
    assert plan.kept["norm2.running_mean"][0].tolist() == [0, 2, 3, 5, 6, 8, 9]
    assert plan.kept["head.weight"][1].tolist() == [0, 1, 4, 5, 7, 8, 10, 11, 13, 14]
    assert dict(plan.sizes["conv2.weight"]) == {1: 10, 0: 5}


def test_an_all_true_keep_changes_nothing() -> None:
    model, x = build("vit")
    structures = find_structures(model, x).structures
    parameters = list(model.parameters())
    plan = shrink(model, structures, [torch.ones(s.units, dtype=torch.bool) for s in structures], example_input=x)
    assert plan.to_json() == {"tensors": {}, "attributes": {}}
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


# ---- what stays as it was


def test_parameters_keep_grad_flags_dtype_and_memory_format() -> None:
    model, x = nets.settle(nets.ResNet()).to(memory_format=torch.channels_last), nets.images()
    model.conv1.weight.requires_grad_(False)
    structures = find_structures(model, x).structures
    output(model, x).sum().backward()
    model.bn1.weight.grad = None
    grad = model.stem.weight.grad.clone()
    keep = torch.arange(8) % 2 == 0
    shrink(model, structures, [keep, torch.arange(6) < 4], example_input=x)
    assert torch.equal(model.stem.weight.grad, grad[keep])
    assert model.bn1.weight.grad is None
    assert not model.conv1.weight.requires_grad
    assert model.stem.weight.requires_grad
    assert model.stem.weight.dtype == torch.float32
    for conv in (model.stem, model.conv1, model.conv2):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not conv.weight.is_contiguous()
    assert model.head.weight.is_contiguous()


def test_optimizer_groups_keep_their_order_and_options() -> None:
    model, x = build("resnet")
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": weights}], lr=0.01)
    step(model, optimizer, x)
    names = {id(p): n for n, p in model.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    moment = optimizer.state[model.conv1.weight]["exp_avg"].clone()
    shrink(model, *_halved(model, x), example_input=x, optimizer=optimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == order
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    assert set(optimizer.state) == set(model.parameters())
    state = optimizer.state[model.conv1.weight]
    assert state["step"].item() == 1
    kept = [half(find_structures(*build("resnet")).structures)[i] for i in (1, 0)]
    assert torch.equal(state["exp_avg"], moment[kept[0]][:, kept[1]])


def test_adafactor_rows_and_columns_are_cut() -> None:
    model, x = build("mlp")
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, x)
    shrink(model, *_halved(model, x), example_input=x, optimizer=optimizer)
    state = optimizer.state[model[2].weight]
    assert (state["row_var"].shape, state["col_var"].shape) == ((3, 1), (1, 4))
    step(model, optimizer, x)


def _halved(model: nn.Module, x: Tensor) -> tuple[tuple[Structure, ...], list[Tensor]]:
    structures = find_structures(model, x).structures
    return structures, half(structures)


# ---- errors leave everything untouched


class FixedWidth(nn.Module):
    """Its forward pass makes a tensor of so many channels, by a name that no module is told."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1), nn.Linear(4 * 64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((F.relu(self.a(F.relu(self.good(x)))) + x.new_zeros(size=(1, 4, 8, 8))).flatten(1))


class Averaged(nn.Module):
    """Divides by the width: masked and shrunk both run and differ."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.b(hidden / self.a.out_features)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[object]:
    attributes = [
        {k: v for k, v in vars(m).items() if not k.startswith("_")} | {"_": [id(p) for p in m._parameters.values()]}
        for m in model.modules()
    ]
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    return [attributes, groups, [id(p) for p in optimizer.state], [p.tolist() for p in model.state_dict().values()]]


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (FixedWidth(), nets.images(2), r"the shrunk network does not run \(.*\); the model was left .*, exclude 'a'$"),
        (
            Averaged(),
            torch.randn(2, 6),
            "the shrunk network does not compute what the masked one does; the model was left as it was, exclude 'a'",
        ),
    ],
    ids=["shape", "value"],
)
def test_a_mismatch_leaves_model_and_optimizer_untouched(
    model: nn.Module, x: Tensor, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_structures(model, x)
    assert [s.name for s in found.structures if s.name == "a"] == []
    assert found.skipped["a"] in message or "does not run" in found.skipped["a"]
    monkeypatch.setattr("gsprune.discovery.find.sift_cuts", lambda masked, some: (list(some), {}))
    structures = find_structures(model, x).structures
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, x)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        shrink(model, structures, half(structures), example_input=x, optimizer=optimizer)
    assert snapshot(model, optimizer) == before
    with pytest.raises(ValueError, match=message):
        check_shrink(model, structures, half(structures), example_input=x)


def test_a_plan_applies_once_and_only_where_it_fits() -> None:
    model, x = build("resnet")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = shrink(model, *_halved(model, x), example_input=x)
    fresh, _ = build("resnet")
    apply_cut(fresh, plan)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    before = snapshot(model, optimizer)
    with refused("'stem.weight'", "length 8", "dimension 0", "(4, 3, 3, 3)"):
        apply_cut(model, plan)
    with refused("plan", "Mobile"):
        apply_cut(nets.Mobile(), plan)
    assert snapshot(model, optimizer) == before


def test_a_foreign_optimizer_shared_weights_and_hooked_parameters_are_refused() -> None:
    model, x = build("mlp")
    structures, keeps = _halved(model, x)
    other = torch.optim.SGD(nets.mlp().parameters(), lr=0.1)
    before = snapshot(model, other)
    with refused("SGD", "none of the parameters"):
        shrink(model, structures, keeps, example_input=x, optimizer=other)
    hook = model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with refused("'0.weight'", "hooks"):
        apply_cut(model, plan_cut(structures, keeps))
    hook.remove()
    assert snapshot(model, other) == before
    model.twin = nn.Linear(6, 8)
    model.twin.weight = model[0].weight
    with refused("'0.weight'", "shared"):
        apply_cut(model, plan_cut(structures, keeps))


def test_keeps_that_do_not_fit() -> None:
    model, x = build("mlp")
    structures, keeps = _halved(model, x)
    cases = [
        (keeps[:1], ["1 masks", "2 structures"]),
        ([keeps[0].int(), keeps[1]], ["'0'", "bool (8,)", "torch.int32 (8,)"]),
        ([keeps[0], keeps[0]], ["'2'", "bool (5,)", "torch.bool (8,)"]),
        ([keeps[0], keeps[1] & False], ["'2'", "all 5 units"]),
    ]
    for wrong, facts in cases:
        with refused(*facts):
            plan_cut(structures, wrong)


# ---- plans on disk


def test_a_plan_survives_json() -> None:
    import json

    model, x = build("vit")
    plan = plan_cut(*_halved(model, x))
    again = CutPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.to_json() == plan.to_json()
    assert again.attributes == {"blocks.0.attn.num_heads": 2, "blocks.1.attn.num_heads": 2}
    rebuilt, _ = build("vit")
    apply_cut(rebuilt, again)
    apply_cut(model, plan)
    assert torch.equal(output(rebuilt.eval(), x), output(model.eval(), x))


GOOD = {"tensors": {"a.weight": {"0": {"size": 4, "kept": [0, 2]}}}, "attributes": {"heads": 2}}


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ((), [], "it has no plan's two keys"),
        (("extra",), 1, "it has no plan's two keys"),
        (("tensors",), [], "'tensors' is not a mapping"),
        (("attributes",), None, "'attributes' is not a mapping"),
        (("attributes", "heads"), 2.0, "heads = 2.0 is not a positive integer"),
        (("attributes", "heads"), True, "heads = True is not a positive integer"),
        (("tensors", "a.weight"), {"9": {}}, "a.weight has dimensions other than 0 to 7"),
        (("tensors", "a.weight", "0"), {"kept": [1]}, "a.weight dimension 0 has no size and kept"),
        (("tensors", "a.weight", "0", "size"), 0, "the size of a.weight dimension 0 is not a positive integer"),
        (("tensors", "a.weight", "0", "kept"), [], "a.weight dimension 0 keeps nothing"),
        (("tensors", "a.weight", "0", "kept"), [0, 1.5], "a.weight dimension 0 keeps something that is not a list"),
        (("tensors", "a.weight", "0", "kept"), "02", "a.weight dimension 0 keeps something that is not a list"),
        (("tensors", "a.weight", "0", "kept"), [0, 4], "a.weight dimension 0 keeps positions outside 0..3"),
        (("tensors", "a.weight", "0", "kept"), [-1, 2], "a.weight dimension 0 keeps positions outside 0..3"),
        (("tensors", "a.weight", "0", "kept"), [2, 0], "the kept positions of a.weight dimension 0 are not ascending"),
        (("tensors", "a.weight", "0", "kept"), [2, 2], "the kept positions of a.weight dimension 0 are not ascending"),
    ],
)
def test_edited_plans_are_refused(path: tuple[str, ...], value: object, problem: str) -> None:
    data: object = copy.deepcopy(GOOD)
    assert CutPlan.from_json(data).to_json() == GOOD
    if not path:
        data = value
    else:
        *parents, last = path
        place = data
        for key in parents:
            place = place[key]  # type: ignore[index]
        place[last] = value  # type: ignore[index]
    with pytest.raises(ValueError, match=f"^not a cut plan: {re.escape(problem)}"):
        CutPlan.from_json(data)
