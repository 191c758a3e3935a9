"""torchvision's references/classification/train.py in small: its EMA, scaler, clipping and checkpoints, and a pruner.

    python examples/torchvision_train.py [--resume FOLDER/checkpoint.pth] [--output-dir FOLDER] [--shrink each_update]

The lines that pruning adds say so. Pictures are made up: one of four patterns each, and noise.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

import gsprune
from gsprune.criteria import Weighted

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--stop-after", type=int, default=None, metavar="EPOCHS", help="as if killed then")
parser.add_argument("--clip-grad-norm", type=float, default=5.0)
parser.add_argument("--amp", action="store_true", help="bfloat16")
parser.add_argument("--model-ema-steps", type=int, default=2)
parser.add_argument("--model-ema-decay", type=float, default=0.8)
parser.add_argument("--lr-warmup-epochs", type=int, default=1)
parser.add_argument("--resume", type=Path, default=None)
parser.add_argument("--output-dir", type=Path, default=None)
parser.add_argument("--shrink", default="at_end")


class ExponentialMovingAverage(torch.optim.swa_utils.AveragedModel):
    """As in torchvision's utils.py."""

    def __init__(self, model: nn.Module, decay: float, device: str = "cpu") -> None:
        def ema_avg(avg_model_param, model_param, num_averaged):
            return decay * avg_model_param + (1 - decay) * model_param

        super().__init__(model, device, ema_avg, use_buffers=True)


def pictures(count: int, seed: int) -> TensorDataset:
    patterns = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return TensorDataset(patterns[labels] + 2 * torch.randn(count, 3, 16, 16, generator=generator), labels)


def train_one_epoch(model, criterion, optimizer, data_loader, epoch, args, model_ema, scaler) -> float:
    model.train()
    losses = []
    for i, (image, target) in enumerate(data_loader):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            loss = criterion(model(image), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        if i % args.model_ema_steps == 0:
            model_ema.update_parameters(model)
            if epoch < args.lr_warmup_epochs:
                model_ema.n_averaged.fill_(0)  # the average begins anew during the warm-up
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def evaluate(model, data_loader) -> float:
    model.eval()
    right = [(model(image).argmax(1) == target).float() for image, target in data_loader]
    return 100 * torch.cat(right).mean().item()


def main(argv: Sequence[str] | None = None) -> tuple[nn.Module, nn.Module, gsprune.Pruner]:
    """The network, its average and the pruner."""
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    data_loader = DataLoader(pictures(256, seed=1), batch_size=32, shuffle=True)
    data_loader_test = DataLoader(pictures(256, seed=2), batch_size=64)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    scaler = torch.amp.GradScaler("cpu")
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=args.lr_warmup_epochs)
    main_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs - args.lr_warmup_epochs)
    lr_scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warmup, main_scheduler], milestones=[args.lr_warmup_epochs]
    )
    model_ema = ExponentialMovingAverage(model, decay=args.model_ema_decay)

    pruner = gsprune.Pruner(  # pruning: behind the optimizer and the EMA
        model,
        Weighted(),
        target_sparsity=0.5,
        example_input=pictures(2, seed=3).tensors[0],
        optimizer=optimizer,
        copies=[model_ema.module],
        steps_per_epoch=len(data_loader),
        epochs=args.epochs,
        shrink=args.shrink,
    )

    start_epoch = 0
    if args.resume is not None:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        pruner.load_state_dict(checkpoint["pruner"])  # pruning: first, as it may cut the network
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        model_ema.load_state_dict(checkpoint["model_ema"])
        scaler.load_state_dict(checkpoint["scaler"])
        start_epoch = checkpoint["epoch"] + 1

    pruner.attach()  # pruning
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(start_epoch, args.epochs):
        torch.manual_seed(epoch)  # the order of the samples, also after a resume
        loss = train_one_epoch(model, criterion, optimizer, data_loader, epoch, args, model_ema, scaler)
        lr_scheduler.step()
        top1 = evaluate(model_ema, data_loader_test)
        print(f"epoch {epoch}: loss {loss:.3f}, EMA {top1:.1f}%, {pruner.sparsity:.0%} of the units pruned")
        if args.output_dir is not None:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "epoch": epoch,
                "model_ema": model_ema.state_dict(),
                "scaler": scaler.state_dict(),
                "pruner": pruner.state_dict(),  # pruning
            }
            torch.save(state, args.output_dir / "checkpoint.pth")
        if args.stop_after == epoch + 1:
            return model, model_ema.module, pruner

    pruner.finish()  # pruning: units are cut out of the network and of its average
    count = sum(p.numel() for p in model_ema.parameters())
    print(f"cut: EMA {evaluate(model_ema, data_loader_test):.1f}%, {count:,} parameters")
    print(model_ema.module.layer1[0].conv1)
    return model, model_ema.module, pruner


if __name__ == "__main__":
    main()
