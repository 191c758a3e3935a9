"""What an experiment's run table shows first: tags that MLflow accepts, naming what jobs really log."""

from __future__ import annotations

import json

from gsprune.app.configuration import NUMBERS
from gsprune.tracking.views import (
    BEST,
    SWEEPS,
    experiment_tags,
    run_color,
    run_page,
    sweep_key,
    sweep_page,
    sweep_view,
)


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
    scatter, parallel, masks = view["compareRunCharts"]
    assert parallel["selectedParams"] == ["pruner"]  # a seed is no axis
    assert set(parallel["selectedMetrics"]) <= set(NUMBERS)
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("params_nonzero", "val_accuracy")
    assert (masks["imageKeys"], masks["step"]) == (["final_masks"], 0)
    assert [(s["name"], s["display"]) for s in view["compareRunSections"]] == [
        *(("Sweep", True), ("train", True), ("val", True)),
        *(("Model metrics", False), ("where/sparsity", False), ("where/kept", False)),
    ]


def test_what_orders_the_runs_is_validation_and_the_test_split_stands_beside_it() -> None:
    tags = experiment_tags(time_ms=0)
    assert tags["mlflow.experiment.primaryMetric.name"] == "val_accuracy"
    best = json.loads(tags[f"mlflow.sharedViewState.{BEST}"])
    assert best["orderByKey"] == "metrics.`val_accuracy`"
    assert best["compareRunCharts"][1]["selectedMetrics"][-1] == "val_accuracy"  # gives a line its colour
    for name in (BEST, SWEEPS):
        columns = json.loads(tags[f"mlflow.sharedViewState.{name}"])["selectedColumns"]
        assert columns.index("metrics.`accuracy`") == columns.index("metrics.`val_accuracy`") + 1


def test_a_sweep_has_a_view_of_its_own_whose_link_opens_it_and_which_no_menu_lists() -> None:
    view = json.loads(sweep_view("ab" * 16))
    assert view["searchFilter"] == f"tags.mlflow.parentRunId = '{'ab' * 16}'"
    assert "name" not in view
    note = {"tracking_uri": "http://ann:pw@host:5000/", "experiment_id": "7", "run_id": "ab" * 16}
    page = sweep_page(note)
    route = f"/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey={sweep_key('ab' * 16)}"
    assert (page.address.endswith(f"host:5000{route}"), page.command) == (True, "")
    assert "pw" not in page.address


def test_a_record_that_names_no_page_gives_none() -> None:
    whole = {"tracking_uri": "sqlite:///mlflow.db", "experiment_id": "1", "run_id": "ab12"}
    assert run_page(whole).address == "http://127.0.0.1:5000/#/experiments/1/runs/ab12?workflowType=machine_learning"
    spoiled = (
        {"run_id": "a/../b"},
        {"run_id": None},
        {"experiment_id": "x"},
        {"experiment_id": 1},
        {"tracking_uri": 3},
    )
    for wrong in spoiled:
        assert run_page({**whole, **wrong}).address == ""


def test_pruners_have_colours_of_their_own() -> None:
    names = ("weighted", "abs", "elementwise", "magnitude", "fisher", "none", "random", "movement", "platon")
    assert len({run_color(name) for name in names}) == len(names)
