"""Splits do not overlap and depend on their own seed alone; loaders repeat by theirs; errors are one sentence."""

from __future__ import annotations

import itertools
import logging
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from facts import refused
from jobs import write_pictures
from sklearn.datasets import load_digits
from torch import Generator, Tensor

from gsprune.zoo import datasets
from gsprune.zoo.datasets import Pictures, Splits, make_loader, make_loaders, shift_and_mirror


def numbered(n: int, *, classes: int = 2, **settings: Any) -> Pictures:
    """Picture i is filled with i."""
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 1, 4, 4)
    return Pictures(images, torch.arange(n) % classes, mean=(0.0,), std=(1.0,), image_size=4, **settings)


def contents(loader: Any) -> list[int]:
    return [int(value) for images, _ in loader for value in images[:, 0, 0, 0]]


def stored(split: Any) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


def test_digits_are_all_there_once() -> None:
    splits = datasets.digits()
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [1257, 180, 360]
    assert (splits.image_size, splits.channels, splits.num_classes) == (8, 1, 10)
    raw = load_digits().images.astype(np.uint8)
    found = sorted(stored(splits.train) + stored(splits.val) + stored(splits.test))
    assert found == sorted(image.tobytes() for image in raw)


def test_digits_are_normalised() -> None:
    splits = datasets.digits()
    images, labels = splits.train.__getitems__(range(1257))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)


def test_splits_depend_on_split_seed_alone() -> None:
    torch.manual_seed(1)
    first = datasets.digits()
    torch.manual_seed(2)
    assert torch.equal(datasets.digits().test.images, first.test.images)
    assert not torch.equal(datasets.digits(split_seed=1).test.images, first.test.images)


def test_splitting_by_literals() -> None:
    splits = datasets.split_pictures(numbered(10), val=2, test=3, num_classes=2, split_seed=0)
    parts = [split.images[:, 0, 0, 0].tolist() for split in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in parts] == [5, 2, 3]
    assert sorted(itertools.chain(*parts)) == list(range(10))
    fewer = datasets.split_pictures(numbered(10), val=2, test=3, num_classes=2, split_seed=0, max_train=2)
    assert fewer.train.images[:, 0, 0, 0].tolist() == parts[0][:2]
    assert torch.equal(fewer.test.images, splits.test.images)


def test_resizing_and_grey_to_colour() -> None:
    splits = datasets.digits(image_size=16, channels=3)
    image, label = splits.train[0]
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[2])
    assert label.shape == ()
    assert (splits.image_size, splits.channels) == (16, 3)


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"num_classes": 7}, ("num_classes is 7", "10 classes")),
        ({"image_size": 0}, ("image_size is 0", "1 or more")),
    ],
)
def test_digits_errors(given: dict[str, int], facts: tuple[str, ...]) -> None:
    with refused(*facts):
        datasets.digits(**given)


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"max_train": 6}, ("max_train is 6", "1 to 5", "null")),
        ({"max_train": 0}, ("max_train is 0", "1 to 5", "null")),
        ({"test": 8}, ("10 samples", "hold out 10")),
    ],
)
def test_splitting_errors(given: dict[str, int], facts: tuple[str, ...]) -> None:
    with refused(*facts):
        datasets.split_pictures(numbered(10), **{"val": 2, "test": 3, "num_classes": 2, "split_seed": 0, **given})


def test_random_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gsprune.zoo.datasets"):
        splits = datasets.random(image_size=16, channels=3, num_classes=5, samples=40)
    assert "accuracy on it means nothing" in caplog.text
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [40, 10, 10]
    images, labels = splits.train.__getitems__(range(40))
    assert images.shape == (40, 3, 16, 16)
    assert 0 <= labels.min() <= labels.max() < 5


# --- loaders ---------------------------------------------------------------------------------------------------------


def test_order_repeats_by_seed_and_changes_by_epoch() -> None:
    def loader(seed: int) -> Any:
        return make_loader(numbered(50), batch_size=8, train=True, device="cpu", seed=seed)

    first, again, other = loader(0), loader(0), loader(1)
    epochs = [contents(first), contents(first)]
    torch.manual_seed(123)  # the global generator has no say
    assert [contents(again), contents(again)] == epochs
    assert contents(other) != epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))


def test_evaluation_keeps_the_order_and_every_sample() -> None:
    loader = make_loader(numbered(17), batch_size=8, train=False, device="cpu")
    assert contents(loader) == list(range(17))


@pytest.mark.parametrize(
    ("samples", "batch_size", "sizes"),
    [
        (17, 8, [8, 8]),  # a last batch of 1 would break BatchNorm
        (18, 8, [8, 8, 2]),
        (16, 8, [8, 8]),
        (3, 1, [1, 1, 1]),  # asked for
        (1, 8, [1]),  # all there is
    ],
)
def test_the_last_batch_is_dropped_only_when_single(samples: int, batch_size: int, sizes: list[int]) -> None:
    loader = make_loader(numbered(samples), batch_size=batch_size, train=True, device="cpu")
    assert [len(labels) for _, labels in loader] == sizes


