"""Names as they were work, or say what they are called now."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from gsprune.moved import MOVED, PACKAGES, RENAMED, check_overrides

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("old", [*MOVED, *PACKAGES])
def test_every_old_module_says_where_it_is_now(old: str) -> None:
    homes = {**MOVED, **PACKAGES}[old].split()
    for home in homes:
        import_module(f"gsprune.{home}")
    if old in MOVED:
        sys.modules.pop(f"gsprune.{old}", None)
        with pytest.warns(FutureWarning, match=rf"gsprune\.{old} has moved: use gsprune\.{homes[0]}"):
            import_module(f"gsprune.{old}")
        del sys.modules[f"gsprune.{old}"]  # so that the next import warns too


def test_every_former_name_is_another_now() -> None:
    modules = [import_module(f"gsprune.{home}") for homes in (MOVED | PACKAGES).values() for home in homes.split()]
    for names in RENAMED.values():
        for name in names.split():
            assert any(hasattr(module, name) for module in modules), name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from gsprune.names import told as of_names  # type: ignore[import-not-found]
        from gsprune.redact import told  # type: ignore[import-not-found]
    assert (of_names.__name__, told.__name__) == ("lines_by_reason", "redacted_message")


@pytest.mark.parametrize(
    "overrides",
    [
        ("pruner=mine", "pruner.pruners.0.target_sparsity=0.4"),  # a group of the user's own may have the former key
        ("pruner=units_and_weights", "pruner.rules.0.target_sparsity=0.4"),
        ("pruner=units_and_weights", "+note='pruner.pruners.0'"),
    ],
)
def test_overrides_of_today_are_left_alone(overrides: tuple[str, ...]) -> None:
    check_overrides(overrides)


def test_the_command_says_the_new_key_of_a_rule() -> None:
    overrides = ("-m", "pruner=abs,heads_and_neurons", "pruner.pruners.1.kinds=[heads]")
    done = subprocess.run([sys.executable, ROOT / "train.py", *overrides], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "pruner.pruners.1.kinds is called pruner.rules.1.kinds now\n"


def test_an_old_module_whose_name_is_a_function_today_is_called_as_that(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        results, shrink = (import_module(f"gsprune.{name}") for name in ("results", "shrink"))
    with pytest.raises(ValueError, match="no"):
        results(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="is a module"):
        shrink()
