"""Repair against dense least-squares solutions, and that it never makes anything worse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn

from gsprune.discovery.find import find_structures
from gsprune.repair import RepairReport, least_squares
from gsprune.repair.gram import LACKS_NOTHING
from gsprune.surgery.cut_plan import CutPlan
from gsprune.surgery.shrink import mask_units, shrink

EXACT = [1e-12]  # damping: none to speak of


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def cut(
    dense: nn.Module, x: Any, share: float = 0.5, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module, CutPlan, nn.Module]:
    """dense, small, plan, masked: every structure without the first share of its units."""
    dense = nets.settle(dense).to(dtype)
    structures = find_structures(dense, x).structures
    assert structures
    keeps = [torch.arange(s.units) >= int(share * s.units) for s in structures]
    small, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    plan = shrink(small, structures, keeps, example_input=x)
    mask_units(masked, structures, keeps)
    return dense, small, plan, masked


def images(count: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def vectors(count: int = 60, width: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def fit_part(x: Tensor, held_back: float = 0.2) -> Tensor:
    """The samples that are not held back of one batch."""
    wanted = max(1, round(held_back * len(x)))
    gone = {int((i + 0.5) * len(x) / wanted) for i in range(wanted)}
    return x[[i for i in range(len(x)) if i not in gone]]


def read_by(model: nn.Module, name: str, x: Any, *, gave: bool = False) -> Tensor:
    """What a layer reads, or gives, in an ordinary pass."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, i, o: found.append(o if gave else i[0]))
    with hook, torch.no_grad():
        model(x)
    return found[0]


def reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """W (o, k) and b of y = x W^T + b by numpy, of rows x (m, k) and y (m, o)."""
    rows = np.concatenate([x.numpy(), np.ones((len(x), 1))], 1)
    solution = np.linalg.lstsq(rows, y.numpy(), rcond=None)[0]
    return torch.from_numpy(solution[:-1].T), torch.from_numpy(solution[-1])


def unfolded(conv: Any, x: Tensor) -> Tensor:
    """Rows of a 2D convolution, the slow way: (positions, in * kh * kw)."""
    columns = F.unfold(F.pad(x, conv._reversed_padding_repeated_twice), conv.kernel_size, conv.dilation, 0, conv.stride)
    return columns.transpose(1, 2).flatten(0, 1)


def test_linear_layers_are_those_of_numpy() -> None:
    dense, small, plan, _ = cut(nets.mlp(), vectors())
    x = vectors()
    before = copy.deepcopy(small)
    report = least_squares(small, dense, [x], plan, damping=EXACT)
    assert [layer.name for layer in report.repaired] == ["2", "4"]
    assert report.layers[0].name == "0"
    assert report.layers[0].reason == LACKS_NOTHING
    for name in ("2", "4"):  # each reads what the repaired layers before it give
        read, gave = read_by(small, name, fit_part(x)), read_by(dense, name, fit_part(x), gave=True)
        kept = plan.kept[f"{name}.weight"].get(0)
        weight, bias = reference(read, gave if kept is None else gave[:, kept])
        torch.testing.assert_close(small.get_submodule(name).weight, weight, rtol=0, atol=1e-8)
        torch.testing.assert_close(small.get_submodule(name).bias, bias, rtol=0, atol=1e-8)
    assert torch.equal(small[0].weight, before[0].weight)


class Convs(nn.Module):
    def __init__(self, second: nn.Module, *, spatial: int = 2) -> None:
        super().__init__()
        kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        self.a, self.b = kinds[spatial](3, 6, 3, padding=1), second
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.tanh(self.a(x))).flatten(1))


