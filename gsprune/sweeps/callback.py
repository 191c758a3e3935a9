"""The Hydra callback of a sweep: one parent run in MLflow, a report, and no job runs twice.

`SweepCallback` runs in the process that starts the sweep; jobs see the sweep through `record.current_sweep`. They share
files and no memory: the parent writes `sweep.json` into the sweep's directory before the first job, jobs write
`result.json`, and the parent reads the directory. Hydra imports this file in every application that has the callback,
so it imports mlflow and the report (matplotlib) only when a sweep needs them.

In the directory of a sweep:

    sweep.json                             the command, its axes, the parent run
    report.html summary.csv pareto.svg     the report (`gsprune report` makes it again)
    0/ 1/ ...                              the jobs
    dense_cache/                           dense networks that several jobs start from
    .gsprune/                              the local record of the parent run, and locks
"""

from __future__ import annotations

import atexit
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from gsprune.extras import need
from gsprune.files.disk import read_object, reason, spared, write_json
from gsprune.files.layout import RESULT, SWEEP, TRACKING
from gsprune.settings.hydra_files import protect, recorded_overrides, redact_files, sweep_overrides
from gsprune.settings.instantiation import make
from gsprune.sweeps.check import Checked, check_jobs
from gsprune.sweeps.results import JobResult, Results, read_results
from gsprune.sweeps.sweep_dir import (
    Sweep,
    command_identity,
    current_sweep,
    find_begun,
    without_sweep_settings,
)
from gsprune.sweeps.terminal import Jobs, job_of, summary
from gsprune.sweeps.verdict import Terms
from gsprune.text.display import code, logger, one_line
from gsprune.text.redact import last_line, redacted, redacted_message
from gsprune.text.table import noun, terminal_width

if TYPE_CHECKING:
    from gsprune.sweeps.report import Report
    from gsprune.tracking.tracker import Status, Tracker

__all__ = ["SweepCallback", "start_run"]

MOST_FAILURES = 10  # failed jobs that the last lines of a command name
_RUN_STATUS: Mapping[str, Status] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
log = logger(__name__)


def start_run(**options: Any) -> Any:
    """`mlflow.start_run(**options)` nested under this process's sweep, in its experiment and its store.

    For jobs that do their own tracking. Outside of a sweep, or in one without tracking, it is MLflow's own.

    Example: `with gsprune.sweeps.callback.start_run(): mlflow.log_metric("accuracy", 0.9)`.
    """
    mlflow = need("mlflow")
    sweep = current_sweep()
    parent = sweep.parent_run_id if sweep is not None else None
    if sweep is None or parent is None:
        return mlflow.start_run(**options)
    if not mlflow.is_tracking_uri_set() and (uri := sweep.text("tracking_uri")):
        mlflow.set_tracking_uri(uri)
    if "experiment_id" not in options and "run_id" not in options:
        options["experiment_id"] = mlflow.get_run(parent).info.experiment_id
    return mlflow.start_run(**{"parent_run_id": parent, **options})


