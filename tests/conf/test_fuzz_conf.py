"""Random overrides over every group: the job runs, or one sentence says why not.

`pytest -m long` tries 500; `python benchmarks/faults_config.py` tries others and counts them.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing_conf import GROUPS, RARE, ROOT, attempt, combination
from hydra.core.global_hydra import GlobalHydra

NOT_DRAWN = {"mlflow", "resnet50", "digits_sweep", "cifar10_resnet18_weighted", "imagenet_resnet50_elementwise"}


@pytest.fixture(autouse=True)
def _by_itself(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("tries", [pytest.param(30, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)])
def test_random_overrides_run_or_are_refused_in_a_sentence(tries: int, tmp_path: Path) -> None:
    seen, wrong = {"run": 0, "composed": 0, "refused": 0}, []
    for seed in range(tries):
        overrides = combination(seed)
        try:
            kind, _ = attempt(overrides, tmp_path / str(seed))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(f"{' '.join(overrides)}\n    {type(error).__name__}: {error} ({at.name}, {at.filename})")
        else:
            seen[kind] += 1
        shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
    assert not wrong, "\n".join(wrong)
    assert min(seen.values()) >= tries // 12, seen  # the draw is worth something


def test_every_option_of_every_group_is_drawn() -> None:
    folders = (ROOT / "conf", ROOT / "gsprune" / "conf")
    for group in [*GROUPS, "+experiment"]:
        found = {path.stem for folder in folders for path in (folder / group.lstrip("+")).glob("*.yaml")}
        drawn = {*GROUPS.get(group, ()), *RARE[group]}
        assert found - drawn - NOT_DRAWN == set(), group
