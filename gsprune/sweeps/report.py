"""The report of a sweep: `report.html`, `summary.csv` and `pareto.png` in its directory.

    gsprune report multirun/<date>/<time>

works at any time, also while the sweep runs: it reads what the jobs have left so far (results.py), groups it into
variants (variants.py), draws (sweep_figures.py), and writes. The page is one file that loads nothing else.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeGuard

from gsprune.extras import need
from gsprune.files.disk import write_atomic
from gsprune.files.layout import RESULT
from gsprune.plots.sweep_figures import STYLES, Line, Mark, Panel, draw_heatmap, draw_panels
from gsprune.sweeps.results import JobResult, Results, read_results
from gsprune.sweeps.variants import (
    TEST,
    VALIDATION,
    Point,
    Stat,
    chosen_by,
    clear_front,
    control_levels,
    dense_levels,
    equal_merged,
    is_control,
    once_each,
    pareto_front,
    points,
    stat,
    swept,
    unpruned,
    variants,
)
from gsprune.text.display import cell, percent
from gsprune.text.names import natural
from gsprune.text.redact import say, shown_text, without_passwords

__all__ = ["Report", "build_report", "main"]

FILES = ("report.html", "summary.csv", "pareto.png")
PARTS = {
    "start": "start: data, model, rehearsal",
    "train": "training, dense and pruned",
    "measure": "measuring: test split, MACs, latency",
    "files": "files and figures",
    "tracking": "tracking",
}
UNFINISHED = ("running", "interrupted")
_MAX_BEST = 8  # rows of each table at the top of the page
_MAX_GROUPS = 12  # wanted sparsities with a heading of their own in the table; more go by tens
_MAX_RUNS, _MAX_LAYERS, _MAX_HEATMAPS = 20, 60, 4
_MAX_MASK_BYTES = 200_000_000  # at 1 bit a weight; eight times as much in memory
_MAX_PRINTED = 20
_MAX_COLUMNS = 200  # of one kind in summary.csv
_MAX_AXES = 30  # named in the head of the page


@dataclass
class Report:
    """What was written, and from what."""

    directory: Path
    results: Results
    usable: int  # finished jobs with an accuracy, each configuration once
    left_out: Mapping[str, str]  # folder -> why
    notes: Sequence[str] = ()  # what keeps its numbers from being compared as they stand
    paths: list[Path] = field(default_factory=list)


def build_report(directory: str | Path) -> Report:
    """Write report.html, summary.csv and pareto.png into the sweep directory, each whole or not at all.

    Raises:
        ValueError: the directory does not exist, or holds no job whose result can be read.
    """
    sweep = _Sweep.read(Path(directory))
    report = Report(sweep.directory, sweep.results, len(sweep.usable), sweep.left_out, sweep.notes())
    picture = draw_panels(sweep.panels())
    contents = (sweep.page(picture).encode("utf-8", "replace"), sweep.table().encode("utf-8", "replace"), picture)
    for name, content in zip(FILES, contents, strict=True):
        write_atomic(sweep.directory / name, content)
        report.paths.append(sweep.directory / name)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `gsprune report`: 0 when there was a finished job to report, else 1."""
    parser = argparse.ArgumentParser(
        prog="gsprune report",
        description="Write report.html, summary.csv and pareto.png of a Hydra sweep, also while it still runs.",
    )
    parser.add_argument("directory", help="the directory of the sweep, such as multirun/2026-01-31/12-00-00")
    try:
        report = build_report(parser.parse_args(arguments).directory)
    except (ValueError, OSError) as error:
        say(f"Error: {error}", file=sys.stderr)
        return 1
    for path in report.paths:
        say(f"Wrote {path}")
    for note in report.notes:
        say(f"Note: {note}")
    for index, (folder, reason) in enumerate(report.left_out.items()):
        if index == _MAX_PRINTED:
            say(f"Skipped {len(report.left_out) - index} more, see the page")
            break
        say(f"Skipped {folder}: {reason}")
    if not report.usable:
        say(f"Error: no job in {report.directory} has finished with an accuracy", file=sys.stderr)
        return 1
    return 0


# --- the sweep ---------------------------------------------------------------------------------------------


