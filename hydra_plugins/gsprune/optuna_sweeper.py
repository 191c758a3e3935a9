"""Hydra's sweeper `hydra/sweeper=optuna`: Optuna proposes the jobs of a search, a batch at a time.

Hydra imports this file to list its plugins: Optuna is imported when a search begins.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


class OptunaSweeper(Sweeper):
    """Asks an Optuna study for jobs, launches them, tells it what they returned.

    Args:
        sampler: which way to search, a configuration with a `_target_`.
        direction: minimize or maximize, or a list with one of them for each number that a job returns.
        n_trials: jobs of this search.
        n_jobs: jobs that are proposed, and launched, at a time.
        max_failure_rate: share of a batch that may fail; above it the search ends with the job's error.
        storage: where the study is kept, an address of SQLAlchemy; None: in memory.
        study_name: of a study in the storage, which goes on if it is there.
        params: key -> values, in the words of Hydra's command line; an override of the command replaces a line.
    """

    def __init__(
        self,
        *,
        sampler: DictConfig,
        direction: Any,
        n_trials: int,
        n_jobs: int,
        max_failure_rate: float,
        storage: str | None,
        study_name: str | None,
        params: DictConfig | None,
    ) -> None:
        self.sampler, self.storage, self.study_name = sampler, storage, study_name
        self.directions = [direction] if isinstance(direction, str) else [str(each) for each in direction]
        self.n_trials, self.n_jobs, self.max_failure_rate = n_trials, n_jobs, max_failure_rate
        self.params: dict[Any, Any] = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config = config
        self._launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        study, launcher = self._study(), self._launcher
        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parsed = OverridesParser.create().parse_overrides(lines)
        overrides = {override.get_key_element(): override for override in parsed}  # the last one counts
        searched = {key: distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
        fixed = [str(override.input_line) for override in overrides.values() if not override.is_sweep_override()]
        for first in range(0, self.n_trials, self.n_jobs):
            trials = [study.ask(searched) for _ in range(min(self.n_jobs, self.n_trials - first))]
            jobs = [[*(f"{key}={value}" for key, value in trial.params.items()), *fixed] for trial in trials]
            self._tell(study, trials, launcher.launch(jobs, initial_job_idx=first))
        self._report(study)

    def _study(self) -> Any:
        from gsprune.extras import MissingExtraError, need
        from gsprune.settings.instantiation import make

        try:
            optuna = need("optuna")
        except MissingExtraError as error:
            raise CompactHydraException(str(error)) from None
        study = optuna.create_study(
            sampler=make(self.sampler),
            directions=self.directions,
            storage=self.storage,
            study_name=self.study_name,
            load_if_exists=True,
        )
        log.info("Study %s, %s, %s", study.study_name, type(study.sampler).__name__, " and ".join(self.directions))
        return study

    def _tell(self, study: Any, trials: Sequence[Any], returns: Sequence[JobReturn]) -> None:
        from optuna.trial import TrialState

        failed = []
        for trial, job in zip(trials, returns, strict=True):
            try:
                values = values_of(job.return_value, len(self.directions))
            except Exception as error:  # whatever the job raised
                log.warning("Trial %d failed: %s", trial.number, error)
                study.tell(trial, state=TrialState.FAIL)
                failed.append(error)
            else:
                study.tell(trial, values)
        if len(failed) > self.max_failure_rate * len(trials):
            raise failed[0]

    def _report(self, study: Any) -> None:
        """Log the best trials and write them into optimization_results.yaml."""
        found: dict[str, Any] = {"name": "optuna"}
        best = study.best_trials
        for trial in best:
            log.info("Best: %s with %s", ", ".join(map(str, trial.values)), trial.params)
        if len(self.directions) > 1:
            found["solutions"] = [{"params": trial.params, "values": list(trial.values)} for trial in best]
        elif best:
            found |= {"best_params": best[0].params, "best_value": best[0].value}
        OmegaConf.save(OmegaConf.create(found), Path(self._config.hydra.sweep.dir) / "optimization_results.yaml")


def values_of(returned: Any, count: int) -> list[float]:
    """That many numbers; ValueError where the job returned something else.

    >>> values_of(0.5, 1), values_of((0.5, 10), 2)
    ([0.5], [0.5, 10.0])
    """
    given = returned if isinstance(returned, (list, tuple)) else [returned]
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError):
        values = []
    if len(values) != count or any(math.isnan(value) for value in values):
        raise ValueError(f"the job returned {returned}: it must return {count} numbers, one for each direction")
    return values


def distribution(override: Override) -> Any:
    """What Optuna may choose from, of an override with choice(...), interval(...), range(...) or a list."""
    kinds: Any = import_module("optuna.distributions")
    value: Any = override.value()
    if override.is_interval_sweep():
        kind = kinds.IntDistribution if type(value.start) is type(value.end) is int else kinds.FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    if isinstance(value, RangeSweep) and not value.shuffle and (found := list(value.range())):
        kind = kinds.IntDistribution if all(isinstance(each, int) for each in found) else kinds.FloatDistribution
        return kind(min(found), max(found), step=abs(value.step))
    return kinds.CategoricalDistribution(list(override.sweep_iterator(transformer=Transformer.encode)))
