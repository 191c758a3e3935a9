"""What the processes of `training/test_sharded_units.py` do: they prune units of a network that is spread over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from ranks import shard, steps, whole
from torch import Tensor, nn

import gsprune
from gsprune import Pruner, Rule
from gsprune.collectives import check_masks, rank
from gsprune.criteria import Abs, Criterion, Fisher, Magnitude, Random, Weighted
from gsprune.repair.calibrated import Repair
from gsprune.schedules import Linear, OneShot
from gsprune.structures import shards
from gsprune.structures.structure import Structure

EXAMPLE = torch.ones(2, 2, 6, 6) + torch.arange(6) / 8


class Net(nn.Module):
    """Convolutions with BatchNorm, and neurons; rows that neither two nor four processes share evenly.

    All values are few bits long, and so are the sums of their products, whatever their order.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(2, 7, 3), nn.BatchNorm2d(7)
        self.second = nn.Conv2d(7, 5, 3)
        self.up, self.down = nn.Linear(20, 9), nn.Linear(9, 3)
        for parameter in self.parameters():
            parameter.data = torch.randint(-4, 5, parameter.shape) / 8
        self.norm.running_mean.copy_(torch.arange(7) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.down(torch.relu(self.up(x.flatten(1))))


class Own(Criterion):
    """One that sums in its own way: it is handed tensors that lie in parts."""

    scores_units, cumulative = True, False

    def units(self, structure: Structure, read: Any) -> Tensor:
        weight = read(structure.producers[0].tensor)[0]
        return weight.abs().flatten(1).sum(1)


CASES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "abs": lambda: {"criterion": Abs(), "target_sparsity": 0.5},
    "weighted": lambda: {"criterion": Weighted(), "target_sparsity": 0.6, "scope": "global"},
    "fisher": lambda: {"criterion": Fisher(), "budget": {"macs": 0.4}},
    "magnitude": lambda: {"criterion": Magnitude(), "structured": True, "budget": {"params": 0.4}},
    "random": lambda: {"criterion": Random(), "structured": True, "target_sparsity": 0.5},
    "own": lambda: {"criterion": Own(), "structured": True, "target_sparsity": 0.5},
    "rules": lambda: {
        "rules": [
            Rule(Abs(), target_sparsity=0.5, kinds=["channels"], scope="isomorphic"),
            Rule(Magnitude(), target_sparsity=0.7, kinds=["neurons"], structured=True),
        ]
    },
}


