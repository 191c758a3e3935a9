"""What MLflow's page shows first: the columns, order and charts of the experiment's run table.

Kept as tags of the experiment, in the form in which MLflow's own "Save view" keeps them. A view is one entry of the
menu "Views" above the table (recent versions have it) and the link `#/experiments/<id>/runs?viewStateShareKey=<key>`
(all have it).
"""

from __future__ import annotations

import json
import re
import shlex
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gsprune.text.redact import redacted

__all__ = [
    "BEST",
    "FINAL_MASKS",
    "SWEEPS",
    "VIEW",
    "Page",
    "experiment_tags",
    "run_color",
    "run_page",
    "sweep_key",
    "sweep_page",
    "sweep_view",
    "ui_command",
]

VIEW = "mlflow.sharedViewState."  # before the key of a view in the name of an experiment's tag
BEST, SWEEPS = "gsprune-best", "gsprune-sweeps"  # the keys of the views
_PARAMS = ("pruner", "seed")
_OF = "sparsity_of"
# Validation first, which orders and colours the jobs; the test split stands beside it.
_CHOICE = "val_accuracy"
_METRICS = (_CHOICE, "accuracy", "params_nonzero", "macs", "speedup", "baseline_accuracy", "target_sparsity")
_AXES = ("target_sparsity", "params_nonzero", "macs", _CHOICE)  # what every job has; the last colours a line
_NAME, _SECTION = "attributes.`Run Name`", "gsprune"
FINAL_MASKS = "final_masks"  # the picture of a run's last masks, at step 0, where a card opens
_JOBS = "params.pruner != ''"  # leaves out the parents of sweeps, which carry values of their jobs
# In the order of the page; what has many charts is closed, and opens with a click.
_SECTIONS = (("train", True), ("val", True), ("Model metrics", False), ("where/sparsity", False), ("where/kept", False))
# Okabe and Ito's colours (2008), and some more of about the same lightness.
_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#7b4ea3", "#444444", "#8c6d31", "#a50f15", "#1b7837"),
)
_PRUNERS = (
    *("weighted", "abs", "elementwise", "magnitude", "fisher", "units_and_weights", "heads_and_neurons"),
    *("none", "random", "movement", "platon"),
)


def experiment_tags(*, time_ms: int) -> dict[str, str]:
    """The tags of a new experiment.

    >>> sorted(experiment_tags(time_ms=0))[:2]
    ['mlflow.experiment.primaryMetric.greaterIsBetter', 'mlflow.experiment.primaryMetric.name']
    """
    return {
        "mlflow.experimentKind": "custom_model_development",  # not a language model's traces
        "mlflow.experiment.primaryMetric.name": _CHOICE,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        f"{VIEW}{BEST}": _named("Jobs, best validation accuracy first", _best(_JOBS), time_ms),
        f"{VIEW}{SWEEPS}": _named("Sweeps and their jobs", _columns(), time_ms),
    }


def sweep_view(run_id: str) -> str:
    """The state of a view of the jobs of one sweep, the run of whose parent is given. It has no name, so that an
    experiment of many sweeps keeps a short menu; its link opens it."""
    return _compact(_best(f"tags.mlflow.parentRunId = '{run_id}'"))


def sweep_key(run_id: str) -> str:
    """The key of that view."""
    return f"sweep-{run_id[:12]}"


def run_color(pruner: str) -> str:
    """The colour of a pruner's runs in charts, the same in every sweep.

    >>> run_color("weighted"), run_color("mine") == run_color("mine")
    ('#0072b2', True)
    """
    known = _PRUNERS.index(pruner) if pruner in _PRUNERS else zlib.crc32(pruner.encode())
    return _COLOURS[known % len(_COLOURS)]


def _columns() -> dict[str, Any]:
    columns = [*(f"params.`{name}`" for name in (*_PARAMS, _OF)), *(f"metrics.`{name}`" for name in _METRICS)]
    wide = {"columnOrder": [_NAME, *columns], "columnWidths": {_NAME: 340}}  # 190 would cut names off before the seed
    return {"selectedColumns": columns, "runsHiddenMode": "SHOW_ALL", **wide}


def _best(only: str) -> dict[str, Any]:
    order = {"orderByKey": f"metrics.`{_CHOICE}`", "orderByAsc": False, "searchFilter": only}
    return {**_columns(), **order, **_charts()}


def _named(name: str, state: Mapping[str, Any], time_ms: int) -> str:
    """The state stands there twice: as text for the menu, and as keys for versions that know no names of views."""
    return _compact({"name": name, "createdAt": time_ms, "updatedAt": time_ms, "state": _compact(state), **state})