@dataclass
class _Sweep:
    """All that the three files are made from."""

    directory: Path
    results: Results
    record: Mapping[str, Any]  # sweep.json, of any content
    jobs: list[JobResult]  # each configuration once
    left_out: dict[str, str]
    axes: dict[str, list[str]]
    variants: dict[str, str]
    points: list[Point]
    fronts: dict[str, set[tuple[str, float | None]]] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> _Sweep:
        results = read_results(directory)
        if not results.jobs:
            some = "".join(f"; {name}: {reason}" for name, reason in list(results.skipped.items())[:3])
            raise ValueError(f"{directory} holds no job with a {RESULT} that can be read{some}")
        jobs, equal = once_each(results.jobs)
        axes = swept(jobs)
        names = variants(jobs, axes)
        found = equal_merged(points([job for job in jobs if _usable(job)], names))
        left_out = {**results.skipped, **equal}
        left_out = {name: left_out[name] for name in sorted(left_out, key=natural)}
        sweep = cls(directory, results, _read_record(directory), jobs, left_out, axes, names, found)
        sweep.fronts = _fronts(found)
        return sweep

    @property
    def usable(self) -> list[JobResult]:
        return [job for job in self.jobs if _usable(job)]

    def panels(self) -> list[Panel]:
        """One for each measure by which some network is smaller; the first in any case."""
        dense, control = (
            {
                f"{level.label}: {100 * level.accuracy:.2f} %": 100 * level.accuracy
                for level in find(self.usable, self.axes)
            }
            for find in (dense_levels, control_levels)
        )
        styles = _styles(self.points, self.fronts["parameters"])
        up = "validation accuracy (%)" if self.by == VALIDATION else "test accuracy (%)"
        panels: list[Panel] = []
        for name, (title, across) in TITLES.items():
            lines = _lines(self.points, MEASURES[name], self.fronts[name], styles, INTERVALS.get(name))
            if not panels or any(mark.x < 99.95 for line in lines for mark in line.marks):
                panels.append(Panel(title, across, lines, dense, self._empty, up, control))
        return panels

    @property
    def by(self) -> str:
        """The number that choices are made by."""
        return chosen_by(self.usable)

    @property
    def _empty(self) -> str:
        return "no finished job says how many parameters are left" if self.points else "no pruned network yet"

    # --- what has to be said beside the numbers ---

    def notes(self) -> list[str]:
        found = [self._choice_note(), self._control_note()]
        return [shown_text(note, 1000) for note in found if note]

    def _choice_note(self) -> str:
        without = [job for job in self.usable if job.number(VALIDATION) is None]
        if not without:
            return ""
        some = f"{len(without)} of {len(self.usable)} finished jobs (such as {without[0].name})"
        return (
            f"choices are made on test accuracy here, so that of the chosen is too good: {some} have no {VALIDATION} "
            f"in their {RESULT}"
        )

    def _control_note(self) -> str:
        """What differences are to, where that is no fair control of each."""
        compared = [point for point in self.points if point.delta is not None]
        if any(is_control(job) for job in self.usable):
            lone = len(self.points) - len(compared)
            told = f"{lone} of {len(self.points)} rows have no control (pruner=none) of the same seed and settings"
            return f"{told}: they show no difference" if lone else ""
        if not compared or not self._trained_less:
            return ""
        pruners = list(dict.fromkeys(point.pruner for point in self.points if point.pruner != "all jobs"))
        override = f"pruner={','.join([*self.axes.get('pruner', pruners), 'none'])}"
        return (
            f"the dense network {self._epochs_told}, so differences to it are not what pruning costs: "
            f"{override} adds the control that has trained as long"
        )

    @property
    def _trained_less(self) -> bool:
        """Also where a job does not tell."""
        pairs = [(job.number("baseline_epochs"), job.number("epochs")) for job in self.usable]
        return any(dense is None or whole is None or dense < whole for dense, whole in pairs)

    @property
    def _epochs_told(self) -> str:
        pairs = {(job.number("baseline_epochs"), job.number("epochs")) for job in self.usable}
        if any(None in pair for pair in pairs):
            return "may have trained less"
        ((dense, whole), *more) = pairs
        return "has trained less" if more else f"has trained less ({dense:g} epochs) than the pruned one ({whole:g})"

    # --- summary.csv ---

    def table(self) -> str:
        """One row a job: folder, status, variant, overrides, every number of its result, error (RFC 4180)."""
        names = dict.fromkeys(name for job in self.results.jobs for name in _numbers(job.result))
        numbers = list(names)[:_MAX_COLUMNS]
        axes = [axis for axis in self.axes if axis not in numbers][:_MAX_COLUMNS]
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        texts = ("latency_note", "config_hash", "mlflow_run_id", "error")
        head = ["folder", "status", "variant", *axes, *numbers, *texts]
        writer.writerow([_cell(name) for name in head])
        for job in self.results.jobs:
            found = _numbers(job.result)
            row: list[object] = [job.name, job.status, self.variants.get(job.name, "")]
            row += [job.overrides.get(axis, "") for axis in axes]
            row += [found.get(name, job.overrides.get(name, "") if name in self.axes else "") for name in numbers]
            row += [job.text(name) or "" for name in texts]
            writer.writerow([_cell(value) for value in row])
        return buffer.getvalue()

    # --- report.html ---

    def page(self, picture: bytes) -> str:
        jinja2 = need("jinja2")
        loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
        environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        return environment.get_template("report.html").render(
            title=shown_text("/".join(self.directory.resolve().parts[-2:]), 200),
            made=_now(),
            facts=self._facts(),
            counts=self._counts(),
            best=self._best(),
            picture=_data_uri(picture),
            panels=[panel.title for panel in self.panels()],
            notes=self.notes(),
            by_test=self.by == TEST,
            fair=any(is_control(job) for job in self.usable),
            whole=self._whole(),
            groups=_groups(self.points, self.fronts),
            few=any(point.accuracy.count < 3 for point in self.points),
            failed=[_row(job, _error(job)) for job in self.jobs if _error(job) is not None],
            unfinished=[_row(job, "") for job in self.jobs if job.status in UNFINISHED],
            left_out=[(shown_text(name, 200), shown_text(reason, 400)) for name, reason in self.left_out.items()],
            heatmaps=_heatmaps(self.points, set().union(*self.fronts.values())),
            times=_times(self.usable),
            dense=_dense_cache(self.usable),
        )

    def _facts(self) -> list[tuple[str, str]]:
        found = [("directory", shown_text(str(self.directory.resolve()), 400))]
        found += [("command", self._told("command")), ("status", self._told("status"))]
        found += [("started", _when(self.record.get("started"))), ("ended", _when(self.record.get("ended")))]
        common = {
            k: v for k, v in self.jobs[0].overrides.items() if all(job.overrides.get(k) == v for job in self.jobs)
        }
        found.append(("set in every job", shown_text(" ".join(f"{key}={value}" for key, value in common.items()), 400)))
        return [(label, text) for label, text in found if text] + self._axes()

    def _told(self, key: str) -> str:
        value = self.record.get(key)
        return shown_text(value, 2000) if isinstance(value, str) else ""

    def _axes(self) -> list[tuple[str, str]]:
        told = self.record.get("axes")
        listed = {k: v for k, v in told.items() if isinstance(v, list)} if isinstance(told, dict) else {}
        axes = {**self.axes, **listed}
        several = [
            (f"swept: {shown_text(key, 80)}", _values(values)) for key, values in axes.items() if len(values) > 1
        ]
        return several[:_MAX_AXES]

    def _counts(self) -> list[tuple[int, str, str]]:
        failed = sum(_error(job) is not None for job in self.jobs)
        running = sum(job.status in UNFINISHED for job in self.jobs)
        return [
            (len(self.usable), "finished", "table"),
            (failed, "failed", "failed"),
            (running, "unfinished (running or killed)", "unfinished"),
            (len(self.left_out), "left out, with reasons", "skipped"),
        ]

    def _best(self) -> list[dict[str, Any]]:
        """The front of each measure, from what leaves most to what leaves least: which one to take at which size."""
        tables = []
        for name, what in BEST.items():
            measure = MEASURES[name]
            front = [
                (left, p) for p in self.points if _key(p) in self.fronts[name] and (left := measure(p)) is not None
            ]
            front.sort(key=lambda pair: -pair[0])
            if not front or front[-1][0] >= 99.95:
                continue
            shown = [front[i] for i in _spread_out(len(front), _MAX_BEST)]
            rows = [{"most": percent(left / 100), **_point_row(point, self.fronts)} for left, point in shown]
            tables.append({"what": what, "rows": rows, "more": len(front) - len(shown)})
        return tables

    def _whole(self) -> list[dict[str, str]]:
        """Rows of the networks that are not pruned: the dense ones, and the controls."""
        rows = []
        for title, jobs, prefix in (
            ("dense network", self.usable, "baseline_"),
            ("control, pruner=none", [job for job in self.usable if is_control(job)], ""),
        ):
            for name, group in unpruned(jobs, self.axes).items():
                test, choice = (stat(job.number(prefix + key) for job in group) for key in (TEST, VALIDATION))
                if test is not None:
                    rows.append(
                        _whole_row(", ".join(part for part in (title, name) if part), group, prefix, test, choice)
                    )
        return rows[:_MAX_RUNS]