def test_workers_are_for_what_is_not_in_memory_and_pinning_is_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = [(torch.zeros(1), 0)] * 4
    settings: Any = {"batch_size": 2, "train": True, "num_workers": 1}
    on_cpu = make_loader(plain, device="cpu", **settings)
    on_cuda = make_loader(plain, device="cuda:0", **settings)
    in_memory = make_loader(numbered(4), device="cuda", **settings)
    assert (on_cpu.num_workers, on_cpu.pin_memory) == (1, False)
    assert sorted(labels.tolist() for _, labels in on_cpu) == [[0, 0], [0, 0]]
    assert (on_cuda.num_workers, on_cuda.pin_memory, on_cuda.persistent_workers) == (1, True, False)
    assert (in_memory.num_workers, in_memory.pin_memory) == (0, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert make_loader(plain, device="auto", **settings).pin_memory


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"batch_size": 0}, ("batch_size is 0", "1 or more")),
        ({"num_workers": -1}, ("num_workers is -1", "0 or more")),
    ],
)
def test_loader_errors(given: dict[str, int], facts: tuple[str, ...]) -> None:
    with refused(*facts):
        make_loader(numbered(4), **{"batch_size": 2, "train": True, **given})  # type: ignore[arg-type]


def test_three_loaders_from_one_call() -> None:
    loaders = make_loaders(datasets.digits, batch_size=64, seed=3, device="cpu", image_size=8)
    assert [len(loader) for loader in (loaders.train, loaders.val, loaders.test)] == [20, 3, 6]
    images, labels = next(iter(loaders.train))
    assert (images.shape, labels.shape) == ((64, 1, 8, 8), (64,))
    assert loaders.splits.num_classes == 10


def test_a_batch_is_one_fetch() -> None:
    """The whole batch is indexed at once: no Python call per sample."""
    calls: list[int] = []

    class Counting(Pictures):
        def __getitems__(self, indices: Any) -> Any:
            calls.append(len(indices))
            return super().__getitems__(indices)

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("fetched one by one")

    pictures = numbered(20)
    counting = Counting(pictures.images, pictures.labels, pictures.mean, pictures.std, 4)
    list(make_loader(counting, batch_size=8, train=True, device="cpu"))
    assert calls == [8, 8, 4]


# --- augmentation ----------------------------------------------------------------------------------------------------


def naive_shift_and_mirror(images: Tensor, generator: Generator, pixels: int) -> Tensor:
    """The same, one picture at a time."""
    n, _, h, w = images.shape
    top, left = torch.randint(2 * pixels + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    out = []
    for i in range(n):
        padded = torch.nn.functional.pad(images[i], (pixels,) * 4)
        crop = padded[:, top[i] : top[i] + h, left[i] : left[i] + w]
        out.append(crop.flip(-1) if mirror[i] else crop)
    return torch.stack(out)


def test_augmentation_equals_the_slow_version() -> None:
    images = torch.randn(12, 3, 6, 5)
    fast = shift_and_mirror(images, Generator().manual_seed(7), pixels=2)
    slow = naive_shift_and_mirror(images, Generator().manual_seed(7), pixels=2)
    assert torch.equal(fast, slow)
    assert not torch.equal(fast, images)


def test_augmentation_is_for_training_and_repeats_by_seed() -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 1, 8, 8)
    pictures = Pictures(images, torch.zeros(6).long(), mean=(0.0,), std=(1.0,), image_size=8, augment=True)

    def epoch(train: bool, seed: int = 0) -> Tensor:
        return next(iter(make_loader(pictures, batch_size=6, train=train, device="cpu", seed=seed)))[0]

    assert torch.equal(epoch(False), images)
    assert torch.equal(epoch(True), epoch(True))
    assert not torch.equal(epoch(True), epoch(True, seed=1))


# --- torchvision's sets, without a download --------------------------------------------------------------------------


def fake(monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...], classes: int) -> list[dict[str, Any]]:
    """Put a small stand-in for `torchvision.datasets.<name>` in place; returns how it was called."""
    calls: list[dict[str, Any]] = []

    def build(root: str, **options: Any) -> SimpleNamespace:
        calls.append({"root": root, **options})
        n = 5100 if options["train"] else 50
        targets = (torch.arange(n) % classes).tolist()
        return SimpleNamespace(data=np.full((n, *shape), 255, dtype=np.uint8), targets=targets)

    monkeypatch.setattr(torchvision.datasets, name, build)
    return calls


@pytest.mark.parametrize(
    ("builder", "name", "stored_shape", "classes", "shape", "augment"),
    [
        (datasets.mnist, "MNIST", (28, 28), 10, (1, 28, 28), False),
        (datasets.fashion_mnist, "FashionMNIST", (28, 28), 10, (1, 28, 28), False),
        (datasets.cifar10, "CIFAR10", (32, 32, 3), 10, (3, 32, 32), True),
        (datasets.cifar100, "CIFAR100", (32, 32, 3), 100, (3, 32, 32), True),
    ],
)
def test_torchvision_sets(
    builder: Any,
    name: str,
    stored_shape: tuple[int, ...],
    classes: int,
    shape: tuple[int, ...],
    augment: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    calls = fake(monkeypatch, name, stored_shape, classes)
    splits: Splits = builder(root=tmp_path)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [100, 5000, 50]  # type: ignore[arg-type]
    assert splits.train[0][0].shape == shape
    assert (splits.image_size, splits.channels, splits.num_classes) == (shape[1], shape[0], classes)
    assert [s.augment for s in (splits.train, splits.val, splits.test)] == [augment, False, False]  # type: ignore[attr-defined]
    assert calls == [{"root": str(tmp_path), "train": train, "download": True} for train in (True, False)]


def test_white_is_normalised_by_the_published_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "MNIST", (28, 28), 10)
    assert datasets.mnist().test[0][0][0, 0, 0].item() == pytest.approx((1 - 0.1307) / 0.3081)


