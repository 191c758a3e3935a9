"""Every path that differs by device, on a real one.

    pytest -m cuda tests/cuda                 # on a machine with a GPU
    pytest -m cuda tests/cuda --device cpu    # the same tests on the CPU, but those of CUDA alone

Left out by default. `tests/pruner/test_targets.py` and `tests/repair/test_on_cuda.py` pretend a device and always run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loops
import nets
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import gsprune
from gsprune import Pruner
from gsprune.app.memory import is_out_of_memory
from gsprune.criteria import PLATON, Abs, Criterion, Elementwise, Fisher, Movement, Weighted
from gsprune.export.semi_structured import to_semi_structured
from gsprune.latency import compare
from gsprune.schedules import Linear
from gsprune.zoo.models import vit_tiny

pytestmark = pytest.mark.cuda

STEPS = 4
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd, foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}
CRITERIA: list[Criterion] = [Elementwise(), PLATON(), Movement(), Abs(), Weighted(), Fisher()]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    wanted = torch.device(request.config.getoption("--device"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return wanted


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("of CUDA alone")
    return device


@pytest.fixture
def one_process(device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[torch.device]:
    """A process group of this process alone: NCCL on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield device
    dist.destroy_process_group()


def data(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(STEPS, 8, 3, 8, 8, generator=generator),
        torch.randint(0, 4, (STEPS, 8), generator=generator),
    )
    return [*zip(x.to(device), y.to(device), strict=True)]