def _usable(job: JobResult) -> bool:
    return job.status == "finished" and job.number("accuracy") is not None


def _error(job: JobResult) -> str | None:
    """Why a job counts as failed; None when it does not."""
    if job.status == "failed":
        return job.text("error") or "no error was written"
    if job.status == "finished" and not _usable(job):
        return "it has finished, but its accuracy is not a finite number"
    return None


def _read_record(directory: Path) -> Mapping[str, Any]:
    from gsprune.sweeps.record import Sweep  # which may itself be the caller, at the end of a sweep

    sweep = Sweep(directory.absolute())
    record = sweep.record
    if record.get("status") == "running" and not sweep.is_open():
        return {**record, "status": "interrupted"}
    return record


# --- accuracy against ... ----------------------------------------------------------------------------------

# Name -> what is left of the dense network's, in per cent; None keeps it out of the picture. Each means the same for
# single weights and for units, which a sparsity does not.
MEASURES: Mapping[str, Callable[[Point], float | None]] = {
    "parameters": lambda point: _per_cent(point.left),
    "MACs": lambda point: _per_cent(point.share_left("macs", "macs_dense")),
    "latency": lambda point: _per_cent(1 / point.faster[0]) if point.faster else None,
}
TITLES = {
    "parameters": ("Accuracy against parameters left", "parameters left, not zero (% of the dense network's)"),
    "MACs": ("Accuracy against multiplications left", "MACs left (% of the dense network's)"),
    "latency": ("Accuracy against time left", "latency left (% of the dense network's)"),
}
# Name -> what a measurement leaves open: differences inside it are none.
INTERVALS: Mapping[str, Callable[[Point], tuple[float, float] | None]] = {
    "latency": lambda point: (100 / point.faster[2], 100 / point.faster[1]) if point.faster else None,
}
BEST = {"parameters": "parameters left (not zero)", "MACs": "MACs left"}  # the measures with a table of their own


