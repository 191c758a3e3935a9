"""Reference data: training, validation and test splits that do not overlap, and loaders for them.

The splits depend on `split_seed` only, never on the run's seed, so that every run is tested on the same samples.
Pictures in memory are fetched a whole batch at a time (one indexing operation), others file by file.

Axes in names: n sample, c channel, h row, w column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from gsprune.extras import need
from gsprune.text.display import first_line, logger, one_line
from gsprune.zoo.sizes import check_at_least

log = logger(__name__)
Batch = tuple[Tensor, Tensor]
Transforms = tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]  # for training, for validation and test


@dataclass(frozen=True, eq=False)
class Splits:
    """Three data sets of (picture or text, label) with no sample in common.

    Args:
        train: for weights and scores.
        val: for watching a run, and for choosing between runs.
        test: for the reported accuracy, nothing else.
        num_classes: labels are 0..num_classes-1.
        image_size, channels: pictures are (channels, image_size, image_size); None for texts.
        labels: the names of 0, 1, ..., if the data has names.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    image_size: int | None = None
    channels: int | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Loaders:
    """A `DataLoader` of (inputs, labels) for each split; only the training one shuffles."""

    train: DataLoader[Any]
    val: DataLoader[Any]
    test: DataLoader[Any]
    splits: Splits


class FetchedWhole(Dataset[Any]):
    """A data set in memory whose `__getitems__` returns a batch as the model takes it, without collating."""

    augment: bool = False


@dataclass(frozen=True, eq=False)
class Pictures(FetchedWhole):
    """Pictures in memory in their stored type, normalised when fetched.

    Args:
        images: (n, c, h, w), usually uint8.
        labels: (n,), int64.
        mean, std: of each channel, in the units of `images`.
        image_size: pictures are resized to this side when fetched.
        augment: shift by up to 4 pixels and mirror at random, in a training loader.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    augment: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch: (k, c, image_size, image_size) float32 and (k,) int64."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (self.mean, self.std))
        images = (self.images[chosen].float() - mean) / std
        if self.image_size != images.shape[-1]:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return images, self.labels[chosen]

    def take(self, indices: Tensor, *, augment: bool = False) -> Pictures:
        return replace(self, images=self.images[indices], labels=self.labels[indices], augment=augment)


def digits(*, image_size: int = 8, channels: int = 1, num_classes: int = 10, split_seed: int = 0) -> Splits:
    """The 1,797 handwritten digits bundled with scikit-learn, 8x8: 1,257 to train, 180 to validate, 360 to test.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.

    >>> splits = digits()
    >>> len(splits.train), len(splits.val), len(splits.test), splits.train[0][0].shape
    (1257, 180, 360, torch.Size([1, 8, 8]))
    """
    images, labels = need("sklearn.datasets").load_digits(return_X_y=True)
    pictures = _pictures(
        torch.tensor(images, dtype=torch.uint8).view(-1, 1, 8, 8),
        torch.tensor(labels),
        mean=(4.884,),
        std=(6.017,),
        image_size=image_size,
        channels=channels,
    )
    return split_pictures(pictures, val=180, test=360, num_classes=num_classes, split_seed=split_seed)


def mnist(**options: Any) -> Splits:
    """MNIST: 70,000 handwritten digits, 28x28; 55,000 to train, 5,000 to validate, its own 10,000 to test.

    Args:
        options: `root` (folder to download to), `image_size`, `channels`, `num_classes`, `split_seed`, `max_train`
            (at most this many training samples), `augment` (shift and mirror; False).
    """
    return _torchvision("MNIST", mean=(0.1307,), std=(0.3081,), **{"image_size": 28, "channels": 1, **options})


def fashion_mnist(**options: Any) -> Splits:
    """Fashion-MNIST: 70,000 pictures of clothes, 28x28, split and used as `mnist`."""
    return _torchvision("FashionMNIST", mean=(0.2860,), std=(0.3530,), **{"image_size": 28, "channels": 1, **options})


def cifar10(**options: Any) -> Splits:
    """CIFAR-10: 60,000 photographs, 32x32; 45,000 to train, 5,000 to validate, its own 10,000 to test.

    Options as for `mnist`; `augment` is True: random shifts by up to 4 pixels and mirroring, in training only.
    """
    stats = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    return _torchvision("CIFAR10", **{"augment": True, **stats, **options})


def cifar100(**options: Any) -> Splits:
    """CIFAR-100: 60,000 photographs in 100 classes, 32x32, split and used as `cifar10`."""
    stats = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
    return _torchvision("CIFAR100", **{"augment": True, "num_classes": 100, **stats, **options})


def random(
    *, image_size: int = 32, channels: int = 3, num_classes: int = 10, samples: int = 512, split_seed: int = 0
) -> Splits:
    """Noise with random labels, for measuring speed: accuracy on it means nothing.

    Args:
        samples: training pictures; the validation and the test split have a quarter as many each.
    """
    check_at_least(1, image_size=image_size, channels=channels, num_classes=num_classes, samples=samples)
    log.warning("The data set `random` is noise for measuring speed: accuracy on it means nothing.")
    generator = Generator().manual_seed(split_seed)
    held_out = max(1, samples // 4)
    shape = (samples + 2 * held_out, channels, image_size, image_size)
    pictures = Pictures(
        images=torch.randint(256, shape, dtype=torch.uint8, generator=generator),
        labels=torch.randint(num_classes, shape[:1], generator=generator),
        mean=(127.5,),
        std=(73.9,),
        image_size=image_size,
    )
    return split_pictures(pictures, val=held_out, test=held_out, num_classes=num_classes, split_seed=split_seed)


def imagefolder(
    path: str | Path,
    *,
    num_classes: int,
    image_size: int = 224,
    channels: int = 3,
    split_seed: int = 0,
    augment: bool = True,
) -> Splits:
    """Your own pictures, in one folder a class.

    Args:
        path: a folder with `train/` and `val/` (and `test/`), each with one folder a class; or a folder with one folder
            a class, of which 80 % trains and 10 % each validate and test. Without a `test/`, `val/` becomes the test
            split and a tenth of `train/` validates, so that no choice depends on the test split.
        channels: 3, or 1 for grey.
        augment: random crops and mirroring, in training only.

    Raises:
        ValueError: no such folder, no pictures in it, not `num_classes` classes, or folders with different classes.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}: pictures from a folder have 1 (grey) or 3")
    root, plain = Path(path).expanduser(), _picture_transform(image_size, channels, augment=False)
    transforms = (_picture_transform(image_size, channels, augment=augment), plain)
    if (root / "train").is_dir() and (root / "val").is_dir():
        train, val, test = _foldered(root, transforms, split_seed)
    else:
        train, val, test = _divided(root, transforms, (0.1, 0.1), split_seed)
    _check_classes(str(root), len(_classes(train)), num_classes)
    return Splits(train, val, test, num_classes, image_size, channels)