def pruned(case: str, *, sharded: bool) -> dict[str, Any]:
    """Scores and masks at every step; the network that the cut leaves, and what it computes."""
    model = shard(Net()) if sharded else Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    pruner = Pruner(
        model,
        **CASES[case](),
        schedule=Linear(end_epoch=5 / 3, update_frequency=1 / 3),
        optimizer=optimizer,
        steps_per_epoch=3,
        example_input=EXAMPLE,
    )
    seen = []
    for _ in steps(model, pruner, optimizer, epochs=2):
        with torch.no_grad():
            model.eval()(EXAMPLE)  # which leaves the parameters of the root in one piece
            model.train()
        if sharded:
            shards_again(model)
        moments = {str(i): optimizer.state[p]["momentum_buffer"] for i, p in enumerate(model.parameters())}
        seen.append(
            {
                "masks": {name: mask.clone() for name, mask in pruner.masks().items()},
                "scores": {name: score.clone() for name, score in pruner.scores().items()},
                "weights": whole({name: p.detach() for name, p in model.named_parameters()}),
                "momenta": whole(moments),
                "report": pruner.report(),
            }
        )
    check_masks(pruner.masks())
    pruner.on_train_end()
    if sharded:
        plan = pruner.next_plan()
        assert plan is not None
        model = gsprune.cut_sharded(model, plan, shard, example_input=EXAMPLE)
    with torch.no_grad():
        answer = model.eval()(EXAMPLE)
    if sharded:
        shards_again(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    local = sum(shards.here(p).numel() for p in model.parameters())
    return {
        "seen": seen,
        "cut": whole({name: tensor.detach() for name, tensor in tensors.items()}),
        "sizes": [model.first.out_channels, model.norm.num_features, model.second.out_channels, model.up.out_features],
        "answer": answer,
        "local": local,
        "trains": trains(model),
    }


def shards_again(model: Any) -> None:
    for module in model.modules():
        if hasattr(type(module), "reshard"):
            module.reshard()


def trains(model: nn.Module) -> bool:
    """Whether a step of an optimizer of its own changes the smaller network."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in whole(dict(model.named_parameters())).items()}
    model.train()(EXAMPLE).square().sum().backward()
    optimizer.step()
    after = whole({name: p.detach() for name, p in model.named_parameters()})
    return any(not torch.equal(before[name], tensor) for name, tensor in after.items())


def every_case() -> dict[str, dict[str, Any]]:
    return {case: pruned(case, sharded=True) for case in CASES}


def trained_units(*, sharded: bool = True) -> dict[str, Any]:
    """A loop of the user's own, whose gradients are averaged over samples that differ between the processes."""
    model = Net().double()
    model = shard(model) if sharded else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = Pruner(
        model,
        Abs(),
        target_sparsity=0.5,
        schedule=Linear(end_epoch=2, update_frequency=0.5),
        optimizer=optimizer,
        steps_per_epoch=2,
        example_input=EXAMPLE.double(),
    )
    samples = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    world = dist.get_world_size() if sharded else 1
    pruner.attach(optimizer)
    for _ in range(3):
        for inputs in samples.split(8):
            model.eval()(inputs[rank() if sharded else 0 :: world]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    model = pruner.finish()
    if sharded:
        model = gsprune.cut_sharded(model, pruner.next_plan(), shard, example_input=EXAMPLE.double())  # type: ignore[arg-type]
    return {"masks": pruner.masks(), "cut": whole({name: p.detach() for name, p in model.named_parameters()})}


def communicated() -> dict[str, int]:
    """Bytes that this process puts into sums over all, in the hooks of a step and in a mask update."""
    model, counts = shard(Net()), {"step": 0, "update": 0}
    pruner = Pruner(model, Abs(), target_sparsity=0.5, schedule=OneShot(start_epoch=1), example_input=EXAMPLE)
    real, now = dist.all_reduce, "step"

    def counting(tensor: Tensor, *args: Any, **settings: Any) -> Any:
        counts[now] += tensor.nbytes
        return real(tensor, *args, **settings)

    dist.all_reduce = counting
    try:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        pruner.on_before_optimizer_step()  # the first one also looks at what is frozen
        counts["step"] = 0
        pruner.on_before_optimizer_step()
        pruner.on_step_end()
        now = "update"
        pruner.on_epoch_begin(1)
        pruner.on_step_begin(0)
    finally:
        dist.all_reduce = real
    return {**counts, "units": sum(target.total for target in pruner.targets), "updates": pruner.updates}


def refused() -> dict[str, str]:
    """What units of sharded models cannot have."""
    common: dict[str, Any] = {"target_sparsity": 0.5, "example_input": EXAMPLE}

    def cut(how: Callable[[nn.Module], Any], *, wrong: bool = False) -> object:
        model = shard(Net())
        pruner = Pruner(model, Magnitude(), structured=True, schedule=OneShot(), steps_per_epoch=1, **common)
        pruner.on_step_begin(0)
        if wrong:  # a neuron that the plan takes is in use again
            with torch.no_grad():
                shards.here(model.down.weight).fill_(1.0)
                shards.here(model.up.bias).fill_(8.0)
        return gsprune.cut_sharded(model, pruner.next_plan(), how, example_input=EXAMPLE)  # type: ignore[arg-type]

    tries: Mapping[str, Callable[[], object]] = {
        "each_update": lambda: Pruner(shard(Net()), Abs(), shrink="each_update", **common),
        "repair": lambda: Pruner(shard(Net()), Abs(), repair=Repair([EXAMPLE]), **common),
        "latency": lambda: Pruner(shard(Net()), Abs(), budget={"latency": 0.5}, example_input=EXAMPLE),
        "branches": lambda: Pruner(shard(Net()), Abs(), kinds=["branches"], **common),
        "mixed": lambda: Pruner(_one_layer_in_parts(), Abs(), **common),
        "whole": lambda: gsprune.cut_sharded(Net(), None, shard, example_input=EXAMPLE),  # type: ignore[arg-type]
        "unspread": lambda: cut(lambda small: small),
        "wrong": lambda: cut(shard, wrong=True),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


def _one_layer_in_parts() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model.first, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


PARTS = (every_case, trained_units, communicated, refused)