def built(model: nn.Module, x: Tensor) -> nn.Module:
    model.double()(x)
    return model


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 4, 3),
        nn.Conv2d(6, 4, 3, padding=1, stride=2),
        nn.Conv2d(6, 4, (3, 1), padding=(2, 0), dilation=(2, 1)),
        nn.Conv2d(6, 4, 3, padding="same"),
        nn.Conv2d(6, 4, 1),
    ],
    ids=["plain", "stride", "dilation", "same", "1x1"],
)
def test_convolutions_are_those_of_numpy(conv: nn.Conv2d) -> None:
    x = images()
    dense, small, plan, _ = cut(built(Convs(copy.deepcopy(conv)), x), x)
    report = least_squares(small, dense, [x], plan, damping=EXACT, layers=["b"])
    assert [layer.name for layer in report.repaired] == ["b"]
    read, gave = read_by(small, "b", fit_part(x)), read_by(dense, "b", fit_part(x), gave=True)
    gave = gave[:, plan.kept["b.weight"][0]]
    weight, bias = reference(unfolded(small.b, read), gave.movedim(1, -1).flatten(0, -2))
    torch.testing.assert_close(small.b.weight, weight.view_as(small.b.weight), rtol=0, atol=1e-8)
    torch.testing.assert_close(small.b.bias, bias, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_unfolded_rows_times_the_weight_are_the_convolution(spatial: int, mode: str) -> None:
    from gsprune.repair.gram import given_rows, matrix_of, read_rows

    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial]
    conv = kind(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode=mode, bias=False).double()
    x = torch.randn(2, 4, *(7, 6, 5)[:spatial], dtype=torch.float64)
    chosen = torch.tensor([0, 3, 4])
    for rows in (None, chosen):
        product = (read_rows(conv, x, rows).transpose(0, 1) @ matrix_of(conv).mT).transpose(0, 1)
        torch.testing.assert_close(product, given_rows(conv, conv(x), rows), rtol=0, atol=1e-12)


def test_without_a_bias_there_is_none() -> None:
    x = vectors()
    dense, small, plan, _ = cut(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)), x)
    least_squares(small, dense, [x], plan, damping=EXACT)
    read, gave = read_by(small, "2", fit_part(x)), read_by(dense, "2", fit_part(x), gave=True)
    weight = np.linalg.lstsq(read.numpy(), gave.numpy(), rcond=None)[0].T
    assert small[2].bias is None
    torch.testing.assert_close(small[2].weight, torch.from_numpy(weight), rtol=0, atol=1e-8)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.group = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.group(torch.tanh(self.a(x)))).mean((2, 3)))


def test_groups_are_fitted_one_by_one() -> None:
    x = images()
    dense = Grouped().double()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small.a.weight.mul_(0.5)
    report = least_squares(small, dense, [x], None, damping=EXACT, layers=["group"])
    assert [layer.name for layer in report.repaired] == ["group"]
    read, gave = read_by(small, "group", fit_part(x)), read_by(dense, "group", fit_part(x), gave=True)
    for g in range(4):
        mine = slice(2 * g, 2 * g + 2)
        rows = unfolded(nn.Conv2d(2, 2, 3, padding=1), read[:, mine])
        weight, bias = reference(rows, gave[:, mine].movedim(1, -1).flatten(0, -2))
        torch.testing.assert_close(small.group.weight[mine], weight.view(2, 2, 3, 3), rtol=0, atol=1e-8)
        torch.testing.assert_close(small.group.bias[mine], bias, rtol=0, atol=1e-8)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (nets.mlp, vectors),
    "resnet": (nets.ResNet, images),
    "mobile": (nets.Mobile, images),
    "dense": (nets.Dense, images),
    "cat-add": (nets.CatAdd, images),
    "flat": (nets.flat, lambda: images(64)),
    "vit": (nets.ViT, images),
}


