"""The record of a job, from its first `result.json` to its last file: result, tracker, model, masks, figures."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gsprune.app.configuration import NUMBERS, build, hydra_tags, run_name
from gsprune.app.console import print_summary
from gsprune.app.output_dir import SETTINGS, readable_settings, remove_temporary, resume_hint
from gsprune.app.stages.checkpoint import DENSE, DENSE_PROGRAM, Dense, JobCheckpoints
from gsprune.app.stages.context import Context
from gsprune.app.stages.history import History, counts
from gsprune.app.stages.programs import keep_program
from gsprune.app.stages.setup import Setup
from gsprune.files.disk import put_aside, read_object, reason, write_json
from gsprune.files.layout import PROGRAM, TRACKING
from gsprune.formats.masks import save_masks
from gsprune.formats.network import WEIGHTS, save_pruned
from gsprune.plots import drawing, run_figures
from gsprune.settings.identity import dataset_digest
from gsprune.settings.recorded import recorded
from gsprune.surgery.cut_plan import CutPlan
from gsprune.text.display import logger
from gsprune.text.redact import last_line
from gsprune.tracking.tracker import read_metrics
from gsprune.tracking.views import FINAL_MASKS, run_color
from gsprune.training.checkpoints import Checkpoints
from gsprune.training.signals import Interrupted


def mark_running(job: Context) -> dict[str, Any]:
    """Write a first `result.json`, which a job that is killed leaves; returns the one that was there."""
    if not job.first:
        return {}
    before = read_object(job.folder / "result.json")
    if read_object(job.folder / TRACKING).get("status") == "RUNNING":
        before["status"] = "running"  # killed while it told MLflow of its end
    job.write_result_file()
    return before


def open_record(job: Context, checkpoints: JobCheckpoints, history: History, before: Mapping[str, Any]) -> None:
    """Write what is known before training, and start the tracker.

    Args:
        before: the result that was in the output directory.
    """
    if not job.first:
        return
    job.write_result_file()
    remove_temporary(job.folder)
    if checkpoints.saved is None:
        _make_room(job, checkpoints, anew=job.cfg.trainer.resume == "never")
    settings = readable_settings(job.cfg)
    job.writer.write_or_retry(SETTINGS.as_posix(), lambda: write_json(job.folder / SETTINGS, settings))
    same = before.get("status") != "finished" and before.get("config_hash") == job.result["config_hash"]
    continues = job.cfg.trainer.resume == "auto" and bool(same or checkpoints.saved)
    with job.watch.part("tracking"):
        _start_tracker(job, history if continues else None)


def _make_room(job: Context, checkpoints: JobCheckpoints, *, anew: bool) -> None:
    """Files of an earlier run are written over if that was asked for, else set aside."""
    if anew:
        checkpoints.folder.remove_all()
    for old in (job.folder / "masks", job.folder / "figures"):
        if anew:
            shutil.rmtree(old, ignore_errors=True)
        elif old.is_dir() and any(old.iterdir()):
            put_aside(old, "earlier")


def _start_tracker(job: Context, history: History | None) -> None:
    """Begin the record, or continue that of `history`."""
    name = job.cfg.tracking.get("run_name") or run_name(job.cfg)
    more = {"parent_run_id": job.sweep.parent_run_id} if job.sweep else {}
    if history is not None and isinstance(run_id := read_object(job.folder / TRACKING).get("run_id"), str):
        more["run_id"] = run_id
    job.tracker = build(job.cfg.tracking, output_dir=str(job.folder), run_name=name, **more)
    tags = {"config_hash": job.result["config_hash"], **hydra_tags()}
    if pruner := job.result["choices"].get("pruner"):
        tags["mlflow.runColor"] = run_color(pruner)
    rows = {} if history is None else {"rows": history.rows}  # a tracker of a user's own may start anew only
    job.tracker.start(config=recorded(job.cfg), tags=tags, **rows)
    # The name of an option is what a person compares by; in the configuration it is spread over many values.
    job.tracker.log_params({key: value for key, value in job.result["choices"].items() if key in job.cfg})
    job.result["mlflow_run_id"] = job.tracker.run_id


log = logger(__name__)
# Numbers of each logged model.
OF_MODELS = (
    *("val_accuracy", "accuracy", "loss", "sparsity", "params", "params_nonzero", "macs"),
    *("latency_ms", "speedup", "file_bytes"),
)


def write_files(job: Context, setup: Setup, history: History, pruner: Any, *, dense: Dense) -> None:
    """Model, masks, programs and figures; `result.json` and `metrics.jsonl` are written elsewhere.

    Raises:
        ValueError: the model cannot be written; a run can do without any other file.
    """
    if not job.first:
        return
    model = setup.model
    with job.watch.part("files"):
        try:
            _save_model_making_room(job, model, pruner)
        except OSError as error:
            job.writer.unwritten.append(WEIGHTS)
            more = resume_hint(job.cfg, job.folder, job.sweep)
            raise ValueError(
                f"the model could not be written to {job.folder}: {reason(error)}; once there is room, {more}"
            ) from error
        _write_figures(job, history, pruner, dense.val_accuracy)
    keep_program(job, model, setup.example, job.folder / PROGRAM)
    if _is_trained_here(job):
        keep_program(job, dense.model, setup.example, job.folder / DENSE_PROGRAM)


def save_model(job: Context, model: nn.Module, pruner: Any) -> None:
    """The model first: the one file that a run must leave."""
    plan = pruner.plan or CutPlan(kept={}, sizes={}, attributes={})
    save_pruned(job.folder, model, plan, extra={"config_hash": job.result["config_hash"]})
    job.writer.write("masks.safetensors", lambda: save_masks(job.folder / "masks.safetensors", pruner.masks()))


def _save_model_making_room(job: Context, model: nn.Module, pruner: Any) -> None:
    """On a full disk the older checkpoint makes room; the newest one stays, to resume from."""
    try:
        save_model(job, model, pruner)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        Checkpoints(job.folder / "checkpoint").keep(1)
        save_model(job, model, pruner)


def _write_figures(job: Context, history: History, pruner: Any, baseline: float | None) -> None:
    folder, rows = job.folder / "figures", read_metrics(job.folder / "metrics.jsonl")

    def write(name: str, draw: Callable[..., None], *drawn: Any, **settings: Any) -> None:
        job.writer.write(f"figures/{name}", lambda: draw(folder / name, *drawn, **settings))

    write("sparsity_by_layer.png", run_figures.save_layer_sparsity, pruner.shares(), pruner.share)
    if history.picture is not None:  # of the last masks
        write("masks.png", drawing.save_picture, history.picture)
    if history.rows:  # a cut without training has none
        write("history.png", run_figures.save_history, rows, baseline=baseline, of=counts(pruner))


def finish(job: Context, history: History) -> dict[str, Any]:
    """Write the result, close the record, print the summary; returns the result."""
    if not job.first:
        return {}
    job.count_seconds()
    with job.watch.part("tracking"):
        _track_numbers(job, history)
        if history.picture is not None:
            job.tracker.log_image(history.picture, key=FINAL_MASKS, step=0)
    job.write_result("finished")  # from here on the job is not run again, so all else is on disk
    with job.watch.part("tracking"):
        _track_files(job)
    job.write_result("finished")  # again, with the seconds that tracking took
    job.progress.close()
    uri, unsent, page = (getattr(job.tracker, name, None) for name in ("tracking_uri", "unsent", "page"))
    print_summary(job.result, job.folder, tracking_uri=uri, unsent=bool(unsent), page=page)
    return job.result


def _track_numbers(job: Context, history: History) -> None:
    known = {**dict.fromkeys(NUMBERS), **history.last}  # a number that the last epoch has logged is not repeated
    final = {name: job.result[name] for name in NUMBERS if job.result[name] != known[name]}
    job.tracker.log_metrics(final | job.numbers, step=job.result["epochs"])
    if job.result["latency_note"] is not None:
        job.tracker.log_tags({"latency_note": job.result["latency_note"]})
    if job.result["sparsity_of"]:
        job.tracker.log_params({"sparsity_of": job.result["sparsity_of"]})


def _track_files(job: Context) -> None:
    job.track_file("result.json")
    _track_models(job)
    for path in sorted((job.folder / "figures").glob("*.png")):
        job.track_file(f"figures/{path.name}", folder="figures")
    job.tracker.finish("FINISHED")


def _track_models(job: Context) -> None:
    """The network of the job as a logged model, and the dense one if it was trained here."""
    result, chosen = job.result, job.result["choices"]
    known = {name: chosen[name] for name in ("model", "dataset", "pruner") if name in chosen}
    settings = {**known, "seed": str(result["seed"]), "config_hash": result["config_hash"]}
    if _is_trained_here(job):
        dense = {name: result[f"baseline_{name}"] for name in ("accuracy", "val_accuracy", "loss")}
        dense |= {name: result[f"{name}_dense"] for name in ("params", "macs")}
        name = _model_name(job.result["name"], "dense")
        given = {key: value for key, value in settings.items() if key != "pruner"}
        track_model(job, name, [job.folder / DENSE, job.folder / DENSE_PROGRAM], params=given, numbers=dense, step=100)
    wanted = result["target_sparsity"]
    settings |= {} if wanted is None else {"target_sparsity": f"{wanted:g}"}
    settings |= {f"budget.{kind}": f"{share:g}" for kind, share in (result["budget"] or {}).items()}
    settings |= {"sparsity_of": result["sparsity_of"]} if result["sparsity_of"] else {}
    files = [job.folder / name for name in (WEIGHTS, "pruning.json", PROGRAM, "masks.safetensors")]
    left = round(100 * (1 - result["sparsity"]))
    track_model(job, _model_name(job.result["name"]), files, params=settings, numbers=result, step=left)


def _is_trained_here(job: Context) -> bool:
    """Whether the dense network was trained by this job."""
    return bool(job.cfg.trainer.dense_epochs) and (job.result["dense"] or {}).get("source", "trained") == "trained"


def _model_name(name: str | None, instead: str | None = None) -> str:
    """The name of a logged model, which has neither spaces nor points.

    >>> _model_name("weighted 0.5, seed 0, convnet, digits", "dense"), _model_name(None)
    ('dense-seed-0-convnet-digits', 'pruned')
    """
    if name is None:
        return instead or "pruned"
    first, _, rest = name.partition(", ")
    return re.sub(r"[^a-zA-Z0-9_]+", "-", f"{instead or first}, {rest}").strip("-")[:200]


def track_model(
    job: Context,
    name: str,
    files: Sequence[Path],
    *,
    params: Mapping[str, str],
    numbers: Mapping[str, Any],
    step: int,
) -> None:
    """Add a network to the run, with those of its numbers by which networks are compared.

    Args:
        files: in the folder of the job; those that could not be written are left out.
        step: per cent that is left of what is pruned.
    """
    inside = {path: path.relative_to(job.folder).as_posix() for path in files}
    written = [path for path, known in inside.items() if path.is_file() and known not in job.writer.unwritten]
    values = {f"model_{key}": float(numbers[key]) for key in OF_MODELS if numbers.get(key) is not None}
    dataset = {"name": job.result["choices"].get("dataset", "dataset"), "digest": dataset_digest(job.cfg)}
    job.tracker.log_model(name, written, params=params, values=values, step=step, dataset=dataset)


def fail(job: Context, error: BaseException) -> None:
    """Close the record of a job that an error ends; what goes wrong here must not hide the error itself."""
    if not job.first:
        return
    job.result["error"] = last_line(error)
    try:
        job.progress.close()
        interrupted = isinstance(error, (KeyboardInterrupt, Interrupted))
        job.write_result("interrupted" if interrupted else "failed")
        if not isinstance(error, ValueError):
            what = "interrupted: " if interrupted else ""
            log.warning("%s%s", what, resume_hint(job.cfg, job.folder, job.sweep))
        if job.save_model is not None:  # what was trained is kept
            job.writer.write(WEIGHTS, job.save_model)
        job.tracker.finish("KILLED" if interrupted else "FAILED")
    except Exception:
        log.exception("the failure could not be recorded in %s", job.folder)
