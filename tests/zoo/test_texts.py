"""Texts from files: what is read and refused, that splits keep apart, padding, and a whole job on a tiny BERT."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gsprune import Pruner
from gsprune.app import job
from gsprune.cost.counting import count_macs
from gsprune.training.trainer import Trainer
from gsprune.zoo import hf
from gsprune.zoo.datasets import make_loader, make_loaders
from gsprune.zoo.models import hf_sequence_classification
from gsprune.zoo.texts import LARGEST, Lines, Texts, divide, label_names, read_lines, text_classification

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "fine", "bad", "poor", "film", "plot", "was", "##ly")
TINY = {
    "model_type": "bert",
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a WordPiece tokenizer of 13 pieces; "[PAD]" is 0, "[CLS]" 2, "[SEP]" 3, "good" 5."""
    transformers = pytest.importorskip("transformers")
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    (folder / "words.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(folder / "words.txt"), model_max_length=128).save_pretrained(folder)
    return folder


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def reviews(path: Path, count: int = 40) -> Path:
    """Different texts, every second one good."""
    nouns = itertools.cycle(["film", "plot"])
    rows = [f"the {next(nouns)} {i} was {'good' if i % 2 else 'bad'},{'pos' if i % 2 else 'neg'}" for i in range(count)]
    return write(path, "\n".join(["text,label", *rows]))


def sentence(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    return str(caught.value)


# --- files -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Lines:
    return read_lines(path, text="text", label="label", setting="dataset.train")


@pytest.mark.parametrize(
    ("name", "content", "texts", "labels", "numbers"),
    [
        ("a.csv", 'text,label\n"one, ""two""\nthree",x\n\nfour,y\n', ['one, "two"\nthree', "four"], ["x", "y"], [3, 5]),
        ("a.CSV", b"\xef\xbb\xbflabel, text\r\n x ,\xc3\xa4\r\n", ["ä"], ["x"], [2]),
        ("a.tsv", 'id\ttext\tlabel\n1\t"one\t0\n2\ttwo, too\t1\n', ['"one', "two, too"], ["0", "1"], [2, 3]),
        ("a.jsonl", '{"text": "\u2028", "label": 1}\n\n{"label": "b", "text": ""}', ["\u2028", ""], ["1", "b"], [1, 3]),
        ("a.json", '{"text": "one", "label": true, "more": [1]}', ["one"], ["true"], [1]),
        ("a.ndjson", '{"text": "one", "label": "x"}\r\n', ["one"], ["x"], [1]),
    ],
)  # fmt: skip
def test_files_are_read(
    name: str, content: str | bytes, texts: list[str], labels: list[str], numbers: list[int], tmp_path: Path
) -> None:
    lines = read(write(tmp_path / name, content))
    assert [list(part) for part in (lines.texts, lines.labels, lines.numbers)] == [texts, labels, numbers]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty: it has no text to learn from"),
        ("a.csv", "text,label\n", "is empty: it has no text to learn from"),
        ("a.jsonl", "\n\n", "is empty: it has no text to learn from"),
        (
            "a.csv",
            "sentence,labels\nx,y\n",
            "has no column 'text'; there are 'sentence', 'labels'",
        ),
        ("a.csv", "text,labels\nx,y\n", "has no column 'label'; did you mean 'labels'? There are 'text', 'labels'"),
        ("a.csv", "text,label\na,b\nc,d,e\n", "line 3 has 3 fields, but the first line has 2"),
        ("a.csv", 'text,label\n"a,b\n', "line 2 cannot be read: unexpected end of data"),
        ("a.csv", 'text,label\na,\n', "line 2 has no 'label'"),
        ("a.csv", b"text,label\na,b\n\xff\xfe,d\n", "line 3 is not UTF-8 text"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"', "line 2 is not JSON: Expecting ',' delimiter"),
        ("a.jsonl", '["a", 1]', "line 1 is not a JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON: maximum recursion depth exceeded"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', "line 2 has no 'label'"),
        ("a.jsonl", '{"text": null, "label": 1}', "line 1 has no 'text'"),
        ("a.jsonl", '{"text": 3, "label": 1}', "line 1 has a 'text' that is not a string"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', "line 1 has a 'label' that is neither a string nor a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    found = sentence(lambda: read(path))
    assert found.startswith(f"{path} {message}")
    assert "\n" not in found


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, table = tmp_path / "a.csv", write(tmp_path / "a.parquet", "")
    assert sentence(lambda: read(missing)) == f"dataset.train={missing} does not exist"
    assert sentence(lambda: read(tmp_path)) == f"dataset.train={tmp_path} is no file"
    assert sentence(lambda: read(table)) == (
        f"dataset.train={table} is not allowed: it must end in .csv, .tsv, .jsonl, .ndjson, .json"
    )
    monkeypatch.setattr("gsprune.zoo.texts.LARGEST", 1000)
    large = write(tmp_path / "b.csv", "x" * 1001)
    assert sentence(lambda: read(large)) == (
        f"dataset.train={large} has 1,001 bytes: at most 1,000 are read into memory"
    )
    assert LARGEST == 2**31
    monkeypatch.setattr("gsprune.zoo.texts.LONGEST", 40)
    long = write(tmp_path / "c.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2, "more": [[], []]}\n')
    assert sentence(lambda: read(long)) == f"{long} line 2 has 44 characters: at most 40 are read"


def test_labels_are_sorted_and_whole_numbers_by_value() -> None:
    assert label_names(["b", "a", "b", "B"]) == ("B", "a", "b")
    assert label_names([str(i) for i in (10, 9, -1, 0)]) == ("-1", "0", "9", "10")
    assert label_names(["10", "9", "-"]) == ("-", "10", "9")


# --- splits ----------------------------------------------------------------------------------------------------------


def lines(texts: list[str], labels: list[str]) -> Lines:
    return Lines("a.csv", texts, labels, list(range(2, len(texts) + 2)))


def test_a_tenth_of_each_label_is_held_out() -> None:
    given = lines([f"text {i}" for i in range(60)], ["a"] * 40 + ["b"] * 16 + ["rare"] * 4)
    train, val, test = parts = divide(given, 2, split_seed=0)
    assert sorted(itertools.chain(*(part.numbers for part in parts))) == list(given.numbers)
    for part, counts in ((train, (32, 12, 4)), (val, (4, 2, 0)), (test, (4, 2, 0))):
        assert tuple(map(list(part.labels).count, ("a", "b", "rare"))) == counts
        assert list(part.numbers) == sorted(part.numbers)
        assert all(part.texts[i] == given.texts[number - 2] for i, number in enumerate(part.numbers))


def test_splits_depend_on_their_seed_alone() -> None:
    given = lines([f"text {i}" for i in range(60)], ["a", "b"] * 30)
    torch.manual_seed(1)
    first = divide(given, 2, split_seed=0)
    torch.manual_seed(2)
    assert divide(given, 2, split_seed=0) == first
    assert divide(given, 2, split_seed=1)[2].texts != first[2].texts


def test_equal_texts_are_in_one_split_whatever_their_labels() -> None:
    given = lines([f"text {i % 20}" for i in range(100)], [("a", "b")[i // 7 % 2] for i in range(100)])
    parts = [set(part.texts) for part in divide(given, 2, split_seed=3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20


def test_too_few_texts_to_hold_any_out() -> None:
    assert sentence(lambda: divide(lines(["1", "2", "3", "4"], ["a", "a", "b", "b"]), 2, split_seed=0)) == (
        "a.csv has too few texts of a label to hold out a tenth: it takes 5, or files for dataset.val and dataset.test"
    )


def sizes(splits: Any) -> list[int]:
    return [len(split) for split in (splits.train, splits.val, splits.test)]


def test_which_file_becomes_which_split(tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, few, fewer = (reviews(tmp_path / f"{count}.csv", count) for count in (40, 6, 4))
    with caplog.at_level(logging.INFO, logger="gsprune.zoo.texts"):
        assert sizes(text_classification(train, tokenizer=tokenizer)) == [32, 4, 4]
        assert caplog.messages == ["32 texts to train, 4 to validate, 4 to test; neg = 0, pos = 1"]
        caplog.clear()
        assert sizes(text_classification(train, test=few, tokenizer=tokenizer)) == [36, 4, 6]
        assert sizes(text_classification(train, val=few, tokenizer=tokenizer)) == [36, 4, 6]
        assert sizes(text_classification(train, val=few, test=fewer, tokenizer=tokenizer)) == [40, 6, 4]
    overlap = "6 of 6 test texts are also among those to train or validate on"
    assert caplog.messages[0] == overlap
    assert caplog.messages[2] == f"no dataset.test: {few} is the test split, a tenth of {train} validates"
    assert caplog.messages[3] == overlap


def test_no_overlap_no_warning(tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = write(tmp_path / "test.csv", "text,label\na good plot,pos\n")
    text_classification(reviews(tmp_path / "a.csv"), test=test, tokenizer=tokenizer)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_labels_that_training_does_not_know(tokenizer: Path, tmp_path: Path) -> None:
    train = reviews(tmp_path / "a.csv")
    test = write(tmp_path / "test.csv", "text,label\ngood,pos\nbad,Neg\n")
    assert sentence(lambda: text_classification(train, test=test, tokenizer=tokenizer)) == (
        f"{test} line 3 has the label 'Neg', which does not occur in {train}; did you mean 'neg'? "
        "There are 'neg', 'pos'"
    )
    test = write(tmp_path / "test.csv", "text,label\ngood,-1\n")
    assert sentence(lambda: text_classification(train, test=test, tokenizer=tokenizer)) == (
        f"{test} line 2 has the label '-1', which does not occur in {train}; there are 'neg', 'pos'"
    )


def test_settings_that_do_not_fit_the_data(tokenizer: Path, tmp_path: Path) -> None:
    train = reviews(tmp_path / "a.csv")
    one = write(tmp_path / "one.csv", "text,label\n" + "".join(f"film {i},pos\n" for i in range(20)))
    assert sentence(lambda: text_classification(one, tokenizer=tokenizer)) == (
        f"{one} has no other label than 'pos': there is nothing to tell apart"
    )
    assert sentence(lambda: text_classification(train, tokenizer=tokenizer, num_classes=3)) == (
        f"num_classes is 3, but {train} has 2 labels"
    )
    for given in (2, 129):
        assert sentence(lambda given=given: text_classification(train, tokenizer=tokenizer, max_length=given)) == (
            f"max_length is {given}: with this tokenizer it must be from 3 to 128"
        )


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_batch_are_those_of_the_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        "good",
        "the plot was very bad",
        "",
        "the film was finely done and more than sixteen words long in truth or so",
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t, "label": i % 2}) for i, t in enumerate(rows)))
    splits = text_classification(path, val=path, test=path, tokenizer=tokenizer, max_length=16)
    assert (splits.num_classes, splits.labels) == (2, ("0", "1"))
    inputs, labels = splits.train.__getitems__([3, 0, 2])  # type: ignore[attr-defined]
    wanted = hf.load_tokenizer(tokenizer)([rows[i] for i in (3, 0, 2)], truncation=True, max_length=16, padding=True)
    assert {name: value.tolist() for name, value in inputs.items()} == dict(wanted)
    assert inputs["input_ids"][1].tolist() == [2, 5, 3, *[0] * 13]
    assert labels.tolist() == [1, 0, 0]
    assert all(value.dtype == torch.int64 for value in (*inputs.values(), labels))


def test_padding_is_to_the_longest_of_the_batch() -> None:
    ids, bounds = torch.tensor([5, 6, 7, 8, 9, 10], dtype=torch.int32), torch.tensor([0, 1, 3, 6])
    texts = Texts(ids, ids + 10, bounds, torch.tensor([0, 1, 0]), padding=(99, 4))
    inputs, _ = texts.__getitems__([1, 0])
    assert {name: value.tolist() for name, value in inputs.items()} == {
        "input_ids": [[6, 7], [5, 99]],
        "attention_mask": [[1, 1], [1, 0]],
        "token_type_ids": [[16, 17], [15, 4]],
    }
    one, label = texts[2]
    assert (one["input_ids"].tolist(), label.item()) == ([8, 9, 10], 0)
    left, _ = Texts(ids, None, bounds, texts.labels, padding=(99, 0), left=True).__getitems__([0, 2])
    assert {name: value.tolist() for name, value in left.items()} == {
        "input_ids": [[99, 99, 5], [8, 9, 10]],
        "attention_mask": [[0, 0, 1], [1, 1, 1]],
    }


def test_a_text_without_a_token(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = hf.load_tokenizer(tokenizer)
    monkeypatch.setattr(type(bare), "__call__", lambda self, texts, **_: {"input_ids": [[5] * bool(t) for t in texts]})
    path = write(tmp_path / "a.csv", "text,label\na,x\nb,y\n,x\n")
    assert sentence(lambda: text_classification(path, val=path, test=path, tokenizer=tokenizer)) == (
        f"{path} line 4 has a text without a single token"
    )


def test_loaders_shuffle_for_training_and_need_no_workers(tokenizer: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": reviews(tmp_path / "a.csv"), "tokenizer": tokenizer, "device": "cpu"}
    first, again, other = (make_loaders(text_classification, batch_size=8, seed=seed, **options) for seed in (0, 0, 1))

    def epoch(loader: Any) -> list[int]:
        return [int(label) for _, labels in loader for label in labels]

    assert [len(labels) for _, labels in first.train] == [8, 8, 8, 8]
    second = epoch(first.train)
    assert epoch(again.train) != epoch(other.train)
    assert epoch(again.train) == second
    assert epoch(first.test) == epoch(other.test)
    assert make_loader(first.splits.train, batch_size=8, train=True, device="cuda", num_workers=4).num_workers == 0


# --- the library -----------------------------------------------------------------------------------------------------


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    options: dict[str, Any] = {"num_classes": 2, "tokenizer": "any", "max_length": 8}
    for build in (
        lambda: text_classification(reviews(tmp_path / "a.csv"), tokenizer="any"),
        lambda: hf_sequence_classification("any", **options),
    ):
        assert all(fact in sentence(build) for fact in ("transformers", "gsprune[hf]"))


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert sentence(lambda: hf.load_tokenizer("/no/where")) == "dataset.tokenizer=/no/where is not a folder"
    assert sentence(lambda: hf.load_tokenizer("./here")) == "dataset.tokenizer=./here is not a folder"
    found = sentence(lambda: hf.load_tokenizer(tmp_path))
    assert found.startswith(f"dataset.tokenizer={tmp_path} does not give a tokenizer: ")
    assert "\n" not in found
    assert len(found) < 400


def test_a_name_that_is_not_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = sentence(lambda: hf.load_tokenizer("nobody/has-this"))
    assert found.startswith("dataset.tokenizer=nobody/has-this does not give a tokenizer: ")


def test_padding_by_the_end_token_where_there_is_no_other(tokenizer: Path) -> None:
    pieces = hf.load_tokenizer(tokenizer)
    assert hf.padding_id(pieces) == 0
    pieces.pad_token = None
    pieces.eos_token = "[SEP]"
    assert hf.padding_id(pieces) == 3
    pieces.eos_token = None
    assert "padding" in sentence(lambda: hf.padding_id(pieces))


# --- training --------------------------------------------------------------------------------------------------------


def bert(tokenizer: Path, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"num_classes": 2, "tokenizer": tokenizer, "max_length": 16, "config": TINY, "pretrained": False}
    return hf_sequence_classification(None, **{**settings, **options})


@pytest.mark.slow
def test_the_trainer_takes_the_batches_as_they_are(tokenizer: Path, tmp_path: Path) -> None:
    path = reviews(tmp_path / "a.csv")
    loaders = make_loaders(
        text_classification, batch_size=8, device="cpu", train=path, tokenizer=tokenizer, max_length=16
    )
    model, trainer = bert(tokenizer), Trainer(device="cpu")
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=0.02), []
    trainer.fit(
        model,
        loaders.train,
        loaders.val,
        optimizer=optimizer,
        lr_schedule=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        pruner=Pruner(model, rules=[]),
        epochs=6,
        on_epoch=lambda _, values: rows.append(values),
    )
    assert rows[-1]["train/accuracy"] == rows[-1]["val/accuracy"] == 1.0
    assert rows[-1]["train/loss"] < 0.3 < rows[0]["train/loss"]
    assert trainer.evaluate(model, loaders.test)["accuracy"] == 1.0
    inputs, _ = next(iter(loaders.val))
    assert count_macs(model, {name: value[:1] for name, value in inputs.items()}) > 0


def overrides(tokenizer: Path, data: Path, *more: str) -> list[str]:
    config = ", ".join(f"{key}: {value}" for key, value in TINY.items())
    return [
        "model=hf_sequence_classification",
        "model.name=null",
        "model.pretrained=false",
        f"model.config={{{config}}}",
        "dataset=text_classification",
        f"dataset.train={data}",
        f"dataset.tokenizer={tokenizer}",
        "dataset.max_length=16",
        "dataset.batch_size=8",
        "optimizer=adamw",
        "optimizer.lr=0.02",
        "trainer.device=cpu",
        "trainer.dense_epochs=3",
        "trainer.prune_epochs=4",
        "trainer.latency_repeats=1",
        "trainer.progress=none",
        "tracking=none",
        *more,
    ]


def test_the_tokenizer_is_the_models_own_unless_given(compose_config: Any) -> None:
    config = compose_config("model=hf_sequence_classification", "dataset=text_classification", "model.name=some/bert")
    assert (config.dataset.tokenizer, config.model.tokenizer) == ("some/bert", "some/bert")
    assert (config.model.max_length, config.model.num_classes) == (128, None)


@pytest.mark.slow
def test_a_job_removes_single_weights(tokenizer: Path, tmp_path: Path, compose_config: Any) -> None:
    given = overrides(tokenizer, reviews(tmp_path / "a.csv"), "pruner=elementwise", "pruner.target_sparsity=0.5")
    result = job.run(compose_config(*given), output_dir=tmp_path / "out")
    assert (result["status"], result["labels"], result["sparsity"]) == ("finished", ["neg", "pos"], 0.5)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["labels"] == ["neg", "pos"]


@pytest.mark.slow
def test_a_job_removes_heads(tokenizer: Path, tmp_path: Path, compose_config: Any) -> None:
    given = overrides(tokenizer, reviews(tmp_path / "a.csv"), "pruner=abs", "pruner.keep.heads=1")
    result = job.run(compose_config(*given), output_dir=tmp_path / "out")
    assert (result["status"], result["shrunk"]) == ("finished", True)
    assert result["params_dense"] - result["params"] == 2 * (4 * 12 * 4 + 3 * 4)  # 2 of 3 heads of width 4
    assert result["macs"] < result["macs_dense"]
