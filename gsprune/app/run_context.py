"""MLflow's entry point `mlflow.run_context_provider`: what Hydra has composed, as tags of any run in a Hydra job.

MLflow imports this file whenever it is imported itself: nothing heavy is imported before a run begins.
"""

from __future__ import annotations

import sys

from mlflow.tracking.context.abstract_context import RunContextProvider

__all__ = ["HydraRunContext"]


class HydraRunContext(RunContextProvider):
    """Tags of every run that `mlflow.start_run` begins in a Hydra job, whoever calls it.

    `hydra.overrides`, `hydra.job` (its name), `group.<group>` for each choice, `hydra.sweep.dir` and `hydra.job.num` in
    a sweep, and of the repository that the command was given in `mlflow.source.git.commit` and `git.dirty`. Secrets in
    overrides are redacted.

    >>> HydraRunContext().in_context()
    False
    """

    def in_context(self) -> bool:
        if "hydra.core.hydra_config" not in sys.modules:
            return False
        from hydra.core.hydra_config import HydraConfig

        return HydraConfig.initialized()

    def tags(self) -> dict[str, str]:
        from hydra.core.hydra_config import HydraConfig

        from gsprune.app.configuration import hydra_tags
        from gsprune.sweeps.sweep_dir import current_sweep
        from gsprune.tracking.mlflow_names import fit_tags

        found = {"hydra.job": str(HydraConfig.get().job.name), **hydra_tags()}
        if (sweep := current_sweep()) is not None:
            found |= {"hydra.sweep.dir": str(sweep.directory), "hydra.job.num": str(HydraConfig.get().job.num)}
        return fit_tags(found)