def _compact(state: Mapping[str, Any]) -> str:
    return json.dumps(state, separators=(",", ":"))  # a tag holds 5,000 characters


def _charts() -> dict[str, Any]:
    """Charts whose colours are the pruners' (`run_color`); parallel coordinates have those of the last axis."""
    # parameters that are not zero: the one axis that means the same for weights and for units
    scatter = {"xaxis": {"key": "params_nonzero", "type": "METRIC"}, "yaxis": {"key": _CHOICE, "type": "METRIC"}}
    parallel = {"selectedParams": ["pruner"], "selectedMetrics": list(_AXES), "showAllRuns": True}
    masks = {"imageKeys": [FINAL_MASKS], "step": 0, "showRunParams": False}
    return {
        "compareRunCharts": [_chart("SCATTER", **scatter), _chart("PARALLEL", **parallel), _chart("IMAGE", **masks)],
        "compareRunSections": [_section(_SECTION, "Sweep", True), *(_section(*_uuid(n), o) for n, o in _SECTIONS)],
        "isAccordionReordered": True,  # else the section would go below the generated ones
    }


def _uuid(name: str) -> tuple[str, str]:
    return f"{_SECTION}-{name.replace(' ', '-')}", name


def _section(uuid: str, name: str, is_open: bool) -> dict[str, Any]:
    own = name == "Sweep"
    place = {"uuid": uuid, "name": name, "display": is_open, "isReordered": True}
    wide = {"columns": 2, "cardHeight": 360} if own else {}
    return {**place, "deleted": False, "isGenerated": not own, **wide}


def _chart(kind: str, **settings: Any) -> dict[str, Any]:
    place = {"uuid": f"{_SECTION}-{kind.lower()}", "metricSectionId": _SECTION, "runsCountToCompare": 100}
    return {"type": kind, **place, "deleted": False, "isGenerated": False, **settings}


# --- addresses ---------------------------------------------------------------------------------------------

_LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` listens
_TRAINING = "workflowType=machine_learning"  # MLflow 3 opens its menu of prompts and traces without


@dataclass(frozen=True)
class Page:
    """A page of MLflow: its address, and the command that has to run for it; "" where there is none."""

    address: str = ""
    command: str = ""


def run_page(note: Mapping[str, Any]) -> Page:
    """The page of the run that a record (`tracking.json`) names.

    >>> run_page({"tracking_uri": "http://mlflow.example:5000", "experiment_id": "3", "run_id": "ab12"}).address
    'http://mlflow.example:5000/#/experiments/3/runs/ab12?workflowType=machine_learning'
    """
    run_id = note.get("run_id")
    if not (isinstance(run_id, str) and re.fullmatch("[0-9a-zA-Z]{1,64}", run_id)):
        return Page()
    return _page(note, f"/runs/{run_id}?{_TRAINING}")


def sweep_page(note: Mapping[str, Any]) -> Page:
    """The page of the jobs of a sweep, in the view that its parent run has made; without a run, of all jobs.

    >>> page = sweep_page({"tracking_uri": "sqlite:///mlflow.db", "experiment_id": "1"})
    >>> print(page.address, page.command, sep="\\n")
    http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=gsprune-best
    mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1
    """
    run_id = note.get("run_id")
    known = isinstance(run_id, str) and re.fullmatch("[0-9a-zA-Z]{1,64}", run_id)
    key = sweep_key(str(run_id)) if known else BEST
    return _page(note, f"/runs?{_TRAINING}&viewStateShareKey={key}")


def _page(note: Mapping[str, Any], route: str) -> Page:
    uri, experiment = note.get("tracking_uri"), note.get("experiment_id")
    if not (isinstance(uri, str) and isinstance(experiment, str) and re.fullmatch("[0-9]{1,40}", experiment)):
        return Page()
    served = uri.startswith(("http://", "https://"))
    base = redacted(uri).rstrip("/") if served else _LOCAL
    return Page(f"{base}/#/experiments/{experiment}{route}", "" if served else ui_command(uri))


def ui_command(tracking_uri: str) -> str:
    """The command that opens MLflow's page, for this machine only; of a server its address.

    >>> ui_command("sqlite:////data/mlflow.db")
    'mlflow ui --backend-store-uri sqlite:////data/mlflow.db --host 127.0.0.1'
    >>> ui_command("http://tracking.example:5000")
    'http://tracking.example:5000'
    """
    if tracking_uri.startswith(("http://", "https://")):
        return redacted(tracking_uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)} --host 127.0.0.1"
