"""The report of a sweep: `report.html`, `summary.csv` and `pareto.svg` in its directory.

    gsprune report multirun/<date>/<time>

works at any time, also while the sweep runs: it reads the results of the jobs (results.py), groups them into variants
(variants.py), compares these (measures.py, layers.py), and writes. The page is one file that loads nothing else.
"""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gsprune.extras import need
from gsprune.files.disk import read_object, write_atomic
from gsprune.files.layout import RESULT, TRACKING
from gsprune.plots.front_figure import NARROW, THEME, WIDE, Front, document, draw
from gsprune.sweeps.audits import audits
from gsprune.sweeps.layers import heatmaps
from gsprune.sweeps.measures import MEASURES, pictures, with_fronts
from gsprune.sweeps.results import JobResult, Results, read_results
from gsprune.sweeps.sweep_dir import Sweep
from gsprune.sweeps.variants import (
    TEST,
    Point,
    Stat,
    Unpruned,
    chosen_by,
    equal_merged,
    is_control,
    once_each,
    points,
    stat,
    swept,
    unpruned_rows,
    variants,
)
from gsprune.sweeps.verdict import BY, Terms, Verdict, on_test_text, verdicts
from gsprune.text.display import cell, percent
from gsprune.text.names import natural
from gsprune.text.redact import redacted, say, shown_text
from gsprune.tracking.views import Page, run_page

__all__ = ["Report", "build_report", "main"]

FILES = ("report.html", "summary.csv", "pareto.svg")
PARTS = {
    "start": "start: data, model, rehearsal",
    "train": "training, dense and pruned",
    "measure": "measuring: test split, MACs, latency",
    "files": "files and figures",
    "tracking": "tracking",
}
# What the parent run of a sweep carries, under the names that its jobs have.
_VALUES = (
    *("val_accuracy", "accuracy", "baseline_accuracy", "target_sparsity", "sparsity"),
    *("params", "params_nonzero", "macs", "speedup"),
)
UNFINISHED = ("running", "interrupted")
_TEXTS = ("latency_note", "config_hash", "mlflow_run_id", "error")  # the last columns of summary.csv
_MAX_BEST = 8  # rows of each table at the top of the page
_MAX_GROUPS = 12  # target sparsities with a heading of their own in the table; more go by tens
_MAX_UNPRUNED = 20  # rows
_MAX_LAYERS, _MAX_RUNS_BESIDE = 60, 7  # of a heatmap
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
    points: Sequence[Point] = ()  # each pruned network of the sweep
    unpruned: Sequence[Unpruned] = ()  # what they are compared with
    verdicts: Sequence[Verdict] = ()  # which network to take, of each model and data set
    terms: Terms = field(default_factory=Terms)
    values: Mapping[str, float] = field(
        default_factory=dict
    )  # means over seeds of the network that the sweep stands for
    paths: list[Path] = field(default_factory=list)


