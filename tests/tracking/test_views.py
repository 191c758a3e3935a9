"""What an experiment's run table shows first: tags that MLflow accepts, naming what jobs really log."""

from __future__ import annotations

import json

from gsprune.app.configuration import NUMBERS
from gsprune.tracking.views import BEST, SWEEPS, experiment_tags


def test_each_view_is_a_tag_that_fits_and_holds_its_state_in_both_forms() -> None:
    tags = experiment_tags(time_ms=7)
    for key in (BEST, SWEEPS):
        text = tags[f"mlflow.sharedViewState.{key}"]
        assert len(text) < 5000  # MLflow's limit for a tag
        view = json.loads(text)
        assert (view["createdAt"], view["updatedAt"]) == (7, 7)
        state = json.loads(view["state"])
        assert state == {name: value for name, value in view.items() if name in state}
        assert state["columnOrder"][1:] == state["selectedColumns"]


def test_the_columns_are_numbers_of_a_result_and_choices_of_a_job() -> None:
    (view,) = (json.loads(tag) for name, tag in experiment_tags(time_ms=0).items() if name.endswith(BEST))
    columns = [column.split("`")[1] for column in view["selectedColumns"]]
    assert columns[:3] == ["pruner", "seed", "sparsity_of"]
    assert set(columns[3:]) <= set(NUMBERS)
    parallel, scatter, masks = view["compareRunCharts"]
    assert parallel["selectedParams"] == ["pruner", "seed"]
    assert set(parallel["selectedMetrics"]) <= set(NUMBERS)
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("params_nonzero", "val_accuracy")
    assert masks["imageKeys"] == ["masks"]


def test_what_orders_the_runs_is_validation_and_the_test_split_stands_beside_it() -> None:
    tags = experiment_tags(time_ms=0)
    assert tags["mlflow.experiment.primaryMetric.name"] == "val_accuracy"
    best = json.loads(tags[f"mlflow.sharedViewState.{BEST}"])
    assert best["orderByKey"] == "metrics.`val_accuracy`"
    assert best["compareRunCharts"][0]["selectedMetrics"][-1] == "val_accuracy"  # gives a line its colour
    for name in (BEST, SWEEPS):
        columns = json.loads(tags[f"mlflow.sharedViewState.{name}"])["selectedColumns"]
        assert columns.index("metrics.`accuracy`") == columns.index("metrics.`val_accuracy`") + 1
