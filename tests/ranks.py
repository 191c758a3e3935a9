"""What the processes of `training/test_several_processes.py` do: functions that `launch` calls in each of them.

They are here because a started process imports the module they are in, and that should not be pytest's.
"""

from __future__ import annotations

import copy
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gsprune
from gsprune import Pruner, collectives
from gsprune.collectives import agreed, broadcast, check_masks, gathered, rank
from gsprune.criteria import PLATON, Criterion, Elementwise, Magnitude, Movement, Random, Weighted
from gsprune.schedules import Linear, OneShot
from gsprune.training import data_parallel
from gsprune.training.data_parallel import local_batches
from gsprune.training.loop_state import LoopState
from gsprune.training.optimization import constant
from gsprune.training.trainer import Trainer
from gsprune.zoo.datasets import FetchedWhole, Pictures, make_loader

EPOCHS = 3


def everything(*parts: Callable[[], Any]) -> list[dict[str, Any]]:
    """What each part returns, by name, from every process: one start for many tests."""
    warnings.simplefilter("ignore")
    mine = {part.__name__: part() for part in parts}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


# --- training ----------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def samples(count: int = 37) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def loader(count: int = 37, *, batch_size: int = 9) -> DataLoader[Any]:
    # 37 = 4 * 9 + 1: in two processes 5 and 4 samples of a batch, and of the last one 1 and none
    return DataLoader(samples(count), batch_size, shuffle=True, generator=torch.Generator().manual_seed(2))


def trained(
    criterion: Criterion, *, accumulate: int = 1, clip: float | None = None, distill: float = 0.0, **settings: Any
) -> dict[str, Any]:
    """Masks, weights and metrics of a run: the same in one process and in several."""
    model, data, seen = net(), loader(), []
    trainer = Trainer(device="cpu", accumulate_steps=accumulate, clip_norm=clip, progress="none", distill=distill)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = trainer.steps_per_epoch(data)
    settings = {"target_sparsity": 0.5, "schedule": Linear(end_epoch=2, update_frequency=0.5), **settings}
    pruner = Pruner(model, criterion, optimizer=optimizer, steps_per_epoch=steps, epochs=EPOCHS, **settings)
    scored = trainer.score(model, data, optimizer=optimizer, pruner=pruner, steps=2)
    trainer.fit(
        model,
        data,
        loader(),
        optimizer=optimizer,
        lr_schedule=constant(optimizer, total_steps=EPOCHS * steps),
        pruner=pruner,
        epochs=EPOCHS,
        teacher=net() if distill else None,
        on_epoch=lambda epoch, values: seen.append(values),
    )
    return {
        "masks": pruner.masks(),
        "weights": {name: tensor.detach() for name, tensor in model.named_parameters()},
        "metrics": [{name: row[name] for name in row if name != "epoch_seconds"} for row in seen],
        "updates": pruner.updates,
        "scored": scored,
    }


def elementwise() -> dict[str, Any]:
    return trained(Elementwise())


def accumulated() -> dict[str, Any]:
    """Two batches a step, so 3 groups of an epoch, the last of one batch; clipping sees the averaged gradient."""
    return trained(Elementwise(), accumulate=2, clip=0.5)


def units() -> dict[str, Any]:
    return trained(Weighted(), example_input=torch.zeros(1, 6, dtype=torch.float64))


def cut() -> dict[str, Any]:
    """Units leave the model at each update, and new parameters take the place of the old ones."""
    return trained(Weighted(), example_input=torch.zeros(1, 6, dtype=torch.float64), shrink="each_update")


def distilled() -> dict[str, Any]:
    """With a teacher, which is in no DistributedDataParallel; of the last batch one process has no sample."""
    example = torch.zeros(1, 6, dtype=torch.float64)
    return trained(Weighted(), accumulate=2, distill=0.5, example_input=example, shrink="each_update")