def _per_cent(left: float | None) -> float | None:
    """A share as per cent; None of what no network can have left, which a logarithmic axis could not show either."""
    return None if left is None or not 1e-8 <= left <= 10 else 100 * left


def _key(point: Point) -> tuple[str, float | None]:
    return point.variant, point.target


def _spread_out(count: int, most: int) -> list[int]:
    """
    >>> _spread_out(3, 8), _spread_out(21, 5)
    ([0, 1, 2], [0, 5, 10, 15, 20])
    """
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _front(found: Sequence[Point], measure: Callable[[Point], float | None]) -> set[tuple[str, float | None]]:
    """The best of what was measured, compared as the table shows it: 20.0004 % left is no more than 20 %."""
    placed = [(point, across) for point in found if (across := measure(point)) is not None]
    on_front = pareto_front([(-float(f"{across:.3g}"), round(point.choice.mean, 4)) for point, across in placed])
    return {(point.variant, point.target) for (point, _), yes in zip(placed, on_front, strict=True) if yes}


def _fronts(found: Sequence[Point]) -> dict[str, set[tuple[str, float | None]]]:
    fronts = {name: _front(found, measure) for name, measure in MEASURES.items()}
    timed = [(point, point.faster) for point in found if point.faster is not None]
    clear = clear_front([(low, high, round(point.choice.mean, 4)) for point, (_, low, high) in timed])
    return {**fronts, "latency": {_key(point) for (point, _), yes in zip(timed, clear, strict=True) if yes}}


def _is_search(found: Sequence[Point]) -> bool:
    """Too many variants for lines, most of them met once, as a sweeper that searches leaves them."""
    met = Counter(point.variant for point in found)
    return len(met) > len(STYLES) and 2 * sum(count == 1 for count in met.values()) > len(met)


