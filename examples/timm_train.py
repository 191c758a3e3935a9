"""timm's train.py in small: its optimizer, scheduler, scaler, clipping, EMA and checkpoints, and a pruner attached.

    python examples/timm_train.py [--resume FOLDER/last.pth.tar] [--output FOLDER] [--shrink each_update]

The lines that pruning adds say so. Pictures are made up: one of four patterns each, and noise.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gsprune
from gsprune.criteria import Weighted

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--stop-after", type=int, default=None, metavar="EPOCHS", help="as if killed then")
parser.add_argument("--clip-grad", type=float, default=1.0)
parser.add_argument("--amp", action="store_true", help="bfloat16")
parser.add_argument("--model-ema-decay", type=float, default=0.9)
parser.add_argument("--resume", type=Path, default=None)
parser.add_argument("--output", type=Path, default=None)
parser.add_argument("--shrink", default="at_end")


def pictures(count: int, seed: int) -> TensorDataset:
    patterns = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return TensorDataset(patterns[labels] + 4 * torch.randn(count, 3, 32, 32, generator=generator), labels)


def train_one_epoch(epoch, model, loader, optimizer, loss_fn, args, lr_scheduler, loss_scaler, model_ema) -> float:
    model.train()
    updates = epoch * len(loader)
    losses = []
    for input, target in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            loss = loss_fn(model(input), target)
        loss_scaler(loss, optimizer, clip_grad=args.clip_grad, parameters=model.parameters())
        optimizer.zero_grad()
        updates += 1
        model_ema.update(model, step=updates)
        lr_scheduler.step_update(num_updates=updates)
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def validate(model, loader) -> float:
    model.eval()
    right = [(model(input).argmax(1) == target).float() for input, target in loader]
    return 100 * torch.cat(right).mean().item()


def main(argv: Sequence[str] | None = None) -> tuple[nn.Module, nn.Module, gsprune.Pruner]:
    """The network, its average and the pruner."""
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)
    loader_train = DataLoader(pictures(512, seed=1), batch_size=32, shuffle=True)
    loader_eval = DataLoader(pictures(256, seed=2), batch_size=64)

    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    loss_scaler = NativeScaler(device="cpu")
    model_ema = ModelEmaV3(model, decay=args.model_ema_decay)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=args.epochs,
        warmup_epochs=1,
        step_on_epochs=False,
        updates_per_epoch=len(loader_train),
    )

    pruner = gsprune.Pruner(  # pruning: behind the optimizer and the EMA
        model,
        Weighted(),
        target_sparsity=0.5,
        example_input=pictures(2, seed=3).tensors[0],
        optimizer=optimizer,
        copies=[model_ema.module],
        steps_per_epoch=len(loader_train),
        epochs=num_epochs,
        shrink=args.shrink,
    )

    start_epoch = 0
    if args.resume is not None:
        checkpoint = torch.load(args.resume, weights_only=True)
        pruner.load_state_dict(checkpoint["pruner"])  # pruning: first, as it may cut the network
        model.load_state_dict(checkpoint["state_dict"])
        model_ema.module.load_state_dict(checkpoint["state_dict_ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        loss_scaler.load_state_dict(checkpoint["amp_scaler"])
        start_epoch = checkpoint["epoch"] + 1
    lr_scheduler.step_update(start_epoch * len(loader_train))

    pruner.attach()  # pruning
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(start_epoch, num_epochs):
        torch.manual_seed(epoch)  # the order of the samples, also after a resume
        loss = train_one_epoch(
            epoch, model, loader_train, optimizer, loss_fn, args, lr_scheduler, loss_scaler, model_ema
        )
        top1 = validate(model_ema.module, loader_eval)
        print(f"epoch {epoch}: loss {loss:.3f}, EMA {top1:.1f}%, {pruner.sparsity:.0%} of the units pruned")
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            state = {
                "epoch": epoch,
                "state_dict": model.state_dict(),
                "state_dict_ema": model_ema.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "amp_scaler": loss_scaler.state_dict(),
                "pruner": pruner.state_dict(),  # pruning
            }
            torch.save(state, args.output / "last.pth.tar")
        if args.stop_after == epoch + 1:
            return model, model_ema.module, pruner

    pruner.finish()  # pruning: units are cut out of the network and of its average
    count = sum(p.numel() for p in model_ema.module.parameters())
    print(f"cut: EMA {validate(model_ema.module, loader_eval):.1f}%, {count:,} parameters")
    print(model_ema.module.blocks[0].mlp.fc1)
    return model, model_ema.module, pruner


if __name__ == "__main__":
    main()