class SweepCallback(Callback):
    """Hydra's callback `hydra/callbacks=gsprune`: one parent run for a sweep, closed in any case, and the report.

    Args:
        resume: continue the newest sweep of the same command. A sweep in a fixed `hydra.sweep.dir` always continues.
        report: write `report.html`, `summary.csv` and `pareto.svg` at the end.
        check: compose and check every job before the first one runs; none runs if one has a mistake.
        max_drop, by: which network the report says to take: `gsprune.sweeps.verdict.Terms`.
        rehearse: name of the application's part of that check, a function `(cfg, *, here)` that raises a ValueError of
            one sentence; `here` is whether the jobs run on this machine.
        tracking_uri, experiment: for applications without a `tracking` group.

    A fault of tracking or of the report never ends the sweep.
    """

    def __init__(
        self,
        *,
        resume: bool = False,
        report: bool = True,
        check: bool = True,
        max_drop: float = 1.0,
        by: str = "params",
        rehearse: str | None = None,
        tracking_uri: str | None = None,
        experiment: str | None = None,
    ) -> None:
        self.resume, self.report, self.check, self.rehearse = resume, report, check, rehearse
        self.max_drop, self.by = max_drop, by
        self.tracking_uri, self.experiment = tracking_uri, experiment
        self._open: _OpenSweep | None = None
        self._lent: list[str] = []  # environment variables set for this process's job

    def __getstate__(self) -> dict[str, Any]:
        """Without the open sweep: launchers send callbacks to their workers, which close none."""
        return {**self.__dict__, "_open": None}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Before the first job: find or make the directory, the parent run, and the database behind it."""
        _protect(config)
        self._check_settings()
        checked = self._check_jobs(config) if self.check else Checked(None)
        identity = command_identity(config)
        sweep = Sweep((self._earlier(config, identity) or Path(str(config.hydra.sweep.dir))).absolute())
        _settle(config, sweep.directory)
        _make(sweep.directory)
        terms = {"max_drop": self.max_drop, "by": self.by}
        self._open = _OpenSweep(sweep, report=self.report, terms=terms, jobs=len(checked.jobs or ()))
        if not self._open.lock.acquire():
            _refuse(f"another process sweeps in {sweep.directory}: wait for it, or choose another hydra.sweep.dir")
        atexit.register(self._open.close, "failed")  # after an error, which Hydra has printed by then
        self._open.begin(config, identity, lambda **kwargs: self._make_tracker(config, **kwargs))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """In the worker: redact Hydra's files, and remove this callback's record of an earlier try."""
        redact_files(config)
        path = Path(config.hydra.runtime.output_dir) / RESULT
        if config.hydra.mode == RunMode.MULTIRUN and read_object(path).get("recorded_by") == __name__:
            path.unlink()
        if config.hydra.mode == RunMode.MULTIRUN and OmegaConf.select(config, "trainer.progress") != "none":
            self._say_which(int(config.hydra.job.num))
        self._lend_environment()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """In the worker: write a `result.json` for a failed job that has none, and mask what Hydra prints of it."""
        self._return_environment()
        if self._open is not None:
            self._open.counted.end()
        job_return.overrides = recorded_overrides(job_return.overrides or ())
        if job_return.status == JobStatus.FAILED:
            job_return.return_value = _without_secrets(job_return._return_value)
        path = Path(config.hydra.runtime.output_dir) / RESULT
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED or path.exists():
            return
        error = job_return._return_value  # `return_value` would raise it
        overrides = recorded_overrides(without_sweep_settings(config.hydra.overrides.task))
        note = {"status": "failed", "error": last_line(error), "overrides": overrides, "recorded_by": __name__}
        write_json(path, note)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """After the last job. Hydra 1.4 calls it with an error under way too, 1.3 does not: `atexit` closes then."""
        if sys.exc_info()[0] is not None:
            return
        assert self._open is not None
        self._open.close("finished")
        atexit.unregister(self._open.close)

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Before Hydra writes anything of a single run; it refuses wrong sweep settings too."""
        _protect(config)
        self._check_settings()

    def _check_settings(self) -> None:
        for name in ("resume", "check", "report"):
            if not isinstance(value := getattr(self, name), bool):
                setting = f"sweep.{name}" if name != "report" else "hydra.callbacks.gsprune.report"
                _refuse(f"{setting}={value} is not allowed: it must be true or false")
        try:
            Terms(self.max_drop, self.by)
        except ValueError as error:
            _refuse(str(error))

    def _check_jobs(self, config: DictConfig) -> Checked:
        """End the command if a job has a mistake, and print each."""
        checked = check_jobs(config, get_method(self.rehearse) if self.rehearse else None)
        if checked.refused and checked.jobs is not None:
            for number in list(checked.refused)[:MOST_FAILURES]:
                overrides = " ".join(recorded_overrides(checked.jobs[number]))
                print(one_line(f"job {number} would be: {overrides}"), file=sys.stderr)
            print("Nothing was run: correct it, or let the others run with sweep.check=false", file=sys.stderr)
            _refuse(failures({str(number): why for number, why in checked.refused.items()}, len(checked.jobs)))
        return checked

    def _say_which(self, number: int) -> None:
        """Which job starts; in the process that runs them one after the other, how long they still take, too."""
        sweep = current_sweep()
        if self._open is not None:
            log.info("%s", self._open.counted.start(number))
        elif sweep is not None:
            jobs = sweep.record.get("jobs")
            log.info("%s", job_of(number, jobs if isinstance(jobs, int) else None))

    def _lend_environment(self) -> None:
        """Point a job's own tracking (`mlflow.start_run()`, a framework's logger) to the store of its parent run."""
        sweep, self._lent = current_sweep(), list[str]()
        if sweep is None or sweep.parent_run_id is None:
            return
        own = {"MLFLOW_TRACKING_URI": "tracking_uri", "MLFLOW_EXPERIMENT_NAME": "experiment"}
        if "MLFLOW_EXPERIMENT_ID" in os.environ:
            del own["MLFLOW_EXPERIMENT_NAME"]
        for variable, key in own.items():
            if variable not in os.environ and (value := sweep.text(key)):
                os.environ[variable] = value
                self._lent.append(variable)

    def _return_environment(self) -> None:
        for variable in self._lent:
            os.environ.pop(variable, None)
        self._lent = []

    def _earlier(self, config: DictConfig, identity: str) -> Path | None:
        found = find_begun(config, identity) if self.resume else None
        if self.resume and found is None:
            log.info("no earlier sweep of this command exists: a new one starts")
        return found

    def _make_tracker(self, config: DictConfig, **kwargs: Any) -> Tracker:
        from gsprune.tracking.tracker import MLflowTracker

        node = config.get("tracking")
        if OmegaConf.is_config(node) and "_target_" in node:
            tracker: Tracker = make(node, **kwargs)
            return tracker
        experiment = self.experiment or str(config.hydra.job.name)
        return MLflowTracker(tracking_uri=self.tracking_uri, experiment=experiment, **kwargs)