def test_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        datasets.mnist(root=tmp_path)
    assert str(caught.value) == (
        f"MNIST is not in {tmp_path} and could not be downloaded (<urlopen error no route to host>): connect once, or "
        "copy the files there"
    )


def test_wrong_number_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "CIFAR10", (32, 32, 3), 10)
    with refused("num_classes is 5", "CIFAR10", "10 classes"):
        datasets.cifar10(num_classes=5)
    with refused("channels is 1", "3"):
        datasets.cifar10(channels=1)


# --- a folder of pictures --------------------------------------------------------------------------------------------


def files(split: Any) -> set[str]:
    return {split.dataset.samples[i][0] for i in split.indices}


def test_one_folder_is_divided(tmp_path: Path) -> None:
    splits = datasets.imagefolder(write_pictures(tmp_path), num_classes=2, image_size=16)
    parts = [files(split) for split in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert len(set.union(*parts)) == 20
    assert splits.test[0][0].shape == (3, 16, 16)


def test_only_training_pictures_are_augmented(tmp_path: Path) -> None:
    splits = datasets.imagefolder(write_pictures(tmp_path), num_classes=2, image_size=16)
    assert "RandomResizedCrop" in repr(splits.train.dataset.transform)  # type: ignore[attr-defined]
    assert "Random" not in repr(splits.test.dataset.transform)  # type: ignore[attr-defined]
    plain = datasets.imagefolder(tmp_path, num_classes=2, image_size=16, augment=False)
    assert "Random" not in repr(plain.train.dataset.transform)  # type: ignore[attr-defined]


def test_train_val_test_folders(tmp_path: Path) -> None:
    for name, each in (("train", 10), ("val", 3), ("test", 2)):
        write_pictures(tmp_path / name, each=each)
    splits = datasets.imagefolder(tmp_path, num_classes=2, image_size=16, channels=1)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [20, 6, 4]  # type: ignore[arg-type]
    assert splits.val[0][0].shape == (1, 16, 16)


def test_without_a_test_folder_val_is_the_test_split(tmp_path: Path) -> None:
    for name, each in (("train", 10), ("val", 3)):
        write_pictures(tmp_path / name, each=each)
    splits = datasets.imagefolder(tmp_path, num_classes=2, image_size=16)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [18, 2, 6]  # type: ignore[arg-type]
    assert files(splits.train).isdisjoint(files(splits.val))


def test_folder_errors(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a/train")
    write_pictures(tmp_path / "a/val", classes=("cat", "fox"))
    with refused("['cat', 'dog']", "['cat', 'fox']"):
        datasets.imagefolder(tmp_path / "a", num_classes=2)
    with refused("num_classes is 5", "train", "2 classes"):
        datasets.imagefolder(tmp_path / "a/train", num_classes=5)
    with refused("nowhere", "folder"):
        datasets.imagefolder(tmp_path / "nowhere", num_classes=2)
    with refused("channels is 2", "1", "3"):
        datasets.imagefolder(tmp_path / "a/train", num_classes=2, channels=2)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    huge = whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:29]  # the size in its header
    huge += zlib.crc32(huge[12:]).to_bytes(4, "big") + whole[33:]
    for spoiled, told in {
        whole[:45]: "",  # Pillow's own words, which change
        b"no picture": "cannot identify image file",
        huge: "3600000000 pixels",
    }.items():
        (tmp_path / "cat" / "0.png").write_bytes(spoiled)
        with refused(f"{tmp_path}/cat/0.png", told):
            datasets.imagefolder(tmp_path, num_classes=2, image_size=16).train.dataset[0]  # type: ignore[attr-defined]


def test_a_loader_reads_the_folder(tmp_path: Path) -> None:
    loaders = make_loaders(
        datasets.imagefolder, batch_size=8, device="cpu", path=write_pictures(tmp_path), num_classes=2, image_size=16
    )
    images, labels = next(iter(loaders.train))
    assert (images.shape, labels.shape) == ((8, 3, 16, 16), (8,))
    assert set(labels.tolist()) <= {0, 1}


def test_an_epoch_of_digits_costs_milliseconds() -> None:
    """Generous by a factor of 50, so that only a loop over samples fails it."""
    loader = make_loader(datasets.digits().train, batch_size=64, train=True, device="cpu")
    start = time.process_time()
    assert sum(len(labels) for _, labels in loader) == 1257
    assert time.process_time() - start < 0.5