def net(device: torch.device, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return nets.settle(nets.ResNet()).to(device, **settings)


def make_pruner(model: nn.Module, criterion: Criterion, optimizer: Any = None, **settings: Any) -> Pruner:
    given = {"target_sparsity": 0.5, "schedule": Linear(end_epoch=2, update_frequency=0.5)} | settings
    given |= {"example_input": nets.images(2)} if criterion.scores_units else {}
    return Pruner(model, criterion, optimizer=optimizer, steps_per_epoch=STEPS, **given)


def train(
    model: nn.Module,
    pruner: Pruner,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    epochs: int = 3,
    before: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    loops.train(pruner, model, optimizer, lambda _: [(before(x), y) for x, y in data(device)], last=epochs)


def assert_pruned_weights_are_zero(model: nn.Module, pruner: Pruner) -> None:
    """Of units what reads them."""
    members = {t.structure.name: t.structure.consumers for t in pruner.unit_targets}
    for name, keep in pruner.masks().items():
        for member in members.get(name, ()):
            weight = model.get_parameter(member.tensor)
            gone = member.index[~keep.cpu()].flatten().to(weight.device)
            assert not weight.index_select(member.dim, gone).any(), member.tensor
        if name not in members:
            weight = model.get_parameter(name)
            assert not weight[~keep.to(weight.device)].any(), name


# ---- a training step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_training_ends_at_the_target_with_zeros_that_stay(
    device: torch.device, criterion: Criterion, optimizer: str
) -> None:
    model = net(device)
    steps = OPTIMIZERS[optimizer](model.parameters())
    pruner = make_pruner(model, copy.deepcopy(criterion), steps)
    train(model, pruner, steps, device)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.07)
    assert_pruned_weights_are_zero(model, pruner)
    assert all(score.device.type == device.type for score in pruner.scores().values())


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_the_device_and_the_cpu_choose_the_same(device: torch.device, criterion: Criterion) -> None:
    """Given gradients, so that no rounding of a backward pass decides."""
    chosen = []
    for place in (torch.device("cpu"), device):
        model = net(place)
        pruner = make_pruner(model, copy.deepcopy(criterion))
        generator = torch.Generator().manual_seed(3)
        for epoch in range(3):
            pruner.on_epoch_begin(epoch)
            for step in range(STEPS):
                pruner.on_step_begin(step)
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(place)
                pruner.on_before_optimizer_step()
                pruner.on_step_end()
            pruner.on_epoch_end()
        chosen.append({name: keep.cpu() for name, keep in pruner.masks().items()})
    assert chosen[0].keys() == chosen[1].keys()
    for name, keep in chosen[0].items():
        assert float((keep != chosen[1][name]).double().mean()) <= 0.01, name


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_the_hooks_of_a_step_never_wait_for_the_device(cuda: torch.device, criterion: Criterion) -> None:
    model = net(cuda)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = make_pruner(model, copy.deepcopy(criterion), optimizer, schedule=Linear(end_epoch=50))
    train(model, pruner, optimizer, cuda, epochs=2)  # masks are active, scores still grow
    pruner.on_epoch_begin(2)
    pruner.on_step_begin(0)  # an update, which may wait
    x, y = data(cuda)[0]
    F.cross_entropy(model(x), y).backward()
    scored = pruner.state_dict()["rules"][0]["scored"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        pruner.on_before_optimizer_step()
        pruner.on_step_end()
        pruner.on_step_begin(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pruner.state_dict()["rules"][0]["scored"] == scored + 1


def test_a_step_that_the_gradient_scaler_skips_adds_nothing(device: torch.device) -> None:
    model = net(device)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = make_pruner(model, Elementwise(), schedule=Linear(end_epoch=9))
    assert loops.scored_under_a_scaler(pruner, model, optimizer, data(device)[:2]) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_optimizer_under_autocast_and_a_scaler(device: torch.device, dtype: torch.dtype) -> None:
    model = net(device)
    optimizer = OPTIMIZERS["adamw, fused"](model.parameters())
    pruner = make_pruner(model, Weighted())
    pruner.attach(optimizer)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for _ in range(3):
        for x, y in data(device):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=dtype):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert pruner.sparsity == pytest.approx(0.5, abs=0.07)
    assert_pruned_weights_are_zero(model, pruner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", [Elementwise(), Weighted()], ids=lambda c: type(c).__name__)
def test_channels_last_and_bfloat16_weights(device: torch.device, dtype: torch.dtype, criterion: Criterion) -> None:
    model = net(device, dtype=dtype, memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = make_pruner(model, criterion, optimizer)
    train(model, pruner, optimizer, device, before=lambda x: x.to(dtype, memory_format=torch.channels_last))
    assert pruner.sparsity == pytest.approx(0.5, abs=0.07)
    assert_pruned_weights_are_zero(model, pruner)
    assert model.get_parameter("stem.weight").is_contiguous(memory_format=torch.channels_last)


def test_a_captured_forward_and_backward_pass(cuda: torch.device) -> None:
    """The graph replays on the same tensors, which the hooks write into."""
    model = net(cuda)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = make_pruner(model, Elementwise(), optimizer)
    x, y = data(cuda)[0]
    captured = torch.cuda.make_graphed_callables(model, (x,))
    for epoch in range(3):
        pruner.on_epoch_begin(epoch)
        for step in range(STEPS):
            pruner.on_step_begin(step)
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(captured(x), y).backward()
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_step_end()
        pruner.on_epoch_end()
    assert pruner.sparsity == pytest.approx(0.5, abs=0.07)
    assert_pruned_weights_are_zero(model, pruner)


# ---- cutting


@pytest.mark.parametrize("shrink", ["at_end", "each_update"])
def test_the_cut_network_computes_what_the_masked_one_does(device: torch.device, shrink: Any, tmp_path: Path) -> None:
    model = net(device)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = make_pruner(model, Weighted(), optimizer, shrink=shrink)
    train(model, pruner, optimizer, device)
    x = nets.images(4).to(device)
    masked = model.eval()(x)
    pruner.on_train_end()
    torch.testing.assert_close(model(x), masked, rtol=1e-4, atol=1e-4)
    assert model.get_parameter("conv1.weight").shape[0] == 3
    for parameter in model.parameters():
        moved = optimizer.state.get(parameter, {}).get("momentum_buffer")
        assert moved is None or (moved.shape, moved.device) == (parameter.shape, parameter.device)
    gsprune.save_pruned(tmp_path, model, pruner.plan)
    loaded = gsprune.load_pruned(tmp_path, nets.ResNet()).eval()
    torch.testing.assert_close(loaded(x.cpu()), model.cpu()(x.cpu()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_network_is_cut_and_repaired_where_it_lies(device: torch.device, dtype: torch.dtype) -> None:
    dense = net(device, dtype=dtype).eval()
    batches = [(x.to(dtype), y) for x, y in data(device)]
    cut = gsprune.cut(dense, batches, F.cross_entropy, macs=0.5, progress=False)
    assert {p.device.type for p in cut.model.parameters()} == {device.type}
    assert cut.small.macs < 0.6 * cut.dense.macs
    assert all(math.isfinite(layer.after) and layer.after <= layer.before for layer in cut.repaired.repaired)


@pytest.mark.parametrize("pattern", ["1x1", "2:4"])
def test_single_weights_of_a_trained_network(device: torch.device, pattern: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(device)
    batches = [torch.randn(64, 16) for _ in range(2)]
    amount: dict[str, Any] = {"sparsity": 0.5} if pattern == "1x1" else {}
    found = gsprune.cut(dense, batches, pattern=pattern, progress=False, **amount)
    assert found.report.sparsity == pytest.approx(0.5)
    for name, keep in found.masks.items():
        weight = found.model.get_parameter(name)
        assert weight.device.type == device.type
        assert not weight[~keep.to(device)].any()


def test_a_stream_its_heads_and_whole_branches_are_cut(device: torch.device) -> None:
    torch.manual_seed(0)
    dense = vit_tiny(image_size=8, in_channels=3, num_classes=4, dim=32, depth=3).to(device).eval()
    kinds = ["heads", "neurons", "residual", "branches"]
    cut = gsprune.cut(dense, data(device), F.cross_entropy, macs=0.4, kinds=kinds, progress=False)
    assert {t.device.type for t in cut.model.state_dict().values()} == {device.type}
    assert cut.small.macs < 0.45 * cut.dense.macs
    assert cut.model(nets.images(2).to(device)).isfinite().all()


def test_2_to_4_is_compressed_or_says_why_not(cuda: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).to(cuda).half()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.view(256, -1, 4)[:, :, :2] = 0
    found = to_semi_structured(model, torch.randn(128, 256, dtype=torch.float16).to(cuda))
    assert len(found.layers) == 2
    for layer in found.layers:
        if layer.reason is None:
            assert layer.error is not None
            assert layer.error < 1e-2
            assert layer.low is not None
            assert layer.low > 1


# ---- state, processes, memory


def test_a_state_goes_between_devices(device: torch.device) -> None:
    model = net(device)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = make_pruner(model, Elementwise(), optimizer)
    train(model, pruner, optimizer, device, epochs=2)
    other = net(torch.device("cpu"))
    other.load_state_dict(model.state_dict())
    resumed = make_pruner(other, Elementwise())
    resumed.load_state_dict(pruner.state_dict())
    for name, keep in pruner.masks().items():
        assert torch.equal(keep.cpu(), resumed.masks()[name])
        torch.testing.assert_close(pruner.scores()[name].cpu(), resumed.scores()[name])


@pytest.mark.parametrize("criterion", [Elementwise(), Weighted()], ids=lambda c: type(c).__name__)
def test_one_process_of_a_group_chooses_as_a_process_alone(one_process: torch.device, criterion: Criterion) -> None:
    """NCCL's reductions on a GPU."""
    model = net(one_process)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = make_pruner(model, criterion, optimizer)
    train(model, pruner, optimizer, one_process)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.07)
    assert_pruned_weights_are_zero(model, pruner)


def shard(model: nn.Sequential, device: torch.device) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (1,))
    for layer in (model[1], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def two_layers(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 4)).to(device)


def test_units_under_fsdp2(one_process: torch.device) -> None:
    model = shard(two_layers(one_process), one_process)
    optimizer = OPTIMIZERS["adam, foreach"](model.parameters())
    pruner = make_pruner(model, Abs(), optimizer)
    train(model, pruner, optimizer, one_process)
    pruner.on_train_end()
    plan, example = pruner.next_plan(), nets.images(2).to(one_process)
    assert plan is not None
    small = gsprune.cut_sharded(model, plan, lambda network: shard(network, one_process), example_input=example)
    whole: Any = small.get_parameter("1.weight")
    dense: Any = model.get_parameter("1.weight")
    assert torch.equal(whole.full_tensor(), dense.full_tensor()[pruner.masks()["1"]])
    assert whole.shape == (16, 192)


def test_single_weights_under_fsdp2(one_process: torch.device) -> None:
    model = shard(two_layers(one_process), one_process)
    optimizer = OPTIMIZERS["adam, foreach"](model.parameters())
    pruner = make_pruner(model, Elementwise(), optimizer)
    train(model, pruner, optimizer, one_process)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    weight: Any = model.get_parameter("1.weight")
    assert 0.3 < float((weight.full_tensor() == 0).double().mean()) < 0.7


def test_the_device_s_error_of_too_little_memory_is_known(cuda: torch.device) -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**44, dtype=torch.uint8, device=cuda)
    assert is_out_of_memory(error.value)


def test_the_clock_waits_for_the_device(cuda: torch.device) -> None:
    """Without that a pass would last as long as its launch, whatever it computes."""
    wide, narrow = (nn.Linear(8192, n).to(cuda) for n in (8192, 512))
    found = compare(wide, narrow, torch.randn(1024, 8192))
    assert found.speedup is not None, found.note
    assert found.speedup > 3