def errors(report: RepairReport) -> dict[str, tuple[float, float]]:
    return {layer.name: (layer.before, layer.after) for layer in report.layers if not math.isnan(layer.after)}


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_equals_cut_after_repair(name: str) -> None:
    """The repaired columns, at their dense places in the masked network: both compute the same."""
    make, inputs = NETWORKS[name]
    x = inputs()
    dense, small, plan, masked = cut(make(), x)
    report = least_squares(small, dense, [x], plan)
    assert report.repaired
    tensors = dict(masked.named_parameters())
    for key, value in small.named_parameters():
        kept = plan.kept.get(key, {})
        places = [kept.get(dim, torch.arange(size)) for dim, size in enumerate(tensors[key].shape)]
        with torch.no_grad():
            tensors[key][torch.meshgrid(*places, indexing="ij")] = value
    torch.testing.assert_close(masked(x), small(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["64", "32", "bf16"])
def test_the_held_back_error_never_rises(name: str, dtype: torch.dtype) -> None:
    make, inputs = NETWORKS[name]
    x = inputs()
    dense, small, plan, _ = cut(make(), x)
    dense, small = dense.to(dtype), small.to(dtype)
    found = errors(least_squares(small, dense, x.to(dtype).split(2), plan))
    assert found
    assert all(after <= before for before, after in found.values())
    assert all(p.dtype == dtype for p in small.parameters())


def test_the_report_tells_the_true_error() -> None:
    x = vectors()
    dense, small, plan, _ = cut(nets.mlp(), x)
    batches = x.split(10)  # of 6 the one in the middle is held back
    layer = least_squares(small, dense, batches, plan).layers[-1]
    gave = [read_by(dense, "4", x, gave=True), read_by(small, "4", x, gave=True)]
    lacking = (gave[0] - gave[1])[30:40].square().sum(1).mean()
    assert layer.name == "4"
    assert layer.after == pytest.approx(float(lacking / gave[0].var(0, unbiased=False).sum()), rel=1e-9)
    assert layer.after < layer.before


def test_it_comes_nearer_to_the_dense_network_on_other_data() -> None:
    x = images(64)
    dense, small, plan, masked = cut(nets.ResNet(), x)
    least_squares(small, dense, x[:48].split(8), plan)
    before, after = (F.mse_loss(model(x[48:]), dense(x[48:])) for model in (masked, small))
    assert after < 0.5 * before


@pytest.mark.parametrize(
    "inputs",
    [
        torch.ones(40, 6).double(),
        torch.zeros(40, 6).double(),
        vectors(3),
        vectors(40)[:, :1].expand(40, 6),
    ],
    ids=["constant", "zero", "three samples", "rank one"],
)
def test_singular_moments_do_no_harm(inputs: Tensor) -> None:
    dense, small, plan, _ = cut(nets.mlp(), vectors())
    found = errors(least_squares(small, dense, [inputs], plan, damping=[0.0, 1e-2]))
    assert set(found) == {"0", "2", "4"}
    assert all(after <= before for before, after in found.values())
    assert all(bool(p.isfinite().all()) for p in small.parameters())


def unchanged(small: nn.Module, before: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(small.parameters(), before.parameters(), strict=True))


def test_of_one_sample_nothing_is_held_back_and_nothing_repaired() -> None:
    dense, small, plan, _ = cut(nets.mlp(), vectors())
    before = copy.deepcopy(small)
    report = least_squares(small, dense, [vectors(1)], plan)
    assert unchanged(small, before)
    assert set(report.left) == {"0", "2", "4"}


def test_values_that_are_not_finite_leave_the_layer() -> None:
    dense, small, plan, _ = cut(nets.mlp(), vectors())
    before, x = copy.deepcopy(small), vectors()
    x[3, 2] = math.nan
    report = least_squares(small, dense, [x], plan)
    assert unchanged(small, before)
    assert set(report.left) == {"0", "2", "4"}


def test_half_precision() -> None:
    x = images()
    dense, small, plan, _ = cut(nets.ResNet(), x)
    dense, small = dense.to(torch.float16), small.to(torch.float16)
    report = least_squares(small, dense, x.half().split(4), plan)
    assert {"conv1", "conv2", "head"} <= {layer.name for layer in report.repaired}
    assert all(layer.after < layer.before for layer in report.repaired)


def test_the_dense_network_stays_as_it_was() -> None:
    x = images()
    dense, small, plan, _ = cut(nets.ResNet(), x)
    dense.train(), small.train()
    before = copy.deepcopy(dense.state_dict())
    buffers = {name: value.clone() for name, value in small.named_buffers()}
    least_squares(small, dense, [x], plan)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in small.named_buffers())
    assert dense.training
    assert small.bn1.training