def split_pictures(
    pictures: Pictures, *, val: int, test: int, num_classes: int, split_seed: int, max_train: int | None = None
) -> Splits:
    """Divide a set at random: `val` and `test` samples, and the rest (at most `max_train`) for training.

    >>> whole = Pictures(torch.zeros(10, 1, 2, 2), torch.arange(10), mean=(0.0,), std=(1.0,), image_size=2)
    >>> splits = split_pictures(whole, val=2, test=3, num_classes=10, split_seed=0)
    >>> sorted(splits.train.labels.tolist() + splits.val.labels.tolist() + splits.test.labels.tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    _check_classes("the data set", int(pictures.labels.max()) + 1, num_classes, exact=False)
    test_indices, val_indices, rest = _split(len(pictures), (test, val), split_seed)
    train = pictures.take(_limited(rest, max_train), augment=pictures.augment)
    val_pictures, test_pictures = pictures.take(val_indices), pictures.take(test_indices)
    return Splits(train, val_pictures, test_pictures, num_classes, pictures.image_size, pictures.images.shape[1])


def make_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    train: bool,
    device: str | torch.device = "auto",
    num_workers: int = 0,
    seed: int = 0,
) -> DataLoader[Any]:
    """A loader of (inputs, labels) batches.

    Args:
        train: shuffle (and augment) with the loader's own generator, seeded with `seed`. The last batch may be short;
            it is dropped only if it would be a single sample, which BatchNorm cannot normalise.
        device: the device of the training. For CUDA, memory is pinned.
        num_workers: processes that read ahead; data in memory need none. They start anew in each epoch, with seeds from
            the loader's generator, so that an epoch depends on that generator only and not on the number of epochs
            before it.

    Raises:
        ValueError: `batch_size` below 1 or `num_workers` below 0.
    """
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, num_workers=num_workers)
    generator = Generator().manual_seed(seed)
    on_cuda = _is_cuda(device)
    collate = _Collate(generator if train and dataset.augment else None) if isinstance(dataset, FetchedWhole) else None
    workers = num_workers if collate is None else 0
    samples = len(dataset)  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train,
        drop_last=train and samples > batch_size > 1 and samples % batch_size == 1,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=on_cuda,
        generator=generator,
    )


def make_loaders(
    builder: Callable[..., Splits],
    *,
    batch_size: int,
    seed: int = 0,
    device: str | torch.device = "auto",
    num_workers: int = 0,
    **options: Any,
) -> Loaders:
    """The three loaders of `builder(**options)`; the configuration group `dataset` calls it.

    >>> loaders = make_loaders(digits, batch_size=64)
    >>> [len(loader) for loader in (loaders.train, loaders.val, loaders.test)]
    [20, 3, 6]
    """
    splits = builder(**options)

    def loader(split: Dataset[Any], train: bool) -> DataLoader[Any]:
        return make_loader(split, batch_size=batch_size, train=train, device=device, num_workers=num_workers, seed=seed)

    return Loaders(loader(splits.train, True), loader(splits.val, False), loader(splits.test, False), splits)


def shift_and_mirror(images_nchw: Tensor, generator: Generator, *, pixels: int = 4) -> Tensor:
    """Shift each picture by up to `pixels` in both directions, fill with 0, and mirror half of them.

    One indexing operation for the whole batch; torchvision's transforms draw once a batch, or loop over pictures.
    Source: He et al., 2016, section 4.2.
    """
    n, c, h, w = images_nchw.shape
    padded = F.pad(images_nchw, (pixels,) * 4)
    top, left = torch.randint(2 * pixels + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    rows = top + torch.arange(h)
    columns = left + torch.where(mirror, torch.arange(w - 1, -1, -1), torch.arange(w))
    samples, channels = torch.arange(n).view(n, 1, 1, 1), torch.arange(c).view(1, c, 1, 1)
    return padded[samples, channels, rows.view(n, 1, h, 1), columns.view(n, 1, 1, w)]


@dataclass(frozen=True, eq=False)
class _Collate:
    """Takes the whole batches of `FetchedWhole`, and augments them with the loader's generator."""

    generator: Generator | None

    @property
    def whole_batches(self) -> bool:
        """Whether the random numbers are those of a whole batch, so that a part of it would draw others."""
        return self.generator is not None

    def __call__(self, batch: Any) -> Any:
        inputs, labels = batch
        return (inputs if self.generator is None else shift_and_mirror(inputs, self.generator)), labels