def _styles(found: Sequence[Point], front: set[tuple[str, float | None]]) -> dict[str, int]:
    """A style for each line; of too many, for those with most points on the front, then the most accurate."""
    search = _is_search(found)
    own: dict[str, list[Point]] = {}
    for point in found:
        own.setdefault(point.pruner if search else point.variant, []).append(point)

    def merit(name: str) -> tuple[int, float]:
        mean = sum(point.choice.mean for point in own[name]) / len(own[name])
        return -sum((point.variant, point.target) in front for point in own[name]), -mean

    chosen = sorted(own, key=merit)[: len(STYLES)]
    return {name: index for index, name in enumerate(sorted(chosen, key=natural))}


def _lines(
    found: Sequence[Point],
    measure: Callable[[Point], float | None],
    front: set[tuple[str, float | None]],
    styles: Mapping[str, int],
    interval: Callable[[Point], tuple[float, float] | None] | None = None,
) -> list[Line]:
    """A line for each variant; of a search a cloud for each pruner."""
    search = _is_search(found)
    marks: dict[str, list[Mark]] = {}
    for point in found:
        across = measure(point)
        if across is not None:
            spread = None if point.choice.spread is None else 100 * point.choice.spread
            best = (point.variant, point.target) in front
            name = point.pruner if search else point.variant
            within = interval(point) if interval else None
            marks.setdefault(name, []).append(Mark(across, 100 * point.choice.mean, spread, best, within))
    return [Line(name, styles.get(name), own, joined=not search) for name, own in marks.items()]


# --- the page's parts --------------------------------------------------------------------------------------


def _groups(found: Sequence[Point], fronts: Mapping[str, set[tuple[str, float | None]]]) -> list[dict[str, Any]]:
    """The table's rows under a heading for each wanted sparsity of one kind, the best first."""
    many = len({point.target for point in found}) > _MAX_GROUPS
    groups: dict[str, list[Point]] = {}
    for point in found:
        title = _band(point.target, point.of) if many else _target_text(point.target, point.of)
        groups.setdefault(title, []).append(point)
    return [
        {
            "title": title,
            "rows": [_point_row(p, fronts) for p in sorted(group, key=lambda p: -p.choice.mean)],
        }
        for title, group in groups.items()
    ]


def _target_text(target: float | None, of: str) -> str:
    """What was asked for, and of what.

    >>> _target_text(0.5, "channels"), _target_text(0.5, ""), _target_text(None, "channels")
    ('50 % of channels pruned', '50 % pruned, of what is not recorded', 'no share asked for, channels pruned')
    """
    share = "no share asked for" if target is None else f"{round(100 * target, 4):g} %"
    return _share_of(share, of, none=target is None)


def _share_of(share: str, of: str, *, none: bool = False) -> str:
    of = shown_text(of, 60)
    if none:
        return f"{share}, {of} pruned" if of else share
    return f"{share} of {of} pruned" if of else f"{share} pruned, of what is not recorded"


def _band(target: float | None, of: str) -> str:
    """
    >>> _band(0.57, "weights"), _band(1.0, "heads")
    ('50 to 60 % of weights pruned', '90 to 100 % of heads pruned')
    """
    if target is None:
        return _target_text(target, of)
    low = 10 * min(int(10 * target + 1e-9), 9)
    return _share_of(f"{low} to {low + 10} %", of)


def _point_row(point: Point, fronts: Mapping[str, set[tuple[str, float | None]]]) -> dict[str, str]:
    size = point.mean("file_bytes")
    asked = "" if point.target is None else f"{round(100 * point.target, 4):g} % of {point.of or 'what it prunes'}"
    return {
        "variant": shown_text(point.variant, 160),
        "asked": shown_text(asked, 80),
        "same": shown_text(", ".join(point.same), 160),
        "n": str(point.accuracy.count),
        "choice": _plus_minus(point.choice, "{:.2f}", 100, " %"),
        "accuracy": _plus_minus(point.accuracy, "{:.2f}", 100, " %"),
        "delta": _delta_text(point),
        "verdict": _verdict(point),
        "sparsity": ""
        if point.sparsity is None
        else shown_text(f"{percent(point.sparsity.mean)} of {point.of}", 80)
        if point.of
        else percent(point.sparsity.mean),
        "params": _times_text(point.times_less("params", "params_dense")),
        "nonzero": "" if point.left is None else percent(point.left),
        "macs": _times_text(point.times_less("macs", "macs_dense")),
        "latency": _faster_text(point),
        "size": "" if size is None else _bytes(size),
        "front": ", ".join(name for name, front in fronts.items() if _key(point) in front),
        "best": shown_text(point.best.name, 80),
    }


