"""Secrets: what a text, a configuration, a log and a terminal may hold, and what a run and a sweep leave of them."""

from __future__ import annotations

import io
import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from jobs import ROOT, TINY, configure, train
from omegaconf import OmegaConf

from gsprune.app import job
from gsprune.settings.hydra_files import protect, redact_files, refuse_passwords
from gsprune.settings.identity import config_hash
from gsprune.settings.recorded import hashable, hide, recorded
from gsprune.sweeps.results import read_overrides
from gsprune.text import redact
from gsprune.text.redact import RedactedStream, is_secret, redact_logs, redacted, redacted_data, redacted_message


@pytest.fixture(autouse=True)
def own_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test hides is shown in the next."""
    monkeypatch.setattr(redact, "hidden", redact._Values())
    monkeypatch.setattr(redact, "mentioned", redact._Values())
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)


# --- texts -------------------------------------------------------------------------------------------------

TEXTS = {
    "http://ann:pw@host:5000/x": "http://***@host:5000/x",
    "http://TOKEN@host": "http://***@host",
    "http://:pw@host": "http://***@host",
    "http://ann:p@ss@host.org/path@v1": "http://***@host.org/path@v1",
    "http://ann:p/w@host:80": "http://***@host:80",
    "http://ann:p@s/w@rd@host:80": "http://***@host:80",
    "http://ann:it's@host:80": "http://***@host:80",
    'x=http://ann:a"b@host y': "x=http://***@host y",
    "http://ann:two words@host:80": "http://***@host:80",
    "http://ann:12345@[::1]:80/": "http://***@[::1]:80/",
    "postgresql+psycopg2://u:p?w#x@db/m": "postgresql+psycopg2://***@db/m",
    "http://a:b@c,http://d:e@f": "http://***@c,http://***@f",
    "abfss://c:pw@a.net/x": "abfss://***@a.net/x",
    "https://h/?password=1&Passwd=2&PWD=3&TOKEN=4&secret=5&Key=6&q=7": (
        "https://h/?password=***&Passwd=***&PWD=***&TOKEN=***&secret=***&Key=***&q=7"
    ),
    "+hub.token='a, \"b\"' seed=1": "+hub.token=*** seed=1",
    "a.apiKey=x,b=2": "a.apiKey=***,b=2",
    '{"hf_token": "x", "n": 1}': '{"hf_token": "***", "n": 1}',
    "no viable alternative at '{a: 1, token: x y": "no viable alternative at '{a: 1, token: *** y",
    "{'password': 'x y'}": "{'password': '***'}",
    "token=[x, {a: y}] seed=1": "token=*** seed=1",
    "{'a': {'api_keys': ['x', 'y'], 'n': 1}}": "{'a': {'api_keys': ***, 'n': 1}}",
    "extra={creds:{pw:x},n:1}": "extra={creds:***,n:1}",
    "https://h/x?sv=1&sig=abc%3D&se=2": "https://h/x?sv=1&sig=***&se=2",
    "https://h/x?X-Amz-Signature=abc": "https://h/x?X-Amz-Signature=***",
    "a: 1\ntoken: x y\n  db.password = z\n": "a: 1\ntoken: ***\n  db.password = ***\n",
    "wrong password: abc": "wrong password: ***",
    "token=${oc.env:TOKEN,abc}": "token=***",
    "with ghp_abcdefGHIJ0123456789": "with ***",
    "a bearer abc.def": "a bearer ***",
    "Authorization: Bearer a.b.c": "Authorization: Bearer ***",
    "no access with hf_abcdefGHIJ0123456789": "no access with ***",
}
KEPT = (
    "http://host:5000/path@v1, ask ann@example.com",
    "https://cdn.example.org/a@1.2/x",
    "sqlite:////home/me@work/m.db",
    "abfss://container@account.dfs.core.windows.net/x",
    "http://ann:${oc.env:PW}@host",
    "hub.token=${oc.env:TOKEN}",
    "hub.token='${oc.env:ONE}','${oc.env:TWO}'",
    "token=null max_tokens=5 tokenizer=bert pad_token=[PAD] sort_key=name",
    "the key: a value",
    "token=${oc.env:TOKEN,null} x.token=${oc.env:ONE,${oc.env:TWO}}",
    "tokens=[a,b] forward_pass=2 dist_token=x sig=3",
    "Error: tokens = 3: a = [b]",
    "password: ${oc.env:PW}",
    "model=hf_sequence_classification",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_loses_its_passwords_and_nothing_else(text: str) -> None:
    assert redacted(text) == TEXTS[text]
    assert redacted(TEXTS[text]) == TEXTS[text]
    assert redacted(f"before {text}") == f"before {TEXTS[text]}"


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_like_a_password_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_long_text_costs_no_time() -> None:
    assert redacted("a/b+" * 250_000 + "=") == "a/b+" * 250_000 + "="
    assert redacted("http://" + "a@" * 50_000).endswith("@")


def test_hidden_values_are_replaced_as_words_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "ENV-secret")
    monkeypatch.setenv("NOTE", "a plain note")
    hide(
        OmegaConf.create({"password": "it's %5", "x": "${oc.env:MY_TOKEN}", "y": "${oc.env:NOTE}", "n": {"key": 4711}})
    )
    assert redacted("it's %5 / it%27s%20%255 / ENV-secret / 4711 / 14711") == "*** / *** / *** / *** / 14711"
    assert redacted_message("got 'a plain note'") == "got '${oc.env:NOTE}'"
    assert redacted("got 'a plain note'") == "got 'a plain note'"


def test_names_of_secrets() -> None:
    secret = "auth AUTH authorization api_key apiKeys hf_tokens creds db_pass pw bearer cookie private_key privatekey"
    assert [name for name in secret.split() if not is_secret(name)] == []
    other = "tokens keys num_tokens prompt_token dist_token sort_key forward_pass bypass author authentic code sig"
    assert [name for name in other.split() if is_secret(name)] == []


def test_a_variable_whose_name_is_a_value_of_its_own_is_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_TOKEN", "first-one")
    monkeypatch.setenv("OTHER_TOKEN", "second-one")
    hide(
        OmegaConf.create({"which": "ONE_TOKEN", "x": "${oc.env:${which}}", "y": "${oc.decode:${oc.env:'OTHER_TOKEN'}}"})
    )
    assert redacted("first-one, second-one") == "***, ***"


# --- configurations ----------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "n": 3,
    "same": "${n}",
    "inner": {"near": "${.far}", "far": "${..n}", "list": [{"a": "${inner.near}"}]},
    "env": "${oc.env:MY_TOKEN}",
    "through": "x ${env} y",
    "hub": {"token": "abc", "secrets": {"a": 1}, "pad_token": "[PAD]", "name": "bert"},
    "stolen": "${hub.token}",
    "loop": "${loop}",
    "gone": "${nowhere.x}",
    "uri": "http://ann:pw@host",
}


def test_a_configuration_is_recorded_with_its_references_followed_and_all_else_unresolved() -> None:
    assert recorded(OmegaConf.create(CONFIG)) == {
        "n": 3,
        "same": 3,
        "inner": {"near": 3, "far": 3, "list": [{"a": 3}]},
        "env": "${oc.env:MY_TOKEN}",
        "through": "x ${oc.env:MY_TOKEN} y",
        "hub": {"token": "***", "secrets": {"a": "***"}, "pad_token": "[PAD]", "name": "bert"},
        "stolen": "${hub.token}",
        "loop": "${loop}",
        "gone": "${nowhere.x}",
        "uri": "http://***@host",
    }
    assert redacted_data(["+a.token=x", "++b.api_key='y,z'", "c=1"]) == ["+a.token=***", "++b.api_key=***", "c=1"]


def test_the_hash_tells_values_of_the_environment_apart_but_no_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    def mark(*more: str) -> str:
        cfg = configure()
        for key, _, value in (text.partition("=") for text in more):
            OmegaConf.update(cfg, key, value, force_add=True)
        return config_hash(cfg)

    monkeypatch.setenv("DATA", "/data/one")
    monkeypatch.setenv("MY_TOKEN", "first")
    plain, path = mark(), mark("extra.path=${oc.env:DATA}")
    token, key = mark("extra.token=abcdef"), mark("extra.key=abcdef")
    named, referred = mark("extra.x=${oc.env:MY_TOKEN}"), mark("extra.token=abcdef", "extra.x=${extra.token}")
    assert len({plain, path, token, key, named}) == 5
    assert mark("extra.token=ghijkl") == token
    assert mark("extra.token=ghijkl", "extra.x=${extra.token}") == referred
    assert mark("extra.key=ghijkl") != key  # it may be a column of the data
    monkeypatch.setenv("DATA", "/data/two")
    monkeypatch.setenv("MY_TOKEN", "second")
    assert mark("extra.path=${oc.env:DATA}") != path
    assert mark("extra.x=${oc.env:MY_TOKEN}") == named
    found = hashable({"key": "abcdef", "n": 1}, OmegaConf.create({"key": "abcdef", "n": 1}))
    assert (len(found["key"]), found["n"]) == (128, 1)
    numbers = [hashable({"x_token": n}, OmegaConf.create({"x_token": n}))["x_token"] for n in (5, 6)]
    assert numbers[0] != numbers[1]  # of a vocabulary


@pytest.mark.parametrize(
    ("key", "value", "way"),
    [
        ("tracking.tracking_uri", "http://ann:pw@host:5000", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("tracking.tracking_uri", "https://token@host", "MLFLOW_TRACKING_PASSWORD"),
        ("tracking.tracking_uri", "postgresql://ann:pw@db/x", "MLFLOW_TRACKING_URI"),
        ("tracking.artifact_root", "s3://id:pw@bucket/x", "tracking.artifact_root='${oc.env:NAME}'"),
        ("dataset.path", "https://h/x?token=pw", "dataset.path='${oc.env:NAME}'"),
    ],
)
def test_a_password_in_an_address_is_refused_with_the_way_out(tmp_path: Path, key: str, value: str, way: str) -> None:
    cfg = configure("tracking=mlflow")
    OmegaConf.update(cfg, key, value)
    with pytest.raises(ValueError, match=r"\*\*\*") as error:
        job.run(cfg, output_dir=tmp_path)
    assert str(error.value).startswith(f"{key}={redacted(value)} is not allowed")
    assert way in str(error.value)
    assert "\n" not in str(error.value)
    assert not any("pw" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for allowed in ("postgresql://ann@db/x", "abfss://c@a.net/x", "${oc.env:URI}", "http://${oc.env:USER}@host"):
        OmegaConf.update(cfg, key, allowed)
        refuse_passwords(cfg)


# --- what Hydra writes -------------------------------------------------------------------------------------


def with_hydra(*overrides: str, multirun: bool = False) -> Any:
    mode = ["hydra.mode=MULTIRUN"] if multirun else []
    swept = [text for text in overrides if "," in text and multirun]  # which are the sweeper's
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        given = [*mode, *(text for text in overrides if text not in swept)]
        cfg = compose("config", overrides=given, return_hydra_config=True)
    cfg.hydra.overrides.task += swept
    return cfg


REFUSED = {
    ("+hub.token=a,b",): "hub.token is a secret, and swept values",
    ("+hub.token=abcdef", "hydra.launcher._target_=x.SlurmLauncher"): "SlurmLauncher would write",
    ("+hub.token=abcdef", "hydra.sweep.subdir=${hydra.job.override_dirname}"): "hydra.sweep.subdir would hold",
    ("tracking.tracking_uri=htp://foo",): "did you mean http://foo",
    ("tracking.tracking_uri=http://ann:abcdef@host",): "MLFLOW_TRACKING_USERNAME",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_a_sweep_that_would_spread_a_secret_is_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=REFUSED[overrides].replace(".", r"\.")) as error:
        protect(with_hydra(*overrides, multirun=True))
    assert "abcdef" not in str(error.value)


def test_a_sweep_of_secrets_out_of_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "x")
    protect(with_hydra("+hub.token='${oc.env:ONE}','${oc.env:ONE}'", "seed=0,1", multirun=True))
    protect(with_hydra("+hub.token=abcdef", "seed=0,1", multirun=True))
    monkeypatch.setenv("MY_TOKEN", "abcdefgh")
    for key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
        with pytest.raises(ValueError, match=f"{key}=.* would hold the value of MY_TOKEN") as error:
            protect(with_hydra(f"{key}=out/${{oc.env:MY_TOKEN}}"))
        assert "abcdefgh" not in str(error.value)
    with pytest.raises(ValueError, match=r"hydra\.run\.dir would hold the value of \+hub\.token"):
        protect(with_hydra("+hub.token=abcdef", "hydra.run.dir=out/${hub.token}"))


def test_what_hydra_has_written_is_cleaned_and_nothing_else_is_touched(tmp_path: Path) -> None:
    cfg = with_hydra("+hub.token=CANARY", "+hub.more={secret: 'its CANARY', name: x}", "seed=3")
    cfg.hydra.runtime.output_dir = str(tmp_path)
    (tmp_path / ".hydra").mkdir()
    task = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    for name, node in (
        ("config", task),
        ("hydra", OmegaConf.create({"hydra": cfg.hydra})),
        ("overrides", cfg.hydra.overrides.task),
    ):
        OmegaConf.save(node, tmp_path / ".hydra" / f"{name}.yaml")
    before = OmegaConf.to_container(OmegaConf.load(tmp_path / ".hydra" / "config.yaml"))
    redact_files(cfg)
    after = OmegaConf.to_container(OmegaConf.load(tmp_path / ".hydra" / "config.yaml"))
    assert isinstance(before, dict)
    assert after == {**before, "hub": {"token": "***", "more": {"secret": "***", "name": "x"}}}
    assert OmegaConf.load(tmp_path / ".hydra" / "overrides.yaml")[2] == "seed=3"
    assert not any("CANARY" in path.read_text() for path in (tmp_path / ".hydra").iterdir())


# --- logs, terminals, results of others --------------------------------------------------------------------


def test_log_records_and_their_tracebacks_are_cleaned(caplog: pytest.LogCaptureFixture) -> None:
    redact_logs()
    log = logging.getLogger("test_redact")
    log.warning("to %s", "http://ann:pw@host")
    try:
        raise RuntimeError("http://ann:pw@host")
    except RuntimeError:
        log.exception("it failed")
    try:
        raise RuntimeError("a \x1b[2J\x1b]0;name\x07 b")
    except RuntimeError as error:
        log.warning("and", exc_info=error)
    assert "RuntimeError: a \\x1b[2J\\x1b]0;name\\x07 b" in caplog.text
    assert "\x1b" not in caplog.text
    caplog.records.pop()
    log.warning("%d of %s", 3, "x")
    assert [record.getMessage() for record in caplog.records] == ["to http://***@host", "it failed", "3 of x"]
    assert caplog.records[2].args == (3, "x")
    assert "pw" not in caplog.text
    assert "RuntimeError: http://***@host" in caplog.text


def test_a_terminal_gets_it_cleaned_and_is_the_same_otherwise() -> None:
    stream = io.StringIO()
    print("token=abc", "http://ann:pw@host", file=RedactedStream(stream))  # type: ignore[arg-type]
    assert stream.getvalue() == "token=*** http://***@host\n"
    assert RedactedStream(stream).isatty() is False
    RedactedStream(stream).write("\x1b[1mbold\x1b[0m\r\x1b[K \x1b[2J \x1b]0;name\x07 \u202e\n")  # type: ignore[arg-type]
    assert stream.getvalue().splitlines()[-1] == "\x1b[K \\x1b[2J \\x1b]0;name\\x07 \\u202e"


def test_overrides_of_results_that_others_wrote_are_cleaned() -> None:
    assert read_overrides(["+a.token=x", "b=http://ann:pw@h"]) == {"a.token": "***", "b": "http://***@h"}


# --- a run and a sweep -------------------------------------------------------------------------------------

CANARIES = {"MY_TOKEN": "CANARY-environment", "A_NOTE": "CANARY-mentioned"}
PLANTED = (
    "+extra.token=${oc.env:MY_TOKEN}",
    "+extra.note=${oc.env:A_NOTE}",
    "+extra.password=CANARY-override",
    "+extra.more={api_key: 'CANARY, quoted', name: x}",
    "+hydra.job.env_set.HF_TOKEN=CANARY-set",
)
QUICK = [
    *(text for text in TINY if not text.startswith("tracking")),
    "trainer.prune_epochs=1",
    "trainer.latency_repeats=0",
]


def found_in(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and b"CANARY" in path.read_bytes()]


@pytest.mark.slow
def test_nothing_of_a_secret_is_left_by_a_run_and_by_a_sweep(tmp_path: Path) -> None:
    done = train(tmp_path, "hydra.run.dir=run", *PLANTED, *QUICK, **CANARIES)
    assert done.returncode == 0, done.stderr
    sweep = ("--multirun", "hydra.sweep.dir=sweep", "trainer.precision=fp32,fp8", "sweep.check=false")
    both = train(tmp_path, *sweep, *PLANTED, *QUICK, **CANARIES)
    assert both.returncode == 1
    assert "trainer.precision=fp8" in both.stderr
    assert "CANARY" not in done.stdout + done.stderr + both.stdout + both.stderr
    assert found_in(tmp_path) == []
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert OmegaConf.create(config)._get_node("extra")._get_node("token")._value() == "${oc.env:MY_TOKEN}"  # type: ignore[union-attr]
    assert "+extra.password=***" in json.loads((tmp_path / "run" / "result.json").read_text())["overrides"]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        params = dict(database.execute("select key, value from params where key like 'extra.%'").fetchall())
    assert params["extra.note"] == "${oc.env:A_NOTE}"
    assert (params["extra.password"], params["extra.more.name"]) == ("***", "x")
    for name in ("report.html", "summary.csv", "sweep.json", "multirun.yaml", "0/.hydra/hydra.yaml"):
        assert (tmp_path / "sweep" / name).is_file()


MISTAKES = (
    "model.weights=${oc.env:A_NOTE}",
    "model._target_=os.${oc.env:MY_TOKEN}",
    "model.width=${extra.password}",
    "+model.more={token: CANARY-unclosed",
)


@pytest.mark.slow
@pytest.mark.parametrize("full", ["0", "1"])
@pytest.mark.parametrize(
    "mistake",
    ["model.weights=${oc.env:A_NOTE}", "model._target_=os.${oc.env:MY_TOKEN}", "model.width=${extra.password}"],
)
def test_an_error_says_no_secret(tmp_path: Path, mistake: str, full: str) -> None:
    done = train(tmp_path, "hydra.run.dir=run", *PLANTED, *QUICK, mistake, HYDRA_FULL_ERROR=full, **CANARIES)
    assert done.returncode == 1
    assert "CANARY" not in done.stdout + done.stderr
    assert found_in(tmp_path) == []


@pytest.mark.slow
def test_a_password_in_the_address_ends_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    address = 'tracking.tracking_uri="http://ann:CANARY@127.0.0.1:9"'
    for where in (("hydra.run.dir=run",), ("--multirun", "hydra.sweep.dir=sweep", "seed=0,1")):
        done = train(tmp_path, *where, address, *QUICK)
        assert done.returncode == 1
        (sentence,) = done.stderr.splitlines()
        assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in sentence
        assert "CANARY" not in done.stdout + done.stderr
    assert found_in(tmp_path) == []
    where = "http://ann:CANARY@127.0.0.1:9"  # the environment may have it
    done = train(tmp_path, "hydra.run.dir=run", *QUICK, MLFLOW_TRACKING_URI=where)
    assert done.returncode == 0
    assert "http://***@127.0.0.1:9" in done.stdout
    assert "CANARY" not in done.stdout + done.stderr
    assert found_in(tmp_path) == []
