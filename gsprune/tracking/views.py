"""What MLflow's page shows first: the columns, order and charts of the experiment's run table.

Kept as tags of the experiment, in the form in which MLflow's own "Save view" keeps them. A view is one entry of the
menu "Views" above the table (recent versions have it) and the link `#/experiments/<id>/runs?viewStateShareKey=<key>`
(all have it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["BEST", "SWEEPS", "experiment_tags"]

BEST, SWEEPS = "gsprune-best", "gsprune-sweeps"  # the keys of the views
_PARAMS = ("pruner", "seed")
_OF = "sparsity_of"
# Validation first, which orders and colours the jobs; the test split stands beside it.
_CHOICE = "val_accuracy"
_METRICS = (_CHOICE, "accuracy", "params_nonzero", "macs", "speedup", "baseline_accuracy", "target_sparsity")
_AXES = ("params_nonzero", "macs", _CHOICE)  # what every job has; the last one gives a line its colour
_NAME, _SECTION = "attributes.`Run Name`", "gsprune"


def experiment_tags(*, time_ms: int) -> dict[str, str]:
    """The tags of a new experiment.

    >>> sorted(experiment_tags(time_ms=0))[:2]
    ['mlflow.experiment.primaryMetric.greaterIsBetter', 'mlflow.experiment.primaryMetric.name']
    """
    columns = [*(f"params.`{name}`" for name in (*_PARAMS, _OF)), *(f"metrics.`{name}`" for name in _METRICS)]
    wide = {"columnOrder": [_NAME, *columns], "columnWidths": {_NAME: 300}}  # 190 would cut names off before the seed
    sweeps: dict[str, Any] = {"selectedColumns": columns, "runsHiddenMode": "SHOW_ALL", **wide}
    best = {**sweeps, "orderByKey": f"metrics.`{_CHOICE}`", "orderByAsc": False, **_charts()}
    return {
        "mlflow.experimentKind": "custom_model_development",  # not a language model's traces
        "mlflow.experiment.primaryMetric.name": _CHOICE,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        f"mlflow.sharedViewState.{BEST}": _view("Jobs, best validation accuracy first", best, time_ms),
        f"mlflow.sharedViewState.{SWEEPS}": _view("Sweeps and their jobs", sweeps, time_ms),
    }


def _view(name: str, state: Mapping[str, Any], time_ms: int) -> str:
    """The state stands there twice: as text for the menu, and as keys for versions that know no names of views."""
    return json.dumps({"name": name, "createdAt": time_ms, "updatedAt": time_ms, "state": json.dumps(state), **state})


def _charts() -> dict[str, Any]:
    parallel = {"selectedParams": list(_PARAMS), "selectedMetrics": list(_AXES), "showAllRuns": True}
    # parameters that are not zero: the one axis that means the same for weights and for units
    scatter = {"xaxis": {"key": "params_nonzero", "type": "METRIC"}, "yaxis": {"key": _CHOICE, "type": "METRIC"}}
    masks = {"imageKeys": ["masks"], "step": 0, "showRunParams": False}
    section = {"uuid": _SECTION, "name": "Sweep", "display": True, "isReordered": True}
    return {
        "compareRunCharts": [_chart("PARALLEL", **parallel), _chart("SCATTER", **scatter), _chart("IMAGE", **masks)],
        "compareRunSections": [{**section, "deleted": False, "isGenerated": False}],
        "isAccordionReordered": True,  # else the section would go below the generated ones
    }


def _chart(kind: str, **settings: Any) -> dict[str, Any]:
    place = {"uuid": f"{_SECTION}-{kind.lower()}", "metricSectionId": _SECTION, "runsCountToCompare": 100}
    return {"type": kind, **place, "deleted": False, "isGenerated": False, **settings}