class _OpenSweep:
    """A running sweep, in the process that started it."""

    def __init__(self, sweep: Sweep, *, report: bool, terms: Mapping[str, object] | None = None, jobs: int = 0) -> None:
        self.sweep, self.report, self.terms, self.jobs = sweep, report, terms, jobs
        self.lock, self._process = sweep.lock("sweep"), os.getpid()
        self._record: dict[str, Any] = {}
        self._tracker: Tracker | None = None
        self._closed = False
        self._unwritten: list[str] = []
        self._said: list[str] = []  # of what the sweep has found
        self.counted = Jobs(jobs)  # those that this process runs

    def begin(self, config: DictConfig, identity: str, make_tracker: Callable[..., Tracker]) -> None:
        """Write `sweep.json`, then open or continue the parent run."""
        before, axes = self.sweep.record, _axes(config)
        redact_files(config)  # those of an earlier sweep in this directory
        command = redacted(shlex.join(["python", *recorded_overrides(sys.argv)]))
        self._record = {
            "command": command,
            "overrides": recorded_overrides(without_sweep_settings(config.hydra.overrides.task)),
            "axes": axes,
            "identity": identity,
            "jobs": self.jobs or None,
            "report": self.terms,
            "status": "running",
            "started": before.get("started") or _now(),
            "ended": None,
            "parent_run_id": self.sweep.parent_run_id,
            **{key: self.sweep.text(key) for key in ("tracking_uri", "experiment")},
        }
        self._write()
        results = read_results(self.sweep.directory)
        if before:
            done = len(results.with_status("finished"))
            log.info("continuing the sweep in %s: %d of its jobs have finished", self.sweep.directory, done)
        self._tracker = tracker = make_tracker(
            output_dir=str(self.sweep.directory / ".gsprune"),
            run_name=_title(axes),
            run_id=self._record["parent_run_id"],
        )
        values = {key: ",".join(found) for key, found in axes.items()}
        tags = {"sweep.directory": str(self.sweep.directory), "mlflow.note.content": code(command)}
        tags |= {f"sweep.{key}": text for key, text in values.items()}  # as a continued run cannot change parameters
        tracker.start(config={"command": command, "axes": values}, tags=tags)
        self._close_killed(results)
        self._record |= {
            "parent_run_id": tracker.run_id,
            "tracking_uri": redacted(getattr(tracker, "tracking_uri", None) or "") or None,
            "experiment": getattr(tracker, "experiment", None),
        }
        self._write()

    def close(self, status: str) -> None:
        """Write the report, close the parent run, free the directory. Later calls do nothing."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        try:
            results = read_results(self.sweep.directory)
            if status != "finished" and not results.with_status("failed"):
                status = "interrupted"
            self._record |= {"status": status, "ended": _now()}
            self._write()
            report = self._write_report() if self.report else None
            if self._tracker is not None:
                self._finish_run(self._tracker, results, report)
            if self._said:
                print("\n".join(["", *self._said]), flush=True)
            if self._tracker is not None:
                self._say_page(self._tracker)
            if failed := {job.name: job.text("error") or "" for job in results.with_status("failed")}:
                print(failures(failed, max(self.jobs, len(results.jobs))), file=sys.stderr)
        except Exception:
            log.exception("the sweep in %s could not be closed", self.sweep.directory)
        finally:
            self.lock.release()

    def _write_report(self) -> Report | None:
        from gsprune.sweeps.report import build_report, told

        try:
            report = build_report(self.sweep.directory)
            log.info("report of %s: %s", noun(report.usable, "finished job"), report.directory / "report.html")
            for note in report.notes:
                log.info("%s", note)
            self._said = summary(told(report), report.points, report.unpruned, width=terminal_width())
            return report
        except (ValueError, OSError) as error:
            log.warning("no report of the sweep: %s", error)
        except Exception:  # a fault of ours must not cost the parent run its end
            log.exception("no report of the sweep in %s", self.sweep.directory)
        return None

    def _say_page(self, tracker: Tracker) -> None:
        page = getattr(tracker, "page", None)
        if page is not None and page.address:
            log.info("MLflow: %s", f"{page.command}, then {page.address}" if page.command else page.address)

    def _finish_run(self, tracker: Tracker, results: Results, report: Report | None) -> None:
        self._close_killed(results)
        counts = {f"jobs/{name}": len(results.with_status(name)) for name in ("finished", "failed")}
        tracker.log_metrics({**counts, **(report.values if report else {})}, step=0)
        for path in report.paths if report else ():
            tracker.log_artifact(path)
        verdict = " ".join(f"{found}." for found in report.verdicts) if report else ""
        tracker.log_tags(
            {
                "mlflow.note.content": self._description(results, verdict),
                **({"sweep.verdict": verdict} if verdict else {}),
            }
        )
        tracker.finish(_RUN_STATUS[str(self._record["status"])])

    def _description(self, results: Results, verdict: str = "") -> str:
        """The first lines of the parent run's page."""
        done, failed = (len(results.with_status(name)) for name in ("finished", "failed"))
        where = "report.html is among the artifacts" if self.report else "no report was wanted"
        first = f"{code(verdict)}\n\n" if verdict else ""
        counts = f"{noun(done, 'job')} finished, {failed} failed"
        return f"{first}{counts}; {where}.\n\n{code(str(self._record['command']))}"

    def _close_killed(self, results: Results) -> None:
        """End the MLflow runs of jobs that no process runs any more."""
        assert self._tracker is not None
        alive = [job for job in results.with_status("running") if self.sweep.is_running(job)]
        dead = [job for job in results.jobs if job.status in ("running", "interrupted") and job not in alive]
        done = results.with_status("finished")  # one may have been killed in its last call
        self._tracker.close_children(except_for=_runs(alive), killed=_runs(dead), finished=_runs(done))

    def _write(self) -> None:
        with spared(SWEEP, self._unwritten):
            write_json(self.sweep.directory / SWEEP, self._record)


