"""Tasks of `cut.py`: a trained dense network each, calibration and test batches, loss, metric, a recipe of training.

    python benchmarks/cut_tasks.py [--cache ~/.cache/gsprune] [names]     # trains the dense networks that are missing

    one = task("minilm_r8")
    one.model                       # the dense network, in eval mode; copy before changing it
    one.calibration(seed=0)         # list of batches, 512 training samples chosen by the seed
    one.evaluate(one.model)         # percent of test samples that are right (smollm2: perplexity)
    one.loss                        # loss(outputs, targets); None: batches are dicts and the network returns its loss
    one.tune(network, seed=0)       # the recipe of two epochs, the same for everything that is compared

| task | network | data | metric |
|---|---|---|---|
| digits | `convnet` (residual block) | 1,797 digits of scikit-learn | accuracy |
| convnet_mnist | `convnet` (residual block) | MNIST | accuracy |
| minilm_r8 | all-MiniLM-L6-v2 tuned two epochs | Reuters R8, 64 tokens | accuracy |
| efficientnet_mnist | EfficientNet-Lite0, ImageNet's weights tuned one epoch | MNIST at 64 x 64 | accuracy |
| vit_mnist | `vit_tiny`, patches of 4 x 4 | MNIST | accuracy |
| smollm2 | SmolLM2-135M-Instruct | docstrings of scikit-learn, numpy and pandas | perplexity |
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cut_data import CACHE, fetch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gsprune.zoo.models import convnet, vit_tiny

Batch = Any  # (inputs, targets), or a dict with "labels"
TEXTS = ("sklearn", "numpy", "pandas")
TOKENS = 256  # of a sample of smollm2
DENSE_SEED = 0  # orders the training samples of the dense networks


@dataclass(frozen=True)
class Data:
    """Samples in memory; `__getitem__` of a list of indices gives a batch."""

    inputs: Tensor
    targets: Tensor | None = None
    lengths: Tensor | None = None  # of token sequences that are padded with 0
    prepare: Callable[[Tensor], Tensor] = field(default=lambda x: x)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, indices: Sequence[int] | Tensor) -> Batch:
        i = torch.as_tensor(indices)
        if self.lengths is None:
            x = self.prepare(self.inputs[i])
            return (x, self.targets[i]) if self.targets is not None else {"input_ids": x, "labels": x}
        longest = int(self.lengths[i].max())
        inside = torch.arange(longest) < self.lengths[i][:, None]
        return {"input_ids": self.inputs[i, :longest], "attention_mask": inside.long(), "labels": self.targets[i]}

    def batches(self, indices: Sequence[int] | Tensor, size: int) -> list[Batch]:
        indices = torch.as_tensor(indices)
        return [self[part] for part in indices.split(size)]


@dataclass(frozen=True)
class Task:
    """What the head of this file shows."""

    name: str
    model: nn.Module
    train: Data
    test: Data
    loss: Callable[[Tensor, Tensor], Tensor] | None
    batch: int = 32  # samples of a batch of calibration or training
    lr: float = 1e-3
    samples: int = 512  # calibration samples
    tuning: int = 4000  # training samples of an epoch of `tune`
    include: tuple[str, ...] = ("*",)
    trained_on: int = 10**9  # training samples that `_trained` has shown the dense network
    higher_is_better: bool = True

    def calibration(self, seed: int, samples: int | None = None, batch: int | None = None) -> list[Batch]:
        """Batches of training samples chosen by `seed`, labels included; token sequences are sorted by length."""
        chosen = _chosen(self.train, seed)[: samples or self.samples]
        return self.train.batches(_by_length(self.train, chosen), batch or self.batch)

    def unseen(self, seed: int) -> list[Batch]:
        """Training samples that neither trained the dense network nor are among those of `calibration(seed)`."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(DENSE_SEED))
        calibrates = _chosen(self.train, seed)[: self.samples]
        left = order[self.trained_on :]
        return self.train.batches(left[~torch.isin(left, calibrates)], 4 * self.batch)

    def tests(self, samples: int | None = None) -> list[Batch]:
        """The first `samples` test samples (None: all), sorted by length."""
        return self.test.batches(_by_length(self.test, torch.arange(len(self.test))[:samples]), 4 * self.batch)

    def some_tests(self, samples: int) -> list[Batch]:
        """So many of the test samples, chosen at random, always the same ones, sorted by length."""
        chosen = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(0))[:samples]
        return self.test.batches(_by_length(self.test, chosen), 4 * self.batch)

    @property
    def example(self) -> Any:
        """Inputs of one sample, as `find_structures` and `count_macs` take them."""
        return inputs_of(self.train[[0]])

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over a batch."""
        if isinstance(batch, dict):
            return model(**batch).loss
        assert self.loss is not None
        return self.loss(model(batch[0]), batch[1])

    @torch.no_grad()
    def right(self, model: nn.Module, batches: Sequence[Batch] | None = None) -> Tensor:
        """(samples,) bool: whether each test sample is classified rightly."""
        was, found = model.training, []
        model.eval()
        for batch in self.tests() if batches is None else batches:
            outputs = call(model, batch)
            found.append(outputs.argmax(-1) == (batch["labels"] if isinstance(batch, dict) else batch[1]))
        model.train(was)
        return torch.cat(found)

    def evaluate(self, model: nn.Module, batches: Sequence[Batch] | None = None) -> float:
        """Accuracy in percent; of a language model the perplexity."""
        if self.higher_is_better:
            return 100 * float(self.right(model, batches).double().mean())
        model.eval()
        batches = self.tests() if batches is None else batches
        with torch.no_grad():
            losses = [float(self.loss_of(model, part)) for batch in batches for part in _singles(batch)]
        return math.exp(sum(losses) / len(losses))

    def tune(self, model: nn.Module, seed: int = 0, epochs: int = 2, samples: int | None = None) -> nn.Module:
        """AdamW, one-cycle from the start: `epochs` over `samples` training samples; in place, ends in eval mode."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.train), generator=generator)[: samples or self.tuning]
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01)
        steps = epochs * math.ceil(len(chosen) / self.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1.0, (s + 1) / (0.1 * steps)) * (1 - s / steps)
        )
        model.train()
        torch.manual_seed(seed)
        for _ in range(epochs):
            for batch in self.train.batches(chosen[torch.randperm(len(chosen), generator=generator)], self.batch):
                optimizer.zero_grad()
                self.loss_of(model, batch).backward()
                optimizer.step()
                schedule.step()
        return model.eval()