def build_report(directory: str | Path, terms: Terms | None = None) -> Report:
    """Write report.html, summary.csv and pareto.svg into the sweep directory, each whole or not at all.

    Args:
        terms: which network to take; None: as the sweep's command said.

    Raises:
        ValueError: the directory does not exist, or holds no job whose result can be read.
    """
    sweep = SweepJobs.read(Path(directory), terms)
    report = Report(
        sweep.directory,
        sweep.results,
        len(sweep.usable),
        sweep.left_out,
        notes=sweep.notes(),
        points=sweep.points,
        unpruned=unpruned_rows(sweep.usable, sweep.axes),
        verdicts=sweep.verdicts,
        terms=sweep.terms,
        values=sweep.values,
    )
    anchors = {point.key: f"p{number}" for number, point in enumerate(sweep.points)}
    links: dict[Hashable, str] = {key: f"#{anchor}" for key, anchor in anchors.items()}
    drawn = pictures(sweep.points, sweep.usable, sweep.verdicts, sweep.terms, links)
    page = _page(sweep, report, drawn, anchors)
    texts = (page, _table(sweep))
    alone = next(iter(pictures(sweep.points, sweep.usable, sweep.verdicts, sweep.terms, {}).values()))
    contents = (*(text.encode("utf-8", "replace") for text in texts), document(alone))
    for name, content in zip(FILES, contents, strict=True):
        write_atomic(sweep.directory / name, content)
        report.paths.append(sweep.directory / name)
    return report


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gsprune report",
        description="Say which network of a Hydra sweep to take, and write report.html, summary.csv and pareto.svg.",
        epilog="It works at any time, also while the sweep still runs.",
    )
    parser.add_argument("directory", help="the directory of the sweep, such as multirun/2026-01-31/12-00-00")
    add_terms(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `gsprune report`: 0 when there was a finished job to report, else 1."""
    given = make_parser().parse_args(arguments)
    try:
        report = build_report(given.directory, terms_of(given))
    except (ValueError, OSError) as error:
        say(f"Error: {error}", file=sys.stderr)
        return 1
    lines = [*told(report), *(f"Wrote {path}" for path in report.paths), *(f"Note: {note}" for note in report.notes)]
    lines += [f"Skipped {folder}: {reason}" for folder, reason in list(report.left_out.items())[:_MAX_PRINTED]]
    for line in lines:
        say(line)
    if (more := len(report.left_out) - _MAX_PRINTED) > 0:
        say(f"Skipped {more} more, see the page")
    if not report.usable:
        say(f"Error: no job in {report.directory} has finished with an accuracy", file=sys.stderr)
        return 1
    return 0


def add_terms(parser: argparse.ArgumentParser) -> None:
    """The options that say which network to take; `terms_of` reads them."""
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="points of validation accuracy that the network may lose (default: report.max_drop of the sweep)",
    )
    parser.add_argument("--by", choices=BY, help="what the network has least of (default: report.by of the sweep)")


def terms_of(given: argparse.Namespace) -> Terms | None:
    """The terms that the options give, those of the sweep's record where they are left out.

    Raises:
        ValueError: a drop below 0 or above 100.
    """
    if given.max_drop is None and given.by is None:
        return None
    before = Terms.read(Sweep(Path(given.directory)).record.get("report"))
    return Terms(before.max_drop if given.max_drop is None else given.max_drop, given.by or before.by)


def told(report: Report) -> list[str]:
    """The lines of a terminal: the verdict, what it does not know, the network and the command that takes it."""
    lines = []
    for verdict in report.verdicts:
        lines.append(f"{verdict}.")
        lines += [f"  {doubt}." for doubt in verdict.doubts]
        if verdict.job is not None:
            lines.append(f"  Network: {verdict.job.folder}")
            lines.append(f"  Take it: {take_command(report, verdict)}")
    return [shown_text(line, 1000) for line in lines]


def take_command(report: Report, verdict: Verdict) -> str:
    """The one command that takes the network of a verdict."""
    recorded = Terms.read(Sweep(report.directory).record.get("report"))
    words = ["gsprune", "take", str(report.directory.resolve())]
    if len(report.verdicts) > 1 and verdict.job is not None:
        return shlex.join([*words, "--job", verdict.job.name])
    words += [f"--max-drop={report.terms.max_drop:g}"] if report.terms.max_drop != recorded.max_drop else []
    return shlex.join([*words, *([f"--by={report.terms.by}"] if report.terms.by != recorded.by else [])])


# --- the jobs ----------------------------------------------------------------------------------------------


@dataclass
class SweepJobs:
    """What the three files are made from."""

    directory: Path
    results: Results
    jobs: list[JobResult]  # each configuration once
    left_out: dict[str, str]
    axes: dict[str, list[str]]
    variants: dict[str, str]
    points: list[Point]
    terms: Terms

    @classmethod
    def read(cls, directory: Path, terms: Terms | None = None) -> SweepJobs:
        """
        Raises:
            ValueError: the directory does not exist, or holds no job whose result can be read.
        """
        terms = terms or Terms.read(Sweep(directory).record.get("report"))
        results = read_results(directory)
        if not results.jobs:
            some = "".join(f"; {name}: {reason}" for name, reason in list(results.skipped.items())[:3])
            raise ValueError(f"{directory} holds no job with a {RESULT} that can be read{some}")
        jobs, equal = once_each(results.jobs)
        left_out = dict(sorted({**results.skipped, **equal}.items(), key=lambda item: natural(item[0])))
        axes = swept(jobs)
        names = variants(jobs, axes)
        found = with_fronts(equal_merged(points([job for job in jobs if _usable(job)], names)))
        return cls(directory, results, jobs, left_out, axes, names, found, terms)

    @property
    def usable(self) -> list[JobResult]:
        return [job for job in self.jobs if _usable(job)]

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Which network to take, of each model and data set."""
        unfinished = sum(job.status in UNFINISHED or _error(job) is not None for job in self.jobs)
        ended = self.status not in ("running", "interrupted")
        return verdicts(self.points, self.usable, self.axes, self.terms, unfinished=unfinished, ended=ended)

    @property
    def values(self) -> dict[str, float]:
        """The numbers of the network that is taken: of several the most accurate, as where none is."""
        found = [v.taken for v in self.verdicts if v.taken is not None] or self.points
        best = max(found, key=lambda point: point.choice.mean, default=None)
        means = {name: best.mean(name) for name in _VALUES} if best is not None else {}
        return {name: mean for name, mean in means.items() if mean is not None}

    @property
    def status(self) -> str:
        """Of the sweep as its record has it, but "interrupted" if no process runs it; "" without a record."""
        record = Sweep(self.directory.absolute())
        found = record.text("status") or ""
        return "interrupted" if found == "running" and not record.is_open() else found

    @property
    def by(self) -> str:
        """The number that choices are made by."""
        return chosen_by(self.usable)

    @property
    def controls(self) -> list[JobResult]:
        return [job for job in self.usable if is_control(job)]

    def notes(self) -> list[str]:
        """What keeps the numbers of the tables from being compared as they stand."""
        lone = sum(point.delta is None for point in self.points)
        if not (self.controls and lone):
            return []
        rows = f"{lone} of {len(self.points)} rows have no control (pruner=none) of the same seed and settings"
        return [f"{rows}: they show no difference"]


def _usable(job: JobResult) -> bool:
    return job.status == "finished" and job.number("accuracy") is not None


def _error(job: JobResult) -> str | None:
    """Why a job counts as failed; None if it does not."""
    if job.status == "failed":
        return job.text("error") or "no error was written"
    if job.status == "finished" and not _usable(job):
        return "it has finished, but its accuracy is not a finite number"
    return None


# --- summary.csv -------------------------------------------------------------------------------------------


def _table(sweep: SweepJobs) -> str:
    """One row for each job: folder, status, variant, overrides, every number of its result, texts (RFC 4180)."""
    rows = [(job, dict(_numbers(job.result))) for job in sweep.results.jobs]
    numbers = list(dict.fromkeys(name for _, found in rows for name in found))[:_MAX_COLUMNS]
    axes = [axis for axis in sweep.axes if axis not in numbers][:_MAX_COLUMNS]
    columns = ["folder", "status", "variant", "verdict", *axes, *numbers, *_TEXTS]
    take = {verdict.job.name: f"{verdict}." for verdict in sweep.verdicts if verdict.job is not None}
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(map(_cell, columns))
    for job, found in rows:
        given = {axis: job.overrides.get(axis, "") for axis in sweep.axes}
        texts = {name: job.text(name) or "" for name in _TEXTS}
        own = {"folder": job.name, "status": job.status, "variant": sweep.variants.get(job.name, "")}
        own["verdict"] = take.get(job.name, "")
        row = {**given, **found, **texts, **own}
        writer.writerow(_cell(row.get(name, "")) for name in columns)
    return buffer.getvalue()


def _numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every finite number of a result, those of objects in it as "timings.train"; whole numbers stay whole."""
    for name, value in result.items():
        inner = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        for key, part in inner.items():
            if isinstance(part, (int, float)) and not isinstance(part, bool) and abs(part) < 1e300:
                yield key, part


def _cell(value: object) -> object:
    """A cell of the table, without passwords.

    >>> _cell("=http://ann:secret@host")
    "'=http://***@host"
    """
    return cell(redacted(value[:10_000]) if isinstance(value, str) else value)


# --- report.html -------------------------------------------------------------------------------------------


def _page(sweep: SweepJobs, report: Report, drawn: Mapping[str, Front], anchors: Mapping[Any, str]) -> str:
    jinja2 = need("jinja2")
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: shown_text(value, 2000) if type(value) is str else value,  # Markup is HTML of ours
    )
    environment.filters |= _FILTERS | {"command": lambda verdict: take_command(report, verdict)}
    maps, unmapped = heatmaps({f"{_heading(p)}, {p.variant} (job {p.best.name})": p for p in sweep.points})
    page: str = environment.get_template(
        "report.html"
    ).render(
        title=shown_text("/".join(sweep.directory.resolve().parts[-2:]), 200),
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC",
        facts=_facts(sweep),
        finished=len(sweep.usable),
        theme=Markup(THEME),  # nothing in it, nor in the pictures, is left to escape
        verdicts=report.verdicts,
        taken={verdict.taken.key for verdict in report.verdicts if verdict.taken is not None},
        terms=report.terms,
        place=shlex.quote(str(sweep.directory.resolve())),
        anchors=anchors,
        best=_best(sweep.points),
        pictures={name: [Markup(draw(front, size)) for size in (WIDE, NARROW)] for name, front in drawn.items()},
        notes=report.notes,
        by_test=sweep.by == TEST,
        fair=bool(sweep.controls),
        unpruned=report.unpruned[:_MAX_UNPRUNED],
        groups=_groups(sweep.points),
        few=any(point.accuracy.count < 3 for point in sweep.points),
        failed=[(job, error) for job in sweep.jobs if (error := _error(job)) is not None],
        unfinished=[(job, "") for job in sweep.jobs if job.status in UNFINISHED],
        left_out=sweep.left_out,
        heatmaps=([_map(runs) for runs in maps], unmapped),
        audits=_audits(sweep),
        times=_times(sweep.usable),
        dense=_dense_cache(sweep.usable),
    )
    return page


def _facts(sweep: SweepJobs) -> list[tuple[str, str]]:
    """The head of the page: label and text, partly from `sweep.json`."""
    record = Sweep(sweep.directory.absolute())
    texts = {key: value for key, value in record.record.items() if isinstance(value, str)}
    texts["status"] = sweep.status
    first, *others = (job.overrides for job in sweep.jobs)
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    found = {
        "directory": str(sweep.directory.resolve()),
        **{key: texts.get(key, "") for key in ("command", "status")},
        **{key: _moment(texts.get(key, "")) for key in ("started", "ended")},
        "set in every job": shown_text(_overrides(common), 400),
    }
    axes = record.record.get("axes")
    listed = {key: value for key, value in axes.items() if isinstance(value, list)} if isinstance(axes, dict) else {}
    several = [(key, values) for key, values in {**sweep.axes, **listed}.items() if len(values) > 1]
    found |= {f"swept: {shown_text(key, 80)}": _values(values) for key, values in several[:_MAX_AXES]}
    return [(label, text) for label, text in found.items() if text]


def _best(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The front of each measure, from what leaves most to what leaves least: which network to take at which size."""
    tables = []
    for measure in MEASURES:
        front = [(left[1], point) for point in points if measure.name in point.fronts and (left := measure.left(point))]
        front.sort(key=lambda pair: -pair[0])
        if measure.table and front and front[-1][0] < 99.95:
            rows = [front[i] for i in _spread_out(len(front), _MAX_BEST)]
            tables.append({"what": measure.table, "rows": rows, "more": len(front) - len(rows)})
    return tables


def _spread_out(count: int, most: int) -> list[int]:
    """
    >>> _spread_out(3, 8), _spread_out(21, 5)
    ([0, 1, 2], [0, 5, 10, 15, 20])
    """
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points under a heading for each target sparsity of one kind, or each ten per cent of it; the best first."""
    tens = len({point.target_sparsity for point in points}) > _MAX_GROUPS
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        groups[_heading(point, tens=tens)].append(point)
    return {title: sorted(group, key=lambda point: -point.choice.mean) for title, group in groups.items()}


def _heading(point: Point, *, tens: bool = False) -> str:
    """
    >>> job = JobResult(Path("0"), {"status": "finished", "sparsity_of": "heads"})
    >>> _heading(Point("abs", 0.57, (job,))), _heading(Point("abs", 1.0, (job,)), tens=True)
    ('57 % of heads pruned', '90 to 100 % of heads pruned')
    >>> _heading(Point("abs", None, (job,)))
    'no share asked for, heads pruned'
    """
    target, of = point.target_sparsity, shown_text(point.of, 60)
    if target is None:
        return f"no share asked for, {of} pruned" if of else "no share asked for"
    low = 10 * min(int(10 * target + 1e-9), 9)
    share = f"{low} to {low + 10} %" if tens else f"{round(100 * target, 4):g} %"
    return f"{share} of {of} pruned" if of else f"{share} pruned, of what is not recorded"


def _audits(sweep: SweepJobs) -> dict[str, Any]:
    """The table of the jobs' audits."""
    rows, more = audits(sweep.usable, sweep.axes)
    return {"rows": rows, "more": more, "networks": len({row.network for row in rows}) > 1}


def _map(runs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A heatmap as tables of a few runs each, so that they fit on any page: a row for each layer."""
    layers, labels = list(dict.fromkeys(layer for shares in runs.values() for layer in shares)), list(runs)
    hidden = max(len(layers) - _MAX_LAYERS, 0)
    if hidden:
        layers = [*layers[: _MAX_LAYERS // 2], "…", *layers[-(_MAX_LAYERS // 2) :]]
    chunks = []
    for start in range(0, len(labels), _MAX_RUNS_BESIDE):
        some = labels[start : start + _MAX_RUNS_BESIDE]
        rows = [(layer, [runs[label].get(layer) for label in some]) for layer in layers]
        chunks.append({"start": start + 1, "labels": some, "rows": rows})
    return {"chunks": chunks, "hidden": hidden}


def _times(jobs: Sequence[JobResult]) -> dict[str, Any] | None:
    """Mean seconds a job for each part, and what is not training; None if no job has recorded it."""
    timed = [job.numbers("timings") for job in jobs if job.numbers("timings")]
    names = dict.fromkeys([*PARTS, *(name for timings in timed for name in timings)])
    means = {name: found.mean for name in names if (found := stat(timings.get(name) for timings in timed))}
    total = sum(means.values())
    if not 0 < total < 1e12:
        return None
    parts = [(PARTS.get(name, name), mean) for name, mean in means.items() if mean >= 0]
    beyond = f"{total - means['train']:.2f}" if "train" in means else ""
    return {"parts": parts, "jobs": len(timed), "total": total, "beyond": beyond}


def _dense_cache(jobs: Sequence[JobResult]) -> dict[str, Any] | None:
    """How many dense networks were trained, how many jobs took one from the cache, and the seconds that saved."""
    trained = sum(job.text("dense", "source") == "trained" for job in jobs)
    taken = [job for job in jobs if job.text("dense", "source") == "cache"]
    if not taken and not trained:
        return None
    pairs = [(job.number("dense", "train_seconds"), job.number("dense", "seconds")) for job in taken]
    saved = sum(train - cost for train, cost in pairs if train is not None and cost is not None)
    return {"trained": trained, "taken": len(taken), "saved": _duration(saved)}


# --- texts of the page -------------------------------------------------------------------------------------


def _mean(found: Stat | None, form: str = ".2f", unit: str = " %") -> str:
    """A share in per cent, with its spread.

    >>> _mean(Stat(3, 0.5, 0.01)), _mean(Stat(2, 0.5, None)), _mean(Stat(3, 0.5, 1e-17)), _mean(None)
    ('50.00 ± 1.00 %', '50.00 %', '50.00 % (all equal)', '')
    """
    if found is None:
        return ""
    text = f"{100 * found.mean:{form}}"
    if found.spread is None:
        return f"{text}{unit}"
    return f"{text} ± {100 * found.spread:.2f}{unit}" if found.spread >= 5e-5 else f"{text}{unit} (all equal)"


def _delta(point: Point) -> str:
    """With its own number of pairs, if not every job has a control."""
    pairs = point.delta.count if point.delta else point.accuracy.count
    return _mean(point.delta, "+.2f", "") + ("" if pairs == point.accuracy.count else f" (n = {pairs})")


def _verdict(point: Point) -> str:
    """The colour of a difference: only from a fair control, and only if it is more than what seeds differ by."""
    delta = point.delta
    if point.controls is None or delta is None or abs(delta.mean) <= (delta.spread or 0):
        return ""
    return "worse" if delta.mean < 0 else "better"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.{2 if ratio < 100 else 0}f}\u00d7"


def _faster(point: Point) -> str:
    if point.faster is None:
        return shown_text(point.latency_note, 40)
    ratio, low, high = point.faster
    return f"{_ratio(ratio)} ({low:.2f} to {high:.2f})"


def _interval(found: tuple[float, float, float] | None) -> str:
    """
    >>> _interval((0.771, 0.68, 0.84)), _interval(None)
    ('0.77 (0.68 to 0.84)', '')
    """
    return "" if found is None else "{:.2f} ({:.2f} to {:.2f})".format(*found)


def _size(size: float | None) -> str:
    """
    >>> _size(378072), _size(40_000_000), _size(None)
    ('378 kB', '40.0 MB', '')
    """
    if size is None:
        return ""
    return f"{size / 1000:.0f} kB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"


def _duration(seconds: float) -> str:
    """
    >>> _duration(42.4), _duration(150), _duration(9000)
    ('42.4 s', '2.5 min', '2.5 h')
    """
    if abs(seconds) < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if abs(seconds) < 6000 else f"{seconds / 3600:.1f} h"


def _overrides(overrides: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def _values(values: Sequence[object]) -> str:
    shown = [shown_text(str(value), 60) or "(not set)" for value in values[:16]]
    more = f", … ({len(values)} values)" if len(values) > 16 else ""
    return ", ".join(shown) + more


def _moment(text: str) -> str:
    with suppress(ValueError):
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    return ""


def _folder(job: JobResult) -> str:
    """The job's folder as seen from the page.

    >>> _folder(JobResult(Path("/a/seed=0/3"), {}, Path("/a")))
    './seed%3D0/3/'
    """
    return "./" if job.folder == job.sweep else f"./{quote(job.name)}/"


def _in_mlflow(job: JobResult) -> Page:
    return run_page(read_object(job.folder / TRACKING))


def _whole(share: float) -> str:
    """Whole per cent, but 0 and 100 only for exactly that.

    >>> [_whole(share) for share in (0, 0.002, 0.5, 0.998, 1)]
    ['0', '<1', '50', '>99', '100']
    """
    if 0 < share < 0.005:
        return "<1"
    return ">99" if 0.995 <= share < 1 else f"{100 * share:.0f}"


_FILTERS = {
    "shown": shown_text,
    "percent": lambda share: "" if share is None else percent(share),
    "mean": _mean,
    "delta": _delta,
    "verdict": _verdict,
    "ratio": _ratio,
    "faster": _faster,
    "size": _size,
    "interval": _interval,
    "overrides": _overrides,
    "folder": _folder,
    "title": lambda job: shown_text(job.text("name") or job.name, 120),
    "mlflow": _in_mlflow,
    "on_test": on_test_text,
    "whole": _whole,
}