def test_labels_are_not_used() -> None:
    x = vectors()
    dense, small, plan, _ = cut(nets.mlp(), x)
    other = copy.deepcopy(small)
    least_squares(small, dense, [(x, torch.zeros(len(x)))], plan)
    least_squares(other, dense, [{"input": x, "labels": torch.zeros(len(x))}], plan)
    assert unchanged(small, other)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.b(torch.relu(self.a(x))))
        return self.c(x)


def test_a_layer_that_is_called_twice_is_left() -> None:
    x = vectors()
    dense = Twice().double()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small.a.weight.mul_(0.8)
    report = least_squares(small, dense, [x], layers=["b", "c"])
    assert set(report.left) == {"b"}
    assert [layer.name for layer in report.repaired] == ["c"]
    assert torch.equal(small.b.weight, dense.b.weight)


def test_after_an_error_everything_is_as_it_was() -> None:
    dense, small, plan, _ = cut(nets.mlp(), vectors())
    before = copy.deepcopy(small)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken here")

    small[3].register_forward_hook(fail)
    with refused("broken here", error=RuntimeError):
        least_squares(small, dense, [vectors()], plan)
    assert unchanged(small, before)


def test_what_is_refused() -> None:
    dense, small, plan, _ = cut(nets.mlp(), vectors())
    with refused("no batches"):
        least_squares(small, dense, [], plan)
    with refused("held_back", "1.5"):
        least_squares(small, dense, [vectors()], plan, held_back=1.5)
    with refused("damping", "-1"):
        least_squares(small, dense, [vectors()], plan, damping=[-1])
    with refused("layers", "some"):
        least_squares(small, dense, [vectors()], plan, layers="some")  # type: ignore[arg-type]
    with refused("layers", "'nine'"):
        least_squares(small, dense, [vectors()], plan, layers=["nine"])
    with refused("0.weight", "(4, 6)", "(8, 6)"):
        least_squares(small, dense, [vectors()], None)
    with refused("share parameters"):
        least_squares(dense, dense, [vectors()], None)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_padding_is_not_fitted() -> None:
    """What stands at padded positions does not change the repair."""
    x = torch.randn(40, 5, 4, dtype=torch.float64)
    mask = (torch.arange(5) < torch.randint(2, 6, (40, 1))).long()
    dense = Padded().double()
    small, other = copy.deepcopy(dense), copy.deepcopy(dense)
    for model in (small, other):
        with torch.no_grad():
            model.b.weight[:, :6] = 0
    least_squares(small, dense, [{"x": x, "attention_mask": mask}])
    least_squares(other, dense, [{"x": x + 100 * (1 - mask[:, :, None]), "attention_mask": mask}])
    assert not torch.equal(small.b.weight, dense.b.weight)
    torch.testing.assert_close(small.b.weight, other.b.weight, rtol=0, atol=1e-12)


def test_an_attention_that_stays_whole_does_not_end_the_repair_of_the_others() -> None:
    """PyTorch's own reads the weight of its last layer past the module; one that lost heads calls that."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 3).eval()
    x = torch.randn(64, 5, 16)
    structures = [s for s in find_structures(model, x[:2]).structures if s.kind == "heads"]
    small = copy.deepcopy(model)
    plan = shrink(small, structures[1:2], [torch.tensor([True, False, True, False])], example_input=x[:2])
    report = least_squares(small, model, [x], plan)
    names = [layer.name for layer in report.repaired]
    assert "layers.1.self_attn.out_proj" in names
    assert {layer.name for layer in report.layers if "differ" in (layer.reason or "")} == set()