def failures(failed: Mapping[str, str], jobs: int) -> str:
    """How many jobs failed, which, and why: a line for each.

    >>> print(failures({"0": "ValueError: seed=x is not allowed", "2": "RuntimeError: no"}, 3))
    2 of 3 failed: 0: seed=x is not allowed
                   2: RuntimeError: no
    """
    start = f"{len(failed)} of {jobs} failed: "
    lines = [one_line(f"{name}: {why.removeprefix('ValueError: ')}") for name, why in failed.items()]
    more = [f"and {len(lines) - MOST_FAILURES} more"] if len(lines) > MOST_FAILURES else []
    return start + f"\n{' ' * len(start)}".join([*lines[:MOST_FAILURES], *more])


def _refuse(message: str) -> NoReturn:
    """End the command: Hydra would turn an ordinary exception of a callback into a warning, and go on."""
    print(one_line(message) if "\n" not in message else message, file=sys.stderr)
    raise SystemExit(1)


def _make(directory: Path) -> None:
    """End the command where the sweep's directory cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _refuse(f"{directory} cannot be made: {reason(error)}; give another hydra.sweep.dir")


def _runs(jobs: Iterable[JobResult]) -> list[str]:
    """The MLflow runs of the jobs."""
    found = (read_object(job.folder / TRACKING).get("run_id") for job in jobs)
    return [run for run in found if isinstance(run, str)]


def _settle(config: DictConfig, directory: Path) -> None:
    """Make the sweep's directory absolute, in the configuration of the launcher and of every job.

    Hydra composes a job's configuration again from the overrides, and a worker may have another working directory.
    """
    with read_write(config.hydra), open_dict(config.hydra):  # Hydra 1.4 closes this node itself
        config.hydra.sweep.dir = str(directory)
        quoted = str(directory).replace("\\", "\\\\").replace("'", "\\'")
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
    HydraConfig.instance().set_config(config)


def _axes(config: DictConfig) -> dict[str, list[str]]:
    """The swept keys and their values, from the command or `hydra.sweeper.params`."""
    lines = recorded_overrides(without_sweep_settings(sweep_overrides(config)))
    axes: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(lines):
        key = override.get_key_element().lstrip("+")
        axes.pop(key, None)  # the command wins over the configuration
        if override.is_sweep_override():
            listed = override.is_discrete_sweep()
            values = override.sweep_string_iterator() if listed else [override.get_value_string()]
            axes[key] = [str(value) for value in values]
    return axes


def _protect(config: DictConfig) -> None:
    try:
        protect(config)
    except ValueError as error:
        _refuse(str(error))


def _without_secrets(error: BaseException) -> BaseException:
    """The error itself, or a copy with redacted text if it or its causes hold a secret."""
    full = "".join(traceback.format_exception(error))
    if (shown := redacted_message(full)) == full:
        return error
    own = isinstance(error, CompactHydraException)
    return CompactHydraException(redacted_message(str(error)) if own else shown.rstrip())


def _title(axes: Mapping[str, list[str]]) -> str:
    """
    >>> _title({"pruner": ["abs", "weighted"], "pruner.target_sparsity": ["0.5"], "seed": ["0", "1"]})
    'sweep of pruner, target_sparsity, seed'
    """
    return f"sweep of {', '.join(key.rpartition('.')[2] for key in axes)}" if axes else "sweep"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
