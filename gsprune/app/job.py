"""One job: train a dense network, prune it, measure both, write everything down.

`train.py` calls `run` with the composed configuration. A job is the list of stages in `_stages`; each takes what the
stages before it return. A stage whose output is on disk reads it: an interrupted job resumes by running the same list.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from gsprune import collectives
from gsprune.app.beginning import facts
from gsprune.app.configuration import build, check_objective, check_plan, from_command, is_timed
from gsprune.app.cut_settings import check_mode, is_cut, wanted
from gsprune.app.memory import explain_out_of_memory
from gsprune.app.output_dir import finished_here, finished_in_sweep, locked
from gsprune.app.processes import for_torchrun, run_in_processes, run_under_torchrun
from gsprune.app.stages.auditing import audit_scores, check_audit, is_audited
from gsprune.app.stages.checkpoint import JobCheckpoints
from gsprune.app.stages.context import Context
from gsprune.app.stages.cutting import cut_network
from gsprune.app.stages.dense import train_dense
from gsprune.app.stages.history import History
from gsprune.app.stages.lifecycle import fail, finish, mark_running, open_record, write_files
from gsprune.app.stages.measuring import measure
from gsprune.app.stages.pruning import build_pruning_phase, prune, score
from gsprune.app.stages.setup import check_pruning, check_seed, check_teacher, load_weights, set_up
from gsprune.app.stages.training import Training
from gsprune.files.disk import write_json
from gsprune.forecast import predict
from gsprune.forecast.plan import PruningPlan
from gsprune.settings.hydra_files import redact_files
from gsprune.settings.identity import scores_path
from gsprune.sweeps.sweep_dir import Sweep, current_sweep
from gsprune.training import launcher

__all__ = ["load_weights", "rehearse", "run", "show_plan"]

# A rehearsal runs on the CPU and compiles nothing: no check depends on what is faster.
REHEARSED = {
    **dict.fromkeys(("compile", "fused", "deterministic"), False),
    **{"device": "cpu", "precision": "fp32", "progress": "none"},
}


def run(cfg: DictConfig, *, output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Run the job that `cfg` describes; return what it also writes to `result.json`.

    A job that has finished before, in its folder or in any of its sweep, does not run again: its result is returned. A
    job that was interrupted or killed resumes from the newest checkpoint in its folder. On any exception `result.json`
    says `failed` (`interrupted` after SIGTERM or Ctrl-C) with the last line of the error, and the tracker is closed.

    Raises:
        ValueError: a mistake in the configuration, in one sentence.
        Interrupted: SIGTERM or SIGINT has come; the step was finished and a checkpoint written.
    """
    folder, sweep, cfg = Path(output_dir).absolute(), current_sweep(), from_command(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    if HydraConfig.initialized():
        redact_files(HydraConfig.instance().cfg)  # type: ignore[arg-type]
    cfg = for_torchrun(cfg, sweep) if launcher.under_torchrun() else cfg
    if sweep is None:
        found = finished_here(cfg, folder)
        return _start(cfg, folder, None) if found is None else found
    with sweep.lock(f"job {sweep.name_of(folder)}").held(waiting_for="that runs this job"):
        found = finished_in_sweep(cfg, folder, sweep)
        return _start(cfg, folder, sweep) if found is None else found


def show_plan(cfg: DictConfig, *, output_dir: str | os.PathLike[str]) -> PruningPlan:
    """Print what the pruner of this job would do, and write it to `plan.json`; nothing is trained or tracked.

    Raises:
        ValueError: a mistake in the configuration, in one sentence.
    """
    folder = Path(output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    job = Context(from_command(cfg), folder)
    with explain_out_of_memory(job.cfg, job.result):
        setup = set_up(job)
        pruner = setup.build_pruning()[-1]
        planned = predict.plan(setup.model, pruner, setup.example)
    print(planned)
    job.writer.write("plan.json", lambda: write_json(folder / "plan.json", planned.to_json()))
    return planned


def rehearse(cfg: DictConfig, *, here: bool) -> None:
    """Refuse what the job would refuse before its training: the stages up to the first that trains or writes.

    Args:
        here: the job will run on this machine, so its device, its data and its network are checked too (on the CPU).

    Raises:
        ValueError: a mistake in the configuration, in one sentence.
    """
    job = Context(from_command(cfg), Path.cwd())
    cfg = job.cfg
    check_plan(cfg)
    check_seed(job)
    if not here:
        OmegaConf.update(cfg, "trainer.device", "cpu")
    check_objective(cfg.objective, trainer := build(cfg.trainer))
    check_mode(cfg)
    is_audited(cfg)
    check_teacher(cfg, trainer)
    for group in ("pruner", "optimizer", "lr_schedule"):
        build(cfg[group])
    if here and not is_timed(cfg.pruner):  # which takes seconds of measuring
        for key, value in REHEARSED.items():
            OmegaConf.update(cfg, f"trainer.{key}", value)
        scores = cfg.pruner.get("scores")
        if scores is not None and not scores_path(scores).is_file():
            cfg.pruner.scores = None  # of another run: only the job fetches them
        setup = set_up(job)
        check_audit(cfg, setup, check_pruning(job, setup))


def _start(cfg: DictConfig, folder: Path, sweep: Sweep | None) -> dict[str, Any]:
    if launcher.under_torchrun():
        return run_under_torchrun(_run, cfg, folder)
    if cfg.trainer.devices == cfg.trainer.nodes == 1:
        return _run(cfg, folder, sweep)
    return run_in_processes(_run, cfg, folder, sweep)


def _run(cfg: DictConfig, folder: Path, sweep: Sweep | None) -> dict[str, Any]:
    """The job, in each of its processes; the result of the first."""
    job = Context(cfg, folder, sweep)
    with job.stop, locked(folder) if job.first else contextlib.nullcontext():
        try:
            with explain_out_of_memory(job.cfg, job.result):
                return collectives.broadcast(_stages(job))
        except BaseException as error:
            launcher.undisturbed()
            fail(job, error)
            raise


def _stages(job: Context) -> dict[str, Any]:
    """The stages of a job, in order."""
    before = mark_running(job)
    setup = set_up(job)
    history = History(job, setup)
    checkpoints = JobCheckpoints(job, setup, history)
    checkpoints.find(resume=setup.trainer.resume == "auto" and before.get("status") != "finished")
    pruner = check_pruning(job, setup)
    check_audit(job.cfg, setup, pruner)
    open_record(job, checkpoints, history, before)
    if job.first:
        job.progress.begin(list(facts(setup, pruner)))
    del pruner  # it is built anew on the trained network
    training = Training(job, setup, history, checkpoints)
    dense = train_dense(training)
    if is_cut(job.cfg):
        audit_scores(training, dense, None)
        phase = cut_network(training, dense)
    else:
        phase = build_pruning_phase(training, dense)
        audit_scores(training, dense, phase.pruner)
        score(training, phase, dense)
    prune(training, phase)
    measure(job, setup, history, dense, phase.pruner)
    if is_cut(job.cfg):
        job.result |= wanted(job.cfg)
    write_files(job, setup, history, phase.pruner, dense=dense)
    return finish(job, history)