def _pictures(images: Tensor, labels: Tensor, *, channels: int, **settings: Any) -> Pictures:
    have = images.shape[1]
    if channels != have:
        if have != 1:
            raise ValueError(f"channels is {channels}, but these pictures have {have}")
        images = images.expand(-1, channels, -1, -1)  # a view: grey repeated costs no memory
    check_at_least(1, image_size=settings["image_size"])
    return Pictures(images=images, labels=labels, **settings)


def _torchvision(
    name: str,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    root: str | Path = "data",
    image_size: int = 32,
    channels: int = 3,
    num_classes: int = 10,
    split_seed: int = 0,
    max_train: int | None = None,
    augment: bool = False,
) -> Splits:
    """A data set of torchvision, in memory, with 5,000 of its training samples held out for validation."""

    def load(train: bool) -> Pictures:
        images, labels = _download(name, Path(root).expanduser(), train=train)
        stats = {"mean": tuple(255 * m for m in mean), "std": tuple(255 * s for s in std)}
        return _pictures(images, labels, channels=channels, image_size=image_size, **stats)

    training = replace(load(True), augment=augment)
    _check_classes(name, int(training.labels.max()) + 1, num_classes)
    splits = split_pictures(
        training, val=5000, test=0, num_classes=num_classes, split_seed=split_seed, max_train=max_train
    )
    return replace(splits, test=load(False))