def rested() -> dict[str, Any]:
    """What can be saved, and what a state saved in the middle of a validation is gone on with."""
    found: dict[str, Any] = {"places": [], "weights": [], "metrics": []}
    saved: dict[str, Any] = {}

    def fit(start: Mapping[str, Any] | None) -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = Pruner(model, Elementwise(), target_sparsity=0.5, optimizer=optimizer, steps_per_epoch=5, epochs=2)
        if start:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            pruner.load_state_dict(saved["pruner"])
        schedule, seen = constant(optimizer, total_steps=10), []

        def on_rest(at: LoopState) -> None:
            found["places"] += [] if start else [(at.epoch, at.step)]
            if len(found["places"]) == 8:  # the third batch of the first validation
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                saved.update(copy.deepcopy({**state, "pruner": pruner.state_dict(), "at": at.state_dict()}))

        trainer = Trainer(device="cpu", progress="none")
        common = {"optimizer": optimizer, "lr_schedule": schedule, "pruner": pruner, "epochs": 2, "on_rest": on_rest}
        trainer.fit(model, loader(), loader(), start=start, on_epoch=lambda _, values: seen.append(values), **common)
        found["weights"].append({name: tensor.detach() for name, tensor in model.named_parameters()})
        found["metrics"].append([{name: row[name] for name in row if name != "epoch_seconds"} for row in seen])

    fit(None)
    fit(saved["at"])
    return found


def at_random() -> dict[str, Any]:
    return trained(Random())


def timed() -> dict[str, Any]:
    """A budget of milliseconds, by clocks that no two processes agree on: the first one's counts."""
    from gsprune import latency

    def clock(models: Mapping[str, nn.Module], *_: Any, **__: Any) -> dict[str, float]:
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        return {name: float(1 + size ** (1 + rank())) for name, size in sizes.items()}

    real, latency.latency_ms = latency.latency_ms, clock
    try:
        example = torch.zeros(1, 6, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that so few units cannot be met by such a clock
            return trained(Weighted(), example_input=example, budget={"latency": 0.6}, target_sparsity=None)
    finally:
        latency.latency_ms = real


def told() -> dict[str, Any]:
    """What processes tell each other when the default group, of an application of its own, knows no host's memory."""
    plain, dist.get_backend_config = dist.get_backend_config, lambda: "cuda:nccl"
    try:
        found = {"agreed": agreed(rank()), "gathered": gathered(rank()), "broadcast": broadcast(10 + rank())}
        check_masks({"a": torch.ones(3, dtype=torch.bool)})
        return {**found, "groups": len(collectives._HOSTS)}
    finally:
        dist.get_backend_config = plain


def reductions() -> int:
    """How often gradients were averaged in one epoch of 5 batches, 2 to a step."""
    calls = 0
    model = nn.parallel.DistributedDataParallel(net())

    def count(_, bucket):  # torch refuses annotations as text
        nonlocal calls
        calls += 1
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, count)
    data, trainer = loader(), Trainer(device="cpu", accumulate_steps=2)
    plain, data_parallel.data_parallel = data_parallel.data_parallel, lambda *_: model
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = Pruner(model.module, Elementwise(), target_sparsity=0.5, schedule=OneShot(start_epoch=9))
        trainer.score(model.module, data, optimizer=optimizer, pruner=pruner)
    finally:
        data_parallel.data_parallel = plain
    return calls


