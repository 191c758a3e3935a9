"""Text classification data: files of texts and labels, read as plain data, tokenised once, padded in each batch.

A file is CSV, TSV or JSON lines with a column of texts and a column of labels. Splits made here do not overlap: a
repeated text is in one of them only.

Axes in names: n sample, t token.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from gsprune.files.disk import refusing
from gsprune.text.display import logger
from gsprune.text.names import did_you_mean
from gsprune.zoo import hf
from gsprune.zoo.datasets import FetchedWhole, Splits

__all__ = ["Lines", "Texts", "divide", "read_lines", "text_classification"]

log = logger(__name__)
LARGEST = 2 * 1024**3  # bytes of a file, which is read into memory
LONGEST = 10_000_000  # characters of a line of JSON, which can take 20 times as many bytes in memory
HELD_OUT = 0.1  # of the training file, for each split without a file
TextBatch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Lines:
    """The content of a file: texts, the names of their labels, and the line on which each ends."""

    path: str
    texts: Sequence[str]
    labels: Sequence[str]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Lines:
        parts = ([values[i] for i in indices] for values in (self.texts, self.labels, self.numbers))
        return Lines(self.path, *parts)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Texts(FetchedWhole):
    """Tokenised texts in memory, one after the other.

    Args:
        ids: (all tokens,).
        types: (all tokens,), the `token_type_ids`; None if the tokenizer has none.
        bounds: (n + 1,), text i is `ids[bounds[i]:bounds[i + 1]]`.
        labels: (n,), int64.
        padding: the padding values of `ids` and of `types`.
        left: pad on the left, as some decoders need it.
    """

    ids: Tensor
    types: Tensor | None
    bounds: Tensor
    labels: Tensor
    padding: tuple[int, int] = (0, 0)
    left: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> TextBatch:
        inputs, labels = self.__getitems__([index])
        return {name: value[0] for name, value in inputs.items()}, labels[0]

    def __getitems__(self, indices: Sequence[int]) -> TextBatch:
        """A whole batch: `input_ids`, `attention_mask` (and `token_type_ids`), each (k, t) int64, and (k,) int64.

        t is the length of the longest text among them.

        >>> texts = Texts(torch.tensor([7, 8, 9]), None, torch.tensor([0, 1, 3]), torch.tensor([1, 0]))
        >>> inputs, labels = texts.__getitems__([0, 1])
        >>> inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), labels.tolist()
        ([[7, 0], [8, 9]], [[1, 0], [1, 1]], [1, 0])
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        starts, lengths = self.bounds[chosen], self.bounds[chosen + 1] - self.bounds[chosen]
        width = int(lengths.max())
        offsets_nt = torch.arange(width).expand(len(chosen), width)
        if self.left:
            offsets_nt = offsets_nt - (width - lengths)[:, None]
        inside_nt = (offsets_nt >= 0) & (offsets_nt < lengths[:, None])
        places_nt = (starts[:, None] + offsets_nt).where(inside_nt, starts[:, None])

        def padded(values: Tensor, padding: int) -> Tensor:
            return values[places_nt].long().masked_fill(~inside_nt, padding)

        inputs = {"input_ids": padded(self.ids, self.padding[0]), "attention_mask": inside_nt.long()}
        if self.types is not None:
            inputs["token_type_ids"] = padded(self.types, self.padding[1])
        return inputs, self.labels[chosen]