def inputs_of(batch: Batch) -> Any:
    if isinstance(batch, dict):
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch[0]


def call(model: nn.Module, batch: Batch) -> Tensor:
    """The logits."""
    return model(**inputs_of(batch)).logits if isinstance(batch, dict) else model(batch[0])


def _chosen(data: Data, seed: int) -> Tensor:
    return torch.randperm(len(data), generator=torch.Generator().manual_seed(1000 + seed))


def _by_length(data: Data, indices: Tensor) -> Tensor:
    return indices if data.lengths is None else indices[data.lengths[indices].argsort(stable=True)]


def _singles(batch: Batch) -> list[Batch]:
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]


# ---- the tasks


def task(name: str, cache: Path = CACHE) -> Task:
    """A task by its name; what is missing in the cache is fetched and trained first."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
    fetch(cache)
    if str(cache / "packages") not in sys.path:
        sys.path.append(str(cache / "packages"))
    return TASKS[name](cache)


def _trained(one: Task, cache: Path, *, epochs: int, samples: int) -> Task:
    """The task with its dense network, read from the cache or trained and written there."""
    one = replace(one, trained_on=samples)
    path = cache / "networks" / f"{one.name}.safetensors"
    if not path.exists():
        start = time.perf_counter()
        one.tune(one.model, DENSE_SEED, epochs=epochs, samples=samples)
        path.parent.mkdir(exist_ok=True, parents=True)
        part = path.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in one.model.state_dict().items()}, part)
        part.rename(path)
        print(f"{path}: {one.evaluate(one.model):.2f} %, {time.perf_counter() - start:.0f} s", flush=True)
    one.model.load_state_dict(load_file(path))
    one.model.eval()
    return one


def digits(cache: Path) -> Task:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = (Data(x[part], y[part]) for part in (order[:1200], order[1200:]))
    torch.manual_seed(0)
    model = convnet(image_size=8, in_channels=1, num_classes=10)
    one = Task("digits", model, train, test, F.cross_entropy, lr=3e-3, tuning=1200)
    return _trained(one, cache, epochs=8, samples=1200)


def mnist(cache: Path, part: str, prepare: Callable[[Tensor], Tensor]) -> Data:
    def read(kind: str, header: int) -> np.ndarray[Any, Any]:
        return np.fromfile(cache / "mnist" / f"{part}-{kind}-ubyte", dtype=np.uint8, offset=header)

    images = torch.from_numpy(read("images-idx3", 16).reshape(-1, 1, 28, 28))
    return Data(images, torch.from_numpy(read("labels-idx1", 8)).long(), prepare=prepare)


def convnet_mnist(cache: Path) -> Task:
    train, test = (mnist(cache, part, lambda x: (x.float() / 255 - 0.1307) / 0.3081) for part in ("train", "t10k"))
    torch.manual_seed(0)
    model = convnet(image_size=28, in_channels=1, num_classes=10)
    one = Task("convnet_mnist", model, train, test, F.cross_entropy, batch=64, lr=3e-3)
    return _trained(one, cache, epochs=1, samples=30_000)


def vit_mnist(cache: Path) -> Task:
    train, test = (mnist(cache, part, lambda x: (x.float() / 255 - 0.1307) / 0.3081) for part in ("train", "t10k"))
    torch.manual_seed(0)
    model = vit_tiny(image_size=28, in_channels=1, num_classes=10)
    one = Task("vit_mnist", model, train, test, F.cross_entropy, batch=64)
    return _trained(one, cache, epochs=2, samples=30_000)


def efficientnet_mnist(cache: Path) -> Task:
    from efficientnet_lite_pytorch import EfficientNet

    def prepare(x: Tensor) -> Tensor:
        x = F.interpolate(x.float() / 255, 64, mode="bilinear")
        return ((x - 0.45) / 0.225).expand(-1, 3, -1, -1)

    train, test = (mnist(cache, part, prepare) for part in ("train", "t10k"))
    test = Data(test.inputs[:1000], test.targets[:1000], prepare=prepare)
    model = EfficientNet.from_name("efficientnet-lite0", num_classes=10, image_size=64, dropout_rate=0.0)
    model._global_params = model._global_params._replace(drop_connect_rate=0.0)
    weights = torch.load(next((cache / "efficientnet").glob("*.pth")), weights_only=True)
    missing = model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("_fc.")}, strict=False)
    assert set(missing.missing_keys) == {"_fc.weight", "_fc.bias"}
    assert not missing.unexpected_keys
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # 0.01 does not reach the statistics of other pictures within one epoch
    nn.init.zeros_(model._fc.weight)
    one = Task("efficientnet_mnist", model, train, test, F.cross_entropy, tuning=500)
    return _trained(one, cache, epochs=1, samples=6000)


def minilm_r8(cache: Path) -> Task:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(cache / "minilm")
    rows = {}
    for part in ("train", "test"):
        lines = (cache / "r8" / f"reuters-r8-{part}.tab").read_text(encoding="utf8").split("\n")[3:]
        rows[part] = [line.split("\t") for line in lines if line]
    names = sorted({label for label, _ in rows["train"]})

    def data(part: str) -> Data:
        coded = tokenizer([text for _, text in rows[part]], truncation=True, max_length=64)["input_ids"]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in coded], batch_first=True)
        return Data(
            ids, torch.tensor([names.index(label) for label, _ in rows[part]]), torch.tensor([*map(len, coded)])
        )

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(cache / "minilm", num_labels=len(names))
    heads_and_neurons = ("*.self", "*.intermediate.dense")
    one = Task("minilm_r8", model, data("train"), data("test"), None, lr=5e-5, tuning=500, include=heads_and_neurons)
    return _trained(one, cache, epochs=2, samples=10**9)


def smollm2(cache: Path) -> Task:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    folder, path = cache / "networks" / "smollm2", cache / "networks" / "smollm2_texts.safetensors"
    if not folder.exists():
        gguf = {"gguf_file": next((cache / "smollm2").glob("*.gguf")).name}
        model = AutoModelForCausalLM.from_pretrained(cache / "smollm2", **gguf)
        tokenizer = AutoTokenizer.from_pretrained(cache / "smollm2", **gguf)
        del model.config.quantization_config
        model.hf_quantizer = None  # its weights are plain by now
        part = folder.with_suffix(".part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        docs = docstrings()
        random.Random(0).shuffle(docs)
        ids = torch.tensor(tokenizer("\n\n".join(docs[:2000]))["input_ids"], dtype=torch.int32)
        save_file({"ids": ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)}, path)
    ids = load_file(path)["ids"].long()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Task(
        "smollm2",
        model,
        Data(ids[:-64]),
        Data(ids[-32:-16]),
        None,
        batch=4,
        samples=72,
        include=("*.mlp*",),
        higher_is_better=False,
    )


def docstrings(least: int = 400) -> list[str]:
    """Docstrings of at least so many characters in the sources of `TEXTS`, tests left out."""
    found = []
    for package in TEXTS:
        for path in sorted(Path(importlib.import_module(package).__file__).parent.rglob("*.py")):
            if not {"test", "tests", "testing"} & set(path.parts):
                for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                        found.append(ast.get_docstring(node) or "")
    return [text for text in found if len(text) >= least]


TASKS: dict[str, Callable[[Path], Task]] = {
    "digits": digits,
    "convnet_mnist": convnet_mnist,
    "minilm_r8": minilm_r8,
    "efficientnet_mnist": efficientnet_mnist,
    "vit_mnist": vit_mnist,
    "smollm2": smollm2,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(TASKS))
    parser.add_argument("--cache", type=Path, default=CACHE)
    given = parser.parse_args()
    for name in given.names:
        start = time.perf_counter()
        one = task(name, given.cache)
        print(name, f"{one.evaluate(one.model):.2f}", f"{time.perf_counter() - start:.0f} s", flush=True)