class Drawn(nn.Module):
    """A network with buffers and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(torch.rand(1))
        return self.out(self.drop(self.norm(x)))


def buffers() -> dict[str, Any]:
    """BatchNorm on CPU sees other samples in each process; after an epoch its statistics are the same."""
    torch.manual_seed(0)
    model = Drawn().double()
    trainer = Trainer(device="cpu")
    data = loader(36)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, rules=[])
    schedule = constant(optimizer, total_steps=4)
    trainer.fit(model, data, None, optimizer=optimizer, lr_schedule=schedule, pruner=pruner, epochs=1)
    return {"mean": model.norm.running_mean, "drawn": torch.cat(model.seen)}


# --- data --------------------------------------------------------------------------------------------------


class Noted(FetchedWhole):
    """Samples that are their own numbers, and a list of what was fetched."""

    def __init__(self, count: int) -> None:
        self.count, self.fetched = count, []

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        self.fetched.append(indices)
        return torch.tensor(indices), torch.tensor(indices)


def orders() -> dict[str, Any]:
    """The samples of two epochs, batch by batch, from loaders of every kind."""
    numbers, epochs = torch.arange(11), range(2)
    own = DataLoader(TensorDataset(numbers, numbers), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    ours, noted = make_loader(Noted(11), batch_size=4, train=True, device="cpu", seed=4), None
    noted = ours.dataset
    torch.manual_seed(10 * rank())  # what a sampler without a generator draws from differs between processes
    from_global = DataLoader(TensorDataset(numbers, numbers), 4, shuffle=True)
    plain = [({"x": numbers[:5]}, numbers[:5]), ({"x": numbers[5:6]}, numbers[5:6])]
    pictures = Pictures(torch.arange(11 * 16).reshape(11, 1, 4, 4), numbers, (0.0,), (1.0,), 4, augment=True)
    augmented = make_loader(pictures, batch_size=4, train=True, device="cpu", seed=5)

    def labels(found: Any, training: bool = True) -> list[list[int]]:
        return [batch[1].tolist() for _ in epochs for batch in local_batches(found, training=training)]

    return {
        "own": labels(own),
        "evaluated": labels(own, training=False),
        "ours": labels(ours),
        "fetched": noted.fetched,
        "global": labels(from_global),
        "list": labels(plain),
        "inputs": [batch[0]["x"].tolist() for batch in local_batches(plain, training=True)],
        "pictures": [batch[0] for _ in epochs for batch in local_batches(augmented, training=True)],
    }


# --- FSDP --------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Rows that two processes share unevenly, one row that only the first gets, and equal weights for ties."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 1)
        with torch.no_grad():
            self.b.weight.fill_(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """The same for the whole model wherever they are asked for, many of them equal."""
    generator = torch.Generator().manual_seed(step)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: torch.randint(-2, 3, shape, generator=generator) / 4 for name, shape in shapes.items()}


CRITERIA: Mapping[str, Callable[[], Criterion]] = {
    "elementwise": Elementwise,
    "magnitude": Magnitude,
    "movement": Movement,
    "platon": PLATON,
    "random": Random,
}


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh  # a second, in each of many processes
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def steps(model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, *, epochs: int) -> Iterator[Pruner]:
    """Three steps an epoch, each with given gradients."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for epoch in range(epochs):
        pruner.on_epoch_begin(epoch)
        for step in range(3):
            pruner.on_step_begin(step)
            for name, parameter in model.named_parameters():
                grad = gradients(model, 3 * epoch + step)[name]
                if isinstance(parameter, DTensor):
                    grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
                parameter.grad = grad
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_step_end()
            optimizer.zero_grad()
            yield pruner
        pruner.on_epoch_end()


def whole(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for name, t in tensors.items()}


def pruned(criterion: str, *, scope: str, min_kept: int, sharded: bool) -> list[dict[str, Any]]:
    model = shard(Wide()) if sharded else Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(
        model,
        CRITERIA[criterion](),
        target_sparsity=0.8,
        schedule=Linear(end_epoch=3, update_frequency=1 / 3),
        scope=scope,  # type: ignore[arg-type]
        min_kept=min_kept,
        optimizer=optimizer,
        steps_per_epoch=3,
    )
    seen = []
    for _ in steps(model, pruner, optimizer, epochs=4):
        momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        seen.append(
            {
                "masks": whole(pruner.masks()),
                "scores": whole(pruner.scores()),
                "weights": whole({name: p.detach() for name, p in model.named_parameters()}),
                "momenta": whole({str(i): m for i, m in enumerate(momenta)}),
                "report": pruner.report(),
            }
        )
    pruner.on_train_end()
    return seen


CASES = [
    ("elementwise", "global", 1),
    ("elementwise", "local", 1),
    ("elementwise", "global", 5),
    ("platon", "global", 1),
    ("movement", "local", 1),
    ("magnitude", "global", 1),
    ("random", "local", 1),
]


def sharded() -> list[list[dict[str, Any]]]:
    return [pruned(criterion, scope=scope, min_kept=least, sharded=True) for criterion, scope, least in CASES]


