"""The screen output of a run: progress while it trains, and a summary at its end.

A bar when stdout is a terminal, one plain line an epoch otherwise; the log file has the lines in both cases.
"""

from __future__ import annotations

import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from gsprune.latency import NOT_HERE
from gsprune.text.display import one_line, percent
from gsprune.text.names import lines_by_reason
from gsprune.text.table import WIDTH, clock, labelled, size, table, terminal_width, until
from gsprune.tracking.views import Page, ui_command

if TYPE_CHECKING:
    from gsprune.training.trainer import Totals

log = logging.getLogger(__name__)
READ_EVERY = 0.5  # seconds between two reads of the running loss: each is a sync point
SOON = 10.0  # seconds of a phase after which its end can be foretold


class Progress:
    """Shows nothing (`trainer.progress=none`); the base of the displays.

    A job calls `begin` once, `phase` at the start of each phase, `on_step` and `on_epoch` while it trains, `close` at
    the end.
    """

    def __init__(self, epochs: int) -> None:
        """Of a job of that many epochs, over its phases."""
        self._pace = Pace(epochs)

    def begin(self, facts: Sequence[tuple[str, str]]) -> None:
        """What is known before the first epoch, as pairs of a name and a text; the log file has it, too."""
        for name, text in facts:
            to_log_file(logging.INFO, f"{name}: {text}")

    def phase(
        self, name: str, *, epochs: int, steps_per_epoch: int, done: int = 0, before: int = 0, of: str | None = None
    ) -> None:
        """A phase of that many epochs starts, after `done` steps of it and `before` epochs of other phases.

        Args:
            of: what its sparsity counts.
        """
        self._name, self._of = name, of
        self._pace.start(steps_per_epoch, done, before)

    def part(self, what: str, share: float) -> None:
        """So much of something that is no training is done, from 0 to 1; "" when all is."""

    def on_step(self, totals: Totals) -> None:
        """After an optimizer step. `totals` are those of the epoch; reading them waits for the device."""
        self._pace.step()

    def on_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """After so many epochs, over both phases; `values` are the metrics of the last one."""
        self._pace.epoch(epoch)
        left = self._pace.left()
        told = f"  {clock(left)} left" if left else ""
        self._write(f"{self._name:<7}  {epoch_line(epoch, self._pace.epochs, values, of=self._of)}{told}")

    def close(self) -> None:
        """At the end of the job, also after an error."""

    def _write(self, line: str) -> None:
        """The line of an epoch."""
        to_log_file(logging.INFO, line)


