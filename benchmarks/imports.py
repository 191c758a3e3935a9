"""What a partner takes: megabytes on disk, seconds to import, what gsprune's adapter adds; and the first pruning.

python benchmarks/imports.py   # a minute; each import in a fresh process, the fastest of three
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution

# Adapter -> the partner's distribution, and what it imports of that.
PARTNERS = {
    "integrations.transformers": ("transformers", "transformers.trainer"),
    "integrations.pretrained": ("transformers", "transformers.modeling_utils"),
    "integrations.lightning": ("lightning", "lightning.pytorch"),
    "integrations.accelerate": ("accelerate", "accelerate"),
    "integrations.peft": ("peft", "peft"),
    "integrations.timm": ("timm", "timm"),
    "integrations.hub": ("huggingface_hub", "huggingface_hub.hub_mixin"),
    "integrations.mlflow": ("mlflow", "mlflow.models.evaluation.base"),
    "export.onnx_file": ("onnxruntime", "onnxruntime, onnxscript"),
    "export.openvino_file": ("openvino", "openvino"),
}
FIRST = """
import time
begin = time.perf_counter()
import torch
imported = time.perf_counter()
from torch import nn
layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 2)
net = nn.Sequential(*layers)
x, optimizer = torch.randn(2, 3, 16, 16), torch.optim.SGD(net.parameters(), lr=0.1)
def step():
    net(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
step()  # torch imports more of itself at the first one
trained = time.perf_counter()
import gsprune
from gsprune.criteria import Abs
pruner = gsprune.Pruner(net, Abs(), target_sparsity=0.5, example_input=x, steps_per_epoch=2, epochs=1)
pruner.attach(optimizer)
step(), step()
pruner.finish()
print((time.perf_counter() - trained) / (imported - begin))
"""
CLOCK = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"


def seconds(*modules: str) -> float:
    """To import the last of the modules, after those before it."""
    code = "".join(f"import {module}\n" for module in modules[:-1]) + CLOCK.format(modules[-1])
    command = [sys.executable, "-W", "ignore", "-c", code]
    runs = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3))
    return min(float(run.stdout.splitlines()[-1]) for run in runs)


def first_pruning() -> float:
    """From `import gsprune` to channels that are cut out, against `import torch`; the median of five processes."""
    command = [sys.executable, "-W", "ignore", "-c", FIRST]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout.splitlines()[-1]) for run in runs)


def megabytes(name: str) -> float:
    """Of a distribution's own files, without what it depends on."""
    files = distribution(name).files or []
    return sum(file.locate().stat().st_size for file in files if file.locate().is_file()) / 1e6


def main() -> int:
    adapters = sys.argv[1:] or [*PARTNERS]
    print(f"import of gsprune, first channels found, trained and cut: {first_pruning():.2f} of the import of torch\n")
    own = ("torch", "gsprune.pruner.pruner")
    print("| | its partner, MB | import of that, s | of the adapter besides, s |\n|---|---:|---:|---:|")
    print(f"| `gsprune` | | | {seconds('gsprune'):.2f} |")
    print(f"| `gsprune.Pruner` | torch, {megabytes('torch'):.0f} | {seconds('torch'):.1f} | {seconds(*own):.2f} |")
    for adapter in adapters:
        name, imports = PARTNERS[adapter]
        try:
            size = megabytes(name)
        except PackageNotFoundError:
            print(f"{name} is not installed", file=sys.stderr)
            continue
        partner, more = seconds(*own, imports), seconds(*own, imports, f"gsprune.{adapter}")
        print(f"| `gsprune.{adapter}` | {name}, {size:.0f} | {partner:.1f} | {more:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