@refusing()
def text_classification(
    train: str | Path,
    *,
    tokenizer: str | Path,
    val: str | Path | None = None,
    test: str | Path | None = None,
    text_column: str = "text",
    label_column: str = "label",
    max_length: int = 128,
    num_classes: int | None = None,
    split_seed: int = 0,
) -> Splits:
    """Your own texts, in .csv or .tsv files with a header, or .jsonl, .ndjson or .json files with one object a line.

    The labels' names become 0, 1, ... in sorted order (of numbers, if all are whole numbers): see `Splits.labels`.

    Args:
        train, val, test: without `val` and `test`, 80 % of `train` trains and 10 % each validate and test, chosen by
            `split_seed`, the same share of each label. With `val` and no `test`, `val` becomes the test split and a
            tenth of `train` validates, so that no choice depends on the test split. With `test` and no `val`, a tenth
            of `train` validates.
        tokenizer: a folder, or a name on the Hugging Face hub.
        max_length: the most tokens of a text, with the special ones; longer texts are cut.
        num_classes: the number of labels; None: any number from two up.

    Raises:
        ValueError: a file is missing, empty, too large or of another kind, lacks a column or has an unreadable line; or
            its labels are not in the training file, or are all the same.
    """

    def read(path: str | Path, setting: str) -> Lines:
        return read_lines(path, text=text_column, label=label_column, setting=f"dataset.{setting}")

    rows = read(train, "train")
    others = (None if val is None else read(val, "val"), None if test is None else read(test, "test"))
    rows, val_rows, test_rows = _three(rows, *others, split_seed=split_seed)
    names = label_names(rows.labels)
    if len(names) == 1:
        raise ValueError(f"{rows.path} has no other label than {names[0]!r}: there is nothing to tell apart")
    if num_classes not in (None, len(names)):
        raise ValueError(f"num_classes is {num_classes}, but {rows.path} has {len(names)} labels")
    encoder = _Encoder(hf.load_tokenizer(tokenizer), max_length, names, rows.path)
    splits = Splits(encoder(rows), encoder(val_rows), encoder(test_rows), len(names), labels=names)
    numbered = ", ".join(f"{name} = {number}" for number, name in enumerate(names))
    log.info("%d texts to train, %d to validate, %d to test; %s", len(rows), len(val_rows), len(test_rows), numbered)
    return splits


def read_lines(path: str | Path, *, text: str, label: str, setting: str = "path") -> Lines:
    """The texts and labels of a file, as `text_classification` describes it.

    CSV fields may be in quotes, with line breaks inside; TSV has no quotes, as its standard says. The labels of JSON
    are strings, whole numbers, or true and false. Blank lines are skipped.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{setting}={path} does not exist" if not file.exists() else f"{setting}={path} is no file")
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{setting}={path} is not allowed: it must end in {', '.join(READERS)}")
    if file.stat().st_size > LARGEST:
        raise ValueError(
            f"{setting}={path} has {file.stat().st_size:,} bytes: at most {LARGEST:,} are read into memory"
        )
    found: list[tuple[str, str, int]] = []
    for number, row in reader(path, _decoded(path, file.read_bytes())):
        if not found:
            _check_columns(path, list(row), text, label)
        found.append((*_sample(f"{path} line {number}", row, text, label), number))
    if not found:
        raise ValueError(f"{path} is empty: it has no text to learn from")
    texts, labels, numbers = zip(*found, strict=True)
    return Lines(str(path), texts, labels, numbers)


def label_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The different labels, sorted; whole numbers by value.

    >>> label_names(["10", "9", "10"]), label_names(["pos", "neg", "10"])
    (('9', '10'), ('10', 'neg', 'pos'))
    """
    names = set(labels)
    numbers = all(name.removeprefix("-").isdecimal() and name.isascii() and len(name) < 20 for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name)) if numbers else sorted(names))


def divide(lines: Lines, parts: int, split_seed: int) -> list[Lines]:
    """Hold out a tenth of the lines `parts` times; returns the rest, then the parts.

    Each part has a tenth of each label's texts, rounded half up: a label with fewer than five is in the rest only.
    Equal texts stay together.
    """
    generator = Generator().manual_seed(split_seed)
    same: dict[str, list[int]] = defaultdict(list)  # text -> its lines
    for i, text in enumerate(lines.texts):
        same[text].append(i)
    of_label: dict[str, list[list[int]]] = defaultdict(list)
    for indices in same.values():
        of_label[lines.labels[indices[0]]].append(indices)
    chosen: list[list[int]] = [[] for _ in range(parts + 1)]
    for label in sorted(of_label):
        groups = of_label[label]
        share = int(HELD_OUT * len(groups) + 0.5)
        for place, group in enumerate(torch.randperm(len(groups), generator=generator).tolist()):
            part = place // share + 1 if place < share * parts else 0
            chosen[part] += groups[group]
    if not all(chosen):
        raise ValueError(
            f"{lines.path} has too few texts of a label to hold out a tenth: it takes 5, or files for dataset.val and "
            "dataset.test"
        )
    return [lines.take(sorted(indices)) for indices in chosen]