def _download(name: str, root: Path, *, train: bool) -> Batch:
    """Images (n, c, h, w) uint8 and labels (n,) of a torchvision data set."""
    datasets = need("torchvision.datasets")
    try:
        source = getattr(datasets, name)(str(root), train=train, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise ValueError(
            f"{name} is not in {root.resolve()} and could not be downloaded ({first_line(error)}): connect once, or "
            "copy the files there"
        ) from error
    images = torch.as_tensor(source.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(source.targets, dtype=torch.int64)


def _picture_transform(image_size: int, channels: int, *, augment: bool) -> Callable[[Any], Tensor]:
    T = need("torchvision.transforms")
    if augment:
        crop = [T.RandomResizedCrop(image_size), T.RandomHorizontalFlip()]
    else:
        crop = [T.Resize(round(image_size * 8 / 7)), T.CenterCrop(image_size)]
    grey = [T.Grayscale()] if channels == 1 else []
    mean, std = ((0.449,), (0.226,)) if channels == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform: Callable[[Any], Tensor] = T.Compose([*grey, *crop, T.ToTensor(), T.Normalize(mean, std)])
    return transform


def _folder(path: Path, transform: Callable[[Any], Tensor]) -> Dataset[Any]:
    datasets = need("torchvision.datasets")
    try:
        return datasets.ImageFolder(str(path), transform=transform, loader=_picture)  # type: ignore[no-any-return]
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a folder with one folder of pictures a class") from error


def _picture(path: str) -> Any:
    """The picture in a file, in colour. Pillow refuses pictures of more than half a gigabyte."""
    from PIL import Image

    load = need("torchvision.datasets.folder").default_loader
    try:
        return load(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({one_line(str(error), 200)})") from None


def _foldered(root: Path, transforms: Transforms, split_seed: int) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    augmented, plain = transforms
    held_out = _folder(root / "val", plain)
    if (root / "test").is_dir():
        train, val, test = _folder(root / "train", augmented), held_out, _folder(root / "test", plain)
    else:
        log.info("%s has no test/: val/ is the test split, a tenth of train/ validates", root)
        train, val, _ = _divided(root / "train", transforms, (0.1, 0.0), split_seed)
        test = held_out
    for split in (val, test):
        if _classes(split) != _classes(train):
            raise ValueError(f"the folders of {root} hold different classes: {_classes(train)} and {_classes(split)}")
    return train, val, test


def _divided(
    root: Path, transforms: Transforms, shares: tuple[float, float], split_seed: int
) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """One folder divided into train, val and test; its files are listed twice, for the two transforms."""
    for_training, for_testing = (_folder(root, transform) for transform in transforms)
    total = len(for_training)  # type: ignore[arg-type]
    val, test, train = _split(total, (round(shares[0] * total), round(shares[1] * total)), split_seed)
    parts = ((for_training, train), (for_testing, val), (for_testing, test))
    return tuple(Subset(folder, indices.tolist()) for folder, indices in parts)  # type: ignore[return-value]


def _classes(dataset: Dataset[Any]) -> list[str]:
    folder = dataset.dataset if isinstance(dataset, Subset) else dataset
    return folder.classes  # type: ignore[attr-defined, no-any-return]


def _split(total: int, held_out: tuple[int, int], split_seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the two held-out parts, and of the rest."""
    first, second = held_out
    if total - first - second < 1:
        raise ValueError(f"{total} samples are too few to hold out {first + second} and still train")
    order = torch.randperm(total, generator=Generator().manual_seed(split_seed))
    return order[:first], order[first : first + second], order[first + second :]


def _limited(indices: Tensor, max_train: int | None) -> Tensor:
    if max_train is None:
        return indices
    if not 1 <= max_train <= len(indices):
        raise ValueError(f"max_train is {max_train}: it must be from 1 to {len(indices)}, or null for all")
    return indices[:max_train]


def _check_classes(name: str, found: int, wanted: int, *, exact: bool = True) -> None:
    if (found != wanted) if exact else (found > wanted):
        raise ValueError(f"num_classes is {wanted}, but {name} has {found} classes")


def _is_cuda(device: str | torch.device) -> bool:
    return torch.cuda.is_available() if device == "auto" else torch.device(device).type == "cuda"