def _delta_text(point: Point) -> str:
    """With its own number of pairs, where not every job has a control."""
    if point.delta is None:
        return ""
    told = _plus_minus(point.delta, "{:+.2f}", 100)
    return told if point.delta.count == point.accuracy.count else f"{told} (n = {point.delta.count})"


def _verdict(point: Point) -> str:
    """The colour of a difference: only to a fair control, and only where it is more than what seeds differ by."""
    delta = point.delta
    if point.controls is None or delta is None or abs(delta.mean) <= (delta.spread or 0):
        return ""
    return "worse" if delta.mean < 0 else "better"


def _whole_row(name: str, jobs: Sequence[JobResult], prefix: str, test: Stat, choice: Stat | None) -> dict[str, str]:
    epochs = {job.number(f"{prefix}epochs") for job in jobs}
    told = epochs.pop() if len(epochs) == 1 else None
    return {
        "variant": shown_text(name, 160),
        "epochs": "" if told is None else f"{told:g} epoch{'' if told == 1 else 's'}",
        "n": str(test.count),
        "choice": "" if choice is None else _plus_minus(choice, "{:.2f}", 100, " %"),
        "accuracy": _plus_minus(test, "{:.2f}", 100, " %"),
    }


def _plus_minus(found: Stat, form: str, factor: float, unit: str = "") -> str:
    """
    >>> _plus_minus(Stat(3, 0.5, 0.01), "{:.1f}", 100), _plus_minus(Stat(2, 0.5, None), "{:.1f}", 100)
    ('50.0 ± 1.00', '50.0')
    >>> _plus_minus(Stat(3, 0.5, 1e-17), "{:.1f}", 100, " %")
    '50.0 % (all equal)'
    """
    text = form.format(factor * found.mean)
    if found.spread is None:
        return f"{text}{unit}"
    spread = factor * found.spread
    return f"{text} ± {spread:.2f}{unit}" if spread >= 0.005 else f"{text}{unit} (all equal)"


def _times_text(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}\u00d7" if ratio < 100 else f"{ratio:.0f}\u00d7"


def _faster_text(point: Point) -> str:
    if point.faster is None:
        return shown_text(point.latency_note, 40)
    ratio, low, high = point.faster
    return f"{_times_text(ratio)} ({low:.2f} to {high:.2f})"


def _bytes(size: float) -> str:
    """
    >>> _bytes(378072), _bytes(40_000_000)
    ('378 kB', '40.0 MB')
    """
    return f"{size / 1000:.0f} kB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"


def _row(job: JobResult, error: str | None) -> dict[str, str]:
    overrides = " ".join(f"{key}={value}" for key, value in job.overrides.items())
    return {
        "name": shown_text(job.name, 200),
        "overrides": shown_text(overrides, 400),
        "error": shown_text(error or "", 600),
    }


def _times(jobs: Sequence[JobResult]) -> dict[str, Any] | None:
    """Mean seconds a job for each part, and what is not training; None when no job has recorded it."""
    timed = [job for job in jobs if job.numbers("timings")]
    names = dict.fromkeys([*PARTS, *(name for job in timed for name in job.numbers("timings"))])
    means = {name: found.mean for name in names if (found := stat(job.number("timings", name) for job in timed))}
    total = sum(means.values())
    if not 0 < total < 1e12:
        return None
    parts = [
        {"name": shown_text(PARTS.get(name, name), 80), "seconds": f"{mean:.2f}", "share": f"{100 * mean / total:.0f}"}
        for name, mean in means.items()
        if mean >= 0
    ]
    beyond = f"{total - means['train']:.2f}" if "train" in means else ""
    return {"parts": parts, "jobs": len(timed), "total": f"{total:.2f}", "beyond": beyond}


def _dense_cache(jobs: Sequence[JobResult]) -> dict[str, Any] | None:
    """How many dense networks were trained, how many jobs took one from the cache, and the seconds that saved."""
    source = {job.name: job.text("dense", "source") for job in jobs}
    taken = [job for job in jobs if source[job.name] == "cache"]
    trained = sum(told == "trained" for told in source.values())
    if not taken and not trained:
        return None
    pairs = [(job.number("dense", "train_seconds"), job.number("dense", "seconds")) for job in taken]
    saved = sum(train - cost for train, cost in pairs if train is not None and cost is not None)
    return {"trained": trained, "taken": len(taken), "saved": _duration(saved)}


