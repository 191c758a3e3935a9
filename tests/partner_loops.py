"""One network and one data order, trained in other people's loops."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from gsprune import Pruner
from gsprune.criteria import Abs

EPOCHS, BATCH, SAMPLES = 3, 8, 32
STEPS = SAMPLES // BATCH


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return {"x": self.x[k], "labels": (self.x[k, 0] > 0).long()}


class Net(nn.Module):
    """Returns its own loss where it gets labels, as networks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.second, self.last = nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(self.second(self.norm(self.first(x)).relu()).relu())
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Samples(), batch_size=BATCH)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def settings(shrink: str) -> dict[str, Any]:
    """What every loop prunes by."""
    return {"criterion": Abs(), "target_sparsity": 0.5, "shrink": shrink}


def pruner_of(model: nn.Module, optimizer: torch.optim.Optimizer, shrink: str) -> Pruner:
    example = {"x": Samples().x[:2]}
    run: dict[str, Any] = {"steps_per_epoch": STEPS, "epochs": EPOCHS, "example_input": example}
    return Pruner(model, optimizer=optimizer, **settings(shrink), **run)


Result = dict[str, Tensor]


def result(model: nn.Module, pruner: Pruner | None) -> Result:
    """All that must be the same to the last bit."""
    assert pruner is not None
    masks = {f"mask of {name}": mask for name, mask in pruner.dense_masks().items()}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | masks


def by_hooks(shrink: str) -> Result:
    """The documented loop."""
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, shrink)
    pruner.on_train_begin()
    for epoch in range(EPOCHS):
        pruner.on_epoch_begin(epoch)
        for step, batch in enumerate(loader()):
            pruner.on_step_begin(step)
            model(**batch)["loss"].backward()
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_step_end()
            optimizer.zero_grad()
        pruner.on_epoch_end()
    pruner.on_train_end()
    return result(model, pruner)


def attached(shrink: str) -> Result:
    """Somebody's loop, with `attach` before and `finish` behind it."""
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, shrink)
    pruner.attach()
    for _ in range(EPOCHS):
        for batch in loader():
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
    pruner.finish()
    return result(model, pruner)


def accelerated(shrink: str, folder: Path, *, stop: int = EPOCHS, resume: bool = False) -> Result | None:
    """accelerate; stops (as if killed) before epoch `stop`, where it has saved its state."""
    from accelerate import Accelerator

    from gsprune.integrations.accelerate import prepare

    accelerator = Accelerator(cpu=True)
    net = Net()
    own = sgd(net)
    pruner = pruner_of(net, own, shrink)
    model, optimizer, batches = accelerator.prepare(net, own, loader())
    prepare(accelerator, pruner, optimizer)
    first = stop
    if resume:
        accelerator.load_state(str(folder))
        first = pruner.epoch
    for epoch in range(first if resume else 0, EPOCHS):
        if epoch == stop and not resume:
            accelerator.save_state(str(folder))
            return None
        for batch in batches:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    pruner.finish()
    return result(net, pruner)


def by_trainer(shrink: str, folder: Path, *, resume: str | None = None, **arguments: Any) -> tuple[Result, Any]:
    """transformers; saves in every second step."""
    from transformers import Trainer, TrainingArguments

    from gsprune.integrations.transformers import PruningCallback

    callback = PruningCallback(**settings(shrink), resume_from_checkpoint=resume)
    kwargs: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.0} | arguments
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}

    class Ordered(Trainer):
        """Takes the samples in order; `train_sampling_strategy` came after transformers 5.0."""

        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    args = TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        **quiet,
        **kwargs,
    )
    own = None if "optim" in arguments else (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    model, data = Net(), Samples()
    trainer = Ordered(
        model, args, train_dataset=data, eval_dataset=data, callbacks=[callback], optimizer_cls_and_kwargs=own
    )
    trainer.train(resume_from_checkpoint=resume)
    return result(model, callback.pruner), trainer


def by_lightning(
    shrink: str,
    folder: Path,
    *,
    resume: Path | None = None,
    averages: bool = False,
    manual: bool = False,
    **trainer: Any,
) -> tuple[Result, Any]:
    """Lightning; saves at the end of each epoch. The result, and the averaged network if there is one."""
    import lightning.pytorch as L
    from lightning.pytorch import callbacks as given
    from lightning.pytorch.callbacks import ModelCheckpoint

    from gsprune.integrations.lightning import PruningCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.automatic_optimization = not manual

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.net(**batch)["loss"]
            if manual:
                optimizers = self.optimizers()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in optimizers:
                    optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            if not manual:
                return sgd(self)
            net = self.net
            return [sgd(nn.ModuleList([net.first, net.norm])), sgd(nn.ModuleList([net.second, net.last]))]

    callback = PruningCallback(**settings(shrink), module="net")
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    average = [given.WeightAveraging()] if averages else []  # of Lightning 2.6
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = [*average, callback, saving]
        fitting = L.Trainer(max_epochs=EPOCHS, callbacks=callbacks, default_root_dir=folder, **quiet, **trainer)
        fitting.fit(module, loader(), ckpt_path=resume)
    return result(module.net, callback.pruner), fitting


def distributed(shrink: str, folder: Path, *, split: bool, stop: int = EPOCHS, resume: bool = False) -> Result | None:
    """DistributedDataParallel, in each of torchrun's processes; stops before epoch `stop`, with its state saved.

    Args:
        split: each process takes its own half of a batch; else all take the whole.
    """
    from gsprune.collectives import rank, world_size
    from gsprune.training.data_parallel import data_parallel

    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, shrink)
    path, mine = folder / f"{shrink}-{split}-{rank()}.pt", slice(rank(), None, world_size()) if split else slice(None)
    if resume:
        state = torch.load(path, weights_only=True)
        pruner.load_state_dict(state["pruner"])  # first: it cuts the model and its optimizer
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    pruner.attach()
    ddp = data_parallel(model)
    for epoch in range(pruner.epoch, EPOCHS):
        if epoch == stop:
            torch.save({name: x.state_dict() for name, x in zip(STATES, (model, optimizer, pruner), strict=True)}, path)
            return None
        for batch in loader():
            ddp = data_parallel(model, ddp)  # another one, where units have been cut out
            optimizer.zero_grad()
            ddp(**{name: tensor[mine] for name, tensor in batch.items()})["loss"].backward()
            optimizer.step()
    pruner.finish()
    return result(model, pruner)


STATES = ("model", "optimizer", "pruner")
CASES = [(shrink, split) for shrink in ("at_end", "each_update") for split in (False, True)]


def under_torchrun(folder: Path, *, resume: bool) -> None:
    """All cases: whole and then up to a kill of the first process; or gone on with after that."""
    import os
    import signal

    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = {case: distributed(case[0], folder, split=case[1], resume=resume) for case in CASES}
    torch.save(found, folder / f"{'resumed' if resume else 'whole'}-{dist.get_rank()}.pt")
    if not resume:
        for shrink, split in CASES:
            distributed(shrink, folder, split=split, stop=2)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    under_torchrun(Path(sys.argv[1]), resume="resume" in sys.argv)