@dataclass(frozen=True)
class _Encoder:
    """Makes `Texts` of lines, with the labels of the training file."""

    tokenizer: Any
    max_length: int
    names: Sequence[str]
    train_path: str

    def __post_init__(self) -> None:
        least, most = self.tokenizer.num_special_tokens_to_add() + 1, self.tokenizer.model_max_length
        if not least <= self.max_length <= most:
            raise ValueError(
                f"max_length is {self.max_length}: with this tokenizer it must be from {least} to {most:,}"
            )

    def __call__(self, lines: Lines) -> Texts:
        labels = [self._label(lines, i) for i in range(len(lines))]
        encoded = self.tokenizer(
            list(lines.texts), truncation=True, max_length=self.max_length, return_attention_mask=False
        )
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if not all(lengths):
            raise ValueError(f"{lines.path} line {lines.numbers[lengths.index(0)]} has a text without a single token")
        types = encoded.get("token_type_ids")
        return Texts(
            ids=_joined(encoded["input_ids"]),
            types=None if types is None else _joined(types),
            bounds=torch.tensor([0, *lengths]).cumsum(0),
            labels=torch.tensor(labels),
            padding=(hf.padding_id(self.tokenizer), self.tokenizer.pad_token_type_id),
            left=self.tokenizer.padding_side == "left",
        )

    def _label(self, lines: Lines, i: int) -> int:
        name = lines.labels[i]
        if name not in self.names:
            raise ValueError(
                f"{lines.path} line {lines.numbers[i]} has the label {name!r}, which does not occur in "
                f"{self.train_path}{_hint(name, self.names)}"
            )
        return self.names.index(name)


def _three(whole: Lines, val: Lines | None, test: Lines | None, *, split_seed: int) -> tuple[Lines, Lines, Lines]:
    """The splits, with parts of `whole` for those that have no file."""
    if val is not None and test is None:
        log.info("no dataset.test: %s is the test split, a tenth of %s validates", val.path, whole.path)
        val, test = None, val
    if test is None:
        train, val, test = divide(whole, 2, split_seed)
    elif val is None:
        train, val = divide(whole, 1, split_seed)
    else:
        train = whole
    known = {*train.texts, *val.texts}
    if common := sum(text in known for text in test.texts):
        log.warning("%d of %d test texts are also among those to train or validate on", common, len(test))
    return train, val, test


def _sample(where: str, row: dict[str, Any], text: str, label: str) -> tuple[str, str]:
    for column in (text, label):
        if row.get(column) is None:
            raise ValueError(f"{where} has no {column!r}")
    if not isinstance(row[text], str):
        raise ValueError(f"{where} has a {text!r} that is not a string")
    try:
        f"{row[text]}{row[label]}".encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half a character (a surrogate alone), which is no text") from None
    value = row[label]
    if not isinstance(value, str | int):
        raise ValueError(f"{where} has a {label!r} that is neither a string nor a whole number")
    name = value.strip() if isinstance(value, str) else json.dumps(value)
    if not name:
        raise ValueError(f"{where} has no {label!r}")
    return row[text], name


def _delimited(path: str | Path, content: str, **dialect: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True, **dialect)
    try:
        header = [name.strip() for name in next(reader, [])]
        for row in reader:
            if len(row) == len(header):
                yield reader.line_num, dict(zip(header, row, strict=True))
            elif row:
                raise ValueError(
                    f"{path} line {reader.line_num} has {len(row)} fields, but the first line has {len(header)}"
                )
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} cannot be read: {error}") from error


def _json_lines(path: str | Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(content), 1):
        if not line.strip():
            continue
        if len(line) > LONGEST:
            raise ValueError(f"{path} line {number} has {len(line):,} characters: at most {LONGEST:,} are read")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not a JSON object")
        yield number, row


READERS: dict[str, Callable[[str | Path, str], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".csv": _delimited,
    ".tsv": partial(_delimited, delimiter="\t", quoting=csv.QUOTE_NONE),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json_lines),
}


def _decoded(path: str | Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {number} is not UTF-8 text") from error


def _check_columns(path: str | Path, columns: list[str], *wanted: str) -> None:
    for name in wanted:
        if name not in columns:
            raise ValueError(f"{path} has no column {name!r}{_hint(name, columns)}")


def _hint(name: str, known: Sequence[str]) -> str:
    listed = ", ".join(map(repr, known[:10])) + (", ..." if len(known) > 10 else "")
    near = did_you_mean(name, known, cutoff=0.5)
    return f"{near} There are {listed}" if near else f"; there are {listed}"


def _joined(rows: Iterable[Sequence[int]]) -> Tensor:
    return torch.tensor([*chain.from_iterable(rows)], dtype=torch.int32)