class Pace:
    """How long the epochs that are left will take: as long as those of the phase so far, on average.

    >>> now = [0.0]
    >>> pace = Pace(3, now=lambda: now[0])
    >>> pace.start(10); now[0] = 5.0
    >>> for _ in range(10): pace.step()
    >>> pace.left(); pace.epoch(1); pace.left()
    10.0
    10.0
    """

    def __init__(self, epochs: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self.epochs, self._now = epochs, now
        self._since, self._ended, self._steps, self._of, self._begun = now(), 0, 0, 1, 0

    def start(self, steps_per_epoch: int, done: int = 0, before: int = 0) -> None:
        """A phase starts, after `done` steps of it and `before` epochs of other phases."""
        self._since, self._steps, self._of = self._now(), 0, max(steps_per_epoch, 1)
        self._ended, self._begun = before + done // self._of, done % self._of

    def step(self) -> None:
        self._steps += 1

    def epoch(self, ended: int) -> None:
        """So many epochs of the job have ended."""
        self._ended = ended
        self._begun = -self._steps

    @property
    def current(self) -> int:
        """The epoch that runs, from 1."""
        return min(self._ended + 1, self.epochs)

    def left(self) -> float | None:
        """Seconds that are left; None before the first step."""
        if not self._steps:
            return None
        to_do = (self.epochs - self._ended) * self._of - self._begun - self._steps
        return max(to_do, 0) * (self._now() - self._since) / self._steps


class Lines(Progress):
    """One plain line an epoch, for logs and pipes."""

    def __init__(self, epochs: int) -> None:
        super().__init__(epochs)
        self._part, self._since = "", 0.0
        self._expected = time.monotonic() + SOON

    def begin(self, facts: Sequence[tuple[str, str]]) -> None:
        super().begin(facts)
        print("\n".join(labelled(facts, width=max(terminal_width(), WIDTH))), flush=True)

    def phase(
        self, name: str, *, epochs: int, steps_per_epoch: int, done: int = 0, before: int = 0, of: str | None = None
    ) -> None:
        super().phase(name, epochs=epochs, steps_per_epoch=steps_per_epoch, done=done, before=before, of=of)
        self._expected = time.monotonic() + SOON

    def part(self, what: str, share: float) -> None:
        if what != self._part:
            if self._part:
                print(f"cut      {self._part:<24}{time.monotonic() - self._since:6.1f} s", flush=True)
            self._part, self._since = what, time.monotonic()

    def on_step(self, totals: Totals) -> None:
        super().on_step(totals)
        if time.monotonic() > self._expected:  # once, before an epoch of a phase has ended
            self._expected = math.inf
            print(until(self._pace.left() or 0.0), flush=True)

    def on_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        super().on_epoch(epoch, values)
        self._expected = math.inf

    def _write(self, line: str) -> None:
        super()._write(line)
        print(line, flush=True)


class Bar(Progress):
    """A bar for each phase, with its epoch, loss, accuracy, sparsity, and how long the whole job still takes."""

    def __init__(self, epochs: int) -> None:
        super().__init__(epochs)
        self._console = Console(file=sys.stdout, highlight=False, markup=False)
        wide = self._console.width >= WIDTH
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            *((BarColumn(bar_width=8),) if wide else ()),
            TextColumn("{task.percentage:>3.0f}%"),
            *((TextColumn("{task.fields[values]}"),) if self._console.width >= 64 else ()),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._parts: dict[str, TaskID] = {}
        self._read_at, self._sparsity = 0.0, 0.0

    def begin(self, facts: Sequence[tuple[str, str]]) -> None:
        super().begin(facts)
        print("\n".join(labelled(facts, width=self._console.width)), flush=True)

    def phase(
        self, name: str, *, epochs: int, steps_per_epoch: int, done: int = 0, before: int = 0, of: str | None = None
    ) -> None:
        super().phase(name, epochs=epochs, steps_per_epoch=steps_per_epoch, done=done, before=before, of=of)
        if epochs == 0:
            return
        self._rich.start()
        self._task = self._rich.add_task(name, total=epochs * steps_per_epoch, completed=done, values="", left="")

    def part(self, what: str, share: float) -> None:
        for name, task in self._parts.items():
            self._rich.update(task, completed=share if name == what else 1.0)
        if not what:
            self._rich.stop()
        elif what not in self._parts:
            self._rich.start()
            self._parts[what] = self._rich.add_task("cut", total=1.0, values=what, left="")

    def on_step(self, totals: Totals) -> None:
        super().on_step(totals)
        assert self._task is not None
        self._rich.advance(self._task)
        if time.monotonic() - self._read_at > READ_EVERY:
            running = {f"train/{name}": value for name, value in totals.read().items()}  # sync point, rarely
            self._show({**running, "sparsity": self._sparsity})
            self._read_at = time.monotonic()

    def on_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        super().on_epoch(epoch, values)
        self._sparsity = values.get("sparsity", 0.0)
        self._show(values)

    def close(self) -> None:
        self._rich.stop()

    def _show(self, values: Mapping[str, float]) -> None:
        assert self._task is not None
        shown = {name: values[name] for name in ("train/loss", "train/accuracy", "sparsity")}  # fits 80 columns
        at = f"{self._name} {self._pace.current}/{self._pace.epochs}"
        left = self._pace.left()
        told = clock(left).removesuffix(" min") if left else ""
        self._rich.update(self._task, description=at, values=describe(shown), left=told)


def make_progress(mode: str, *, epochs: int) -> Progress:
    """The display for `trainer.progress` (auto, bar, lines, none) of a job of `epochs` epochs."""
    if mode == "auto":
        mode = "bar" if sys.stdout.isatty() else "lines"
    displays: Mapping[str, type[Progress]] = {"bar": Bar, "lines": Lines, "none": Progress}
    return displays[mode](epochs)


def epoch_line(epoch: int, epochs: int, values: Mapping[str, float], *, of: str | None = None) -> str:
    """
    >>> epoch_line(3, 14, {"train/loss": 0.25})
    'epoch   3/14  loss 0.2500'
    """
    return f"epoch {epoch:>3}/{epochs}  {describe(values, of=of)}"


def describe(values: Mapping[str, float], *, of: str | None = None) -> str:
    """The metrics of an epoch that fit on a line, in a fixed order.

    >>> describe({"train/loss": 0.25, "train/accuracy": 0.9, "val/accuracy": 0.875, "sparsity": 0.5})
    'loss 0.2500  accuracy  90.00 %  val  87.50 %  sparsity 50.0 %'
    >>> describe({"train/loss": 8.8e33, "sparsity": 0.5}, of="channels")
    'loss 8.8e+33  sparsity 50.0 % of channels'
    """
    told = f" of {of}" if of else ""
    forms: Mapping[str, Callable[[float], str]] = {
        "train/loss": lambda loss: f"loss {loss:.4f}" if loss < 1e6 else f"loss {loss:.4g}",
        "train/accuracy": lambda share: f"accuracy {100 * share:6.2f} %",
        "val/accuracy": lambda share: f"val {100 * share:6.2f} %",
        "sparsity": lambda share: f"sparsity {percent(share):>6}{told}",
        "epoch_seconds": lambda seconds: f"{seconds:.1f} s",
    }
    return "  ".join(form(values[name]) for name, form in forms.items() if name in values)


def warn_on_one_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """`warnings.showwarning` without the place in the library where the warning was raised."""
    print(one_line(f"{category.__name__}: {message}", 4000), file=sys.stderr)
    to_log_file(logging.WARNING, one_line(str(message), 4000))


def to_log_file(level: int, text: str) -> None:
    """Log a line to the log files alone: the screen shows it in another form."""
    record = log.makeRecord(log.name, level, __file__, 0, text, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def print_summary(
    result: Mapping[str, Any],
    output_dir: Path,
    *,
    tracking_uri: str | None,
    unsent: bool = False,
    page: Page | None = None,
) -> None:
    """Print dense and pruned side by side, where the files are, and how to open them in MLflow; the log file has it."""
    say("\n".join(["", *summary_table(result), ""]))
    if result.get("cut") is not None:
        say(cut_line(result["cut"]))
    if (line := unfair_line(result)) is not None:
        say(line)
    if (result["latency_note"] or "").startswith(NOT_HERE):
        say(one_line(f"Latency: {result['latency_note']}"))
    for label, texts in (("Left whole", "skipped"), ("Next to nothing is left", "collapsed")):
        for line in lines_by_reason(result.get(texts) or {}):
            say(one_line(f"{label}: {line}"))
    if (line := chance_line(result)) is not None:
        say(line)
    if not result["shrunk"] and result["sparsity"] > 0:
        say("Masked weights are zeros in tensors of the old size: pruner=abs or weighted makes the model smaller.")
    say(f"Outputs: {output_dir}")  # never folded: paths and commands get copied
    if tracking_uri is not None:
        if unsent:
            say(f"Unsent:  gsprune sync {shlex.quote(str(output_dir))}")
        for line in mlflow_lines(tracking_uri, page):
            say(line)


def mlflow_lines(tracking_uri: str, page: Page | None) -> list[str]:
    """How to open a page of MLflow: the command that serves it, if it takes one, and its address.

    >>> from gsprune.tracking.views import Page
    >>> mlflow_lines("http://host:5000", Page("http://host:5000/#/experiments/1/runs/ab12"))
    ['MLflow:  http://host:5000/#/experiments/1/runs/ab12']
    >>> mlflow_lines("sqlite:///mlflow.db", Page("http://127.0.0.1:5000/#/experiments/1/runs/ab12", "mlflow ui ..."))
    ['MLflow:  mlflow ui ...', '         then http://127.0.0.1:5000/#/experiments/1/runs/ab12']
    """
    if page is None or not page.address:
        return [f"MLflow:  {ui_command(tracking_uri)}"]
    if not page.command:
        return [f"MLflow:  {page.address}"]
    return [f"MLflow:  {page.command}", f"         then {page.address}"]


def say(text: str) -> None:
    """Print a text, and put it into the log files."""
    print(text, flush=True)
    to_log_file(logging.INFO, text)


def summary_table(result: Mapping[str, Any]) -> list[str]:
    """Lines of (what, dense, pruned, ratio) from `result.json`, without what was not measured."""
    now = "control" if _is_control(result) else "pruned"
    rows = [("epochs trained", str(result["baseline_epochs"]), str(result["epochs"]), "")]
    for label, key in (("validation accuracy", "val_accuracy"), ("test accuracy", "accuracy")):
        dense, pruned = result[f"baseline_{key}"], result[key]
        rows.append((label, _accuracy(dense), _accuracy(pruned), f"{100 * (pruned - dense):+.2f} points"))
    if result["sparsity_of"]:  # a control prunes nothing
        rows.append((f"sparsity of {result['sparsity_of']}", percent(0), percent(result["sparsity"]), ""))
        if coverage := result.get("coverage"):
            rows.append(("weights it may prune", "", percent(coverage), ""))
    return table(("", "dense", now, f"dense / {now}"), [*rows, *_cost_rows(result)], width=terminal_width())


def chance_line(result: Mapping[str, Any]) -> str | None:
    """A line where the network is no better than guessing; None where it is.

    >>> chance_line({"at_chance": {"accuracy": 0.125, "classes": 10, "dense": False}})
    'The validation accuracy of 12.50 % is no better than guessing among 10 classes: too much was pruned.'
    """
    found = result.get("at_chance")
    if not found:
        return None
    why = "and so was that of the dense network" if found["dense"] else "too much was pruned"
    text = f"The validation accuracy of {_accuracy(found['accuracy'])} is no better than guessing among"
    return f"{text} {found['classes']} classes{', ' if found['dense'] else ': '}{why}."


def cut_line(cut: Mapping[str, Any]) -> str:
    """What was done to the network, in a line.

    >>> found = {"criterion": "Fisher", "calibration": 512, "repaired": {"fc": [0.2, 0.1]}, "seconds": 3.21}
    >>> cut_line({**found, "not_repaired": {}})
    'Cut by Fisher on 512 training samples in 3.2 s; 1 layer repaired.'
    """
    count = len(cut["repaired"])
    left = f", {len(cut['not_repaired'])} left as they were" if cut["not_repaired"] else ""
    done = f"{count} layer{'s' * (count != 1)} repaired{left}"
    text = f"Cut by {cut['criterion']} on {cut['calibration']} training samples in {cut['seconds']:.1f} s; {done}."
    sure = cut.get("how_much")
    if sure is None or sure["bound"] is None:
        return text
    return (
        f"{text} It loses at most {sure['bound']:.2f} points, with {100 * sure['confidence']:g} % confidence "
        f"({sure['samples']} validation samples)."
    )


def unfair_line(result: Mapping[str, Any]) -> str | None:
    """A line where the dense network has trained for fewer epochs than the pruned one; None where it has not.

    >>> unfair_line({"baseline_epochs": 6, "epochs": 14, "choices": {"pruner": "abs"}})
    'This run has trained the dense network for 6 epochs and the pruned one for 14: the fair control is pruner=none.'
    """
    dense, pruned = result["baseline_epochs"], result["epochs"]
    if _is_control(result) or dense >= pruned:
        return None
    epochs = "epoch" if dense == 1 else "epochs"
    text = f"This run has trained the dense network for {dense} {epochs} and the pruned one for {pruned}"
    if result.get("mode") == "cut":
        return f"{text}: the fair control is mode=train pruner=none, with the same epochs."
    return f"{text}: the fair control is pruner=none."


def _is_control(result: Mapping[str, Any]) -> bool:
    return (result.get("choices") or {}).get("pruner") == "none"


def _accuracy(share: float) -> str:
    return f"{100 * share:.2f} %"


def _where(result: Mapping[str, Any]) -> str:
    runtime = result.get("latency_in") or "eager"
    return "" if runtime == "eager" else f", {runtime}"


def _cost_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    parts: list[tuple[str, str, str, Callable[[float], str]]] = [
        ("parameters", "params", "params_dense", "{:,}".format),
        ("  not zero", "params_nonzero", "params_dense", "{:,}".format),
        ("MACs", "macs", "macs_dense", "{:,}".format),
        (f"latency (ms{_where(result)})", "latency_ms", "latency_dense_ms", "{:.2f}".format),
        ("file size", "file_bytes", "file_bytes_dense", size),
    ]
    rows = []
    for label, key, dense_key, form in parts:
        if key == "latency_ms" and (note := result["latency_note"]) is not None:
            rows.append((label, "", "", note.partition(":")[0]))
        now, dense = result[key], result[dense_key]
        if now is not None and dense is not None:
            ratio = f"{dense / now:.2f}x" if now else ""
            if key == "latency_ms":
                ratio += f" ({result['speedup_low']:.2f} to {result['speedup_high']:.2f})"
            rows.append((label, form(dense), form(now), ratio))
    return rows