def _duration(seconds: float) -> str:
    """
    >>> _duration(42.4), _duration(150), _duration(9000)
    ('42.4 s', '2.5 min', '2.5 h')
    """
    if abs(seconds) < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if abs(seconds) < 6000 else f"{seconds / 3600:.1f} h"


# --- sparsity by layer -------------------------------------------------------------------------------------


def _heatmaps(found: Sequence[Point], front: set[tuple[str, float | None]]) -> list[dict[str, Any]]:
    """A picture for each family of runs with about the same layers; a run is the best one of its point."""
    seen: Counter[float | None] = Counter()
    place = {}  # in the table, counted from the best at each sparsity
    for point in found:
        place[point.variant, point.target] = seen[point.target]
        seen[point.target] += 1
    shares: dict[tuple[str, float | None], dict[str, float]] = {}
    for point in sorted(found, key=lambda p: ((p.variant, p.target) not in front, place[p.variant, p.target])):
        layers = _layer_shares(point.best) if len(shares) < _MAX_RUNS else {}
        if layers:
            shares[point.variant, point.target] = layers
    families: list[dict[str, dict[str, float]]] = []
    for point in found:
        layers = shares.get((point.variant, point.target), {})
        if layers:
            label = f"{_target_text(point.target, point.of)}, {point.variant} (job {point.best.name})"
            _family(families, layers)[label] = layers
    more = len(found) - len(shares) if len(shares) == _MAX_RUNS else 0
    return [{**_heatmap(family), "more": more} for family in families[:_MAX_HEATMAPS]]


def _family(families: list[dict[str, dict[str, float]]], layers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The first family that shares at least half of its layers with these, or a new one."""
    for family in families:
        others = next(iter(family.values()))
        if 2 * len(others.keys() & layers.keys()) >= len(others.keys() | layers.keys()):
            return family
    families.append({})
    return families[-1]


def _heatmap(family: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    layers = list(dict.fromkeys(name for shares in family.values() for name in shares))
    hidden = len(layers) - _MAX_LAYERS
    if hidden > 0:
        layers = [*layers[: _MAX_LAYERS // 2], "…", *layers[-(_MAX_LAYERS // 2) :]]
    rows = [[shares.get(layer) for layer in layers] for shares in family.values()]
    return {"picture": _data_uri(draw_heatmap(list(family), layers, rows)), "hidden": max(hidden, 0)}


def _layer_shares(job: JobResult) -> dict[str, float]:
    """Tensor or structure -> share pruned, of `layers` in the result, else of the job's masks; empty without both."""
    if told := _told_layers(job):
        return told
    path = job.folder / "masks.safetensors"
    if not path.is_file() or path.stat().st_size > _MAX_MASK_BYTES:
        return {}
    from gsprune.formats.masks import load_masks

    try:
        masks = load_masks(path)
    except (ValueError, OSError):
        return {}
    return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items() if mask.numel()}


def _told_layers(job: JobResult) -> dict[str, float]:
    found = job.result.get("layers")
    counts = {name: pair for name, pair in found.items() if _is_count(pair)} if isinstance(found, dict) else {}
    return {name: pruned / total for name, (pruned, total) in counts.items()}


def _is_count(pair: object) -> TypeGuard[list[int]]:
    """Whether it is [pruned, total] of a layer."""
    if not (isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)):
        return False
    pruned, total = pair
    return bool(0 <= pruned <= total > 0)


# --- text --------------------------------------------------------------------------------------------------


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Every finite number of a result, of objects in it as "timings.train"; whole numbers stay whole."""
    found: dict[str, float] = {}
    for name, value in result.items():
        inner = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        for key, part in inner.items():
            if isinstance(part, (int, float)) and not isinstance(part, bool) and abs(part) < 1e300:
                found[key] = part
    return found


def _cell(value: object) -> object:
    """A cell of the table, without passwords.

    >>> _cell("=http://ann:secret@host")
    "'=http://***@host"
    """
    return cell(without_passwords(value[:10_000]) if isinstance(value, str) else value)


def _values(values: Sequence[object]) -> str:
    shown = [shown_text(str(value), 60) or "(not set)" for value in values[:16]]
    more = f", … ({len(values)} values)" if len(values) > 16 else ""
    return ", ".join(shown) + more


def _when(value: object) -> str:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return ""
    return moment.strftime("%Y-%m-%d %H:%M:%S %Z").strip() if moment else ""


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
