"""Intel Neural Compressor's `GradientSensitivityPruner` on a network of torchvision; `peers.py --inc` runs it.

    sh benchmarks/inc_env.sh FOLDER
    FOLDER/bin/python benchmarks/inc.py [--model resnet50] [--repeats 3] [--threads 2]

Of half of all weights by gradient times weight: milliseconds of a mask update, which it makes layer by layer, and of
what its hooks add to a training step; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from torch import nn


def pruner_of(model: nn.Module, names: list[str]) -> Any:
    from neural_compressor.experimental.pruner_legacy.gradient_sensitivity import GradientSensitivityPruner
    from neural_compressor.model.torch_model import PyTorchModel

    default = dict.fromkeys(("method", "initial_sparsity", "parameters", "update_frequency"))
    own = SimpleNamespace(**default, names=names, start_epoch=0, end_epoch=1, target_sparsity=0.5)
    common = SimpleNamespace(initial_sparsity=0.5, update_frequency=1)
    return GradientSensitivityPruner(PyTorchModel(model), own, common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model)
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    pruner = pruner_of(model, [*layers])
    model(torch.randn(8, 3, 64, 64)).square().mean().backward()
    pruner.on_step_end()  # scores, without masks
    times: dict[str, list[float]] = {"update": [], "hooks": []}
    for _ in range(args.repeats):
        start = time.perf_counter()
        pruner.on_epoch_begin(1)
        times["update"].append(time.perf_counter() - start)
        start = time.perf_counter()
        pruner.on_step_begin(0)
        pruner.on_step_end()
        times["hooks"].append(time.perf_counter() - start)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    share = zeros / sum(layer.weight.numel() for layer in layers.values())
    assert abs(share - 0.5) < 0.01, f"{share:.3f} of the weights are pruned"
    print(json.dumps({f"{name}_ms": 1e3 * statistics.median(found) for name, found in times.items()}))


if __name__ == "__main__":
    main()