def resumed() -> list[dict[str, Any]]:
    """A sharded pruner in its fourth step goes on from its own state, and from that of the model in one piece."""
    found = []
    for source in (True, False):
        model = shard(Wide()) if source else Wide()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings: dict[str, Any] = {"target_sparsity": 0.8, "schedule": Linear(end_epoch=3, update_frequency=1 / 3)}
        pruner = Pruner(model, Elementwise(), steps_per_epoch=3, **settings)
        walk = steps(model, pruner, optimizer, epochs=4)
        for _ in range(5):
            next(walk)
        fresh = Pruner(shard(Wide()), Elementwise(), steps_per_epoch=3, **settings)
        fresh.load_state_dict(pruner.state_dict())
        started = Pruner(shard(Wide()), Elementwise(), scores=pruner.scores(), steps_per_epoch=3, **settings)
        found.append(
            {
                "masks": [whole(pruner.masks()), whole(fresh.masks())],
                "scores": [whole(pruner.scores()), whole(fresh.scores()), whole(started.scores())],
                "sparsity": [pruner.sparsity, fresh.sparsity],
            }
        )
    return found


def not_finite() -> list[int]:
    """A gradient that is inf in the rows of one process only does not count in any."""
    model = shard(Wide())
    pruner = Pruner(model, Elementwise(), target_sparsity=0.5, schedule=OneShot(start_epoch=5))
    counted = []
    for bad in (False, True):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if bad and rank() == 1:
            model.a.weight.grad.to_local()[0, 0] = torch.inf
        pruner.on_before_optimizer_step()
        counted.append(int(pruner.state_dict()["rules"][0]["scored"]))
    return counted


def trained_sharded() -> dict[str, Any]:
    """A loop of the user's own: FSDP2 averages gradients over the processes, each of which has other samples."""
    model = shard(net()) if dist.is_initialized() else net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = Linear(end_epoch=2, update_frequency=0.5)
    settings: dict[str, Any] = {"target_sparsity": 0.7, "schedule": schedule, "steps_per_epoch": 4}
    pruner = Pruner(model, Elementwise(), optimizer=optimizer, **settings)
    data = samples(32).tensors
    pruner.attach(optimizer)
    for _ in range(3):
        for inputs, labels in zip(*(tensor.split(8) for tensor in data), strict=True):
            world = dist.get_world_size() if dist.is_initialized() else 1
            mine = slice(rank(), None, world)
            nn.functional.cross_entropy(model(inputs[mine]), labels[mine]).backward()
            optimizer.step()
            optimizer.zero_grad()
    pruner.finish()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"masks": whole(pruner.masks()), "weights": whole(weights), "sparsity": pruner.sparsity}


def refusals() -> dict[str, str]:
    """What sharded models cannot have, each with its sentence."""
    tries: Mapping[str, Callable[[nn.Module], object]] = {
        "tiles": lambda model: Pruner(model, Elementwise(), target_sparsity=0.5, pattern="1x5", include=["a"]),
        "channels": lambda m: Pruner(m, Elementwise(), target_sparsity=0.5, per_channel=True, scope="local"),
        "mixed": lambda model: Pruner(nn.ModuleList([model, nn.Linear(2, 2)]), Elementwise(), target_sparsity=0.5),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt(shard(Wide()))
        except ValueError as error:
            found[name] = str(error)
    return found


def cuts() -> dict[str, Any]:
    """What a cut says in one of several processes, and what it does in the first one alone."""
    model, batches = net(), [samples().tensors[0]]
    said: dict[str, Any] = {}
    for name, settings in {"units": {"sparsity": 0.5}, "weights": {"pattern": "2:4"}}.items():
        try:
            gsprune.cut(model, batches, progress=False, **settings)
        except ValueError as error:
            said[name] = str(error)
    if rank() == 0:
        with collectives.alone():
            said["kept"] = gsprune.cut(model, batches, sparsity=0.5, progress=False).keeps
    return said


# --- faults ------------------------------------------------------------------------------------------------


class Drifting(Elementwise):
    """A criterion that is wrong: its scores differ between processes."""

    def weights(self, weight: Tensor, grad: Tensor | None, *, name: str = "", out: Tensor | None = None) -> Tensor:
        change = super().weights(weight, grad, name=name, out=out)
        return change.flip(0) if rank() == 1 else change


def drifting() -> str:
    """What stops processes whose masks differ."""
    try:
        trained(Drifting())
    except ValueError as error:
        return str(error)
    return ""


class Killed(Elementwise):
    """A criterion in whose third step the first process is killed."""

    seen = 0

    def weights(self, weight: Tensor, grad: Tensor | None, *, name: str = "", out: Tensor | None = None) -> Tensor:
        Killed.seen += 1
        if Killed.seen == 9 and rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().weights(weight, grad, name=name, out=out)
