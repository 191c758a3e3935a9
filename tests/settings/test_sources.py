"""The code behind a name: what changes its mark, and what does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gsprune.settings.sources import code, versions


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package whose class is defined elsewhere than where its name leads, on a layer of yet another module."""
    files = {
        "__init__.py": "from .nets import Net, make\n",
        "nets/__init__.py": "from pack_of_this_test.nets.deep import Net\nfrom .deep import make",
        "nets/deep.py": "import torch\nfrom .. import layers\nclass Net: ...\ndef make(): import beside_of_this_test",
        "layers.py": "WIDTH = 4\n",
        "unused.py": "",
        "../beside_of_this_test.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "pack_of_this_test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "pack_of_this_test"
    for name in [name for name in sys.modules if "of_this_test" in name]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["Net", "make", "nets.Net", "nets.deep.Net"])
@pytest.mark.parametrize(
    ("edited", "counts"),
    [
        ("__init__.py", True),
        ("nets/__init__.py", True),
        ("nets/deep.py", True),
        ("layers.py", True),
        ("../beside_of_this_test.py", True),
        ("unused.py", False),
    ],
)
def test_what_is_edited_counts_where_it_is_imported(package: Path, name: str, edited: str, counts: bool) -> None:
    before = code(f"pack_of_this_test.{name}")
    assert before is not None
    assert code(f"pack_of_this_test.{name}") == before
    with (package / edited).open("a") as file:
        file.write("# edited\n")
    assert (code(f"pack_of_this_test.{name}") != before) == counts


def test_what_the_process_has_imported_besides_does_not_count(package: Path) -> None:
    before = code("pack_of_this_test.Net")
    __import__("pack_of_this_test.unused")
    (package / "unused.py").write_text("# edited")
    assert code("pack_of_this_test.Net") == before


def test_where_modules_are_imported_by_computed_names_all_of_them_count(package: Path) -> None:
    with (package / "layers.py").open("a") as file:
        file.write("import importlib\nimportlib.import_module(__package__ + '.unused')\n")
    before = code("pack_of_this_test.Net")
    (package / "unused.py").write_text("# edited")
    assert code("pack_of_this_test.Net") != before


def test_a_class_of_a_module_that_was_put_in_place_by_hand_counts(package: Path) -> None:
    sys.modules["alias_of_this_test"] = __import__("pack_of_this_test.layers").layers
    before = code("alias_of_this_test.WIDTH")
    assert before is not None
    (package / "layers.py").write_text("WIDTH = 5\n")
    assert code("alias_of_this_test.WIDTH") != before


def test_a_broken_module_is_somebody_elses_to_tell(package: Path) -> None:
    (package / "layers.py").write_text("def (")
    assert code("pack_of_this_test.Net") is not None
    assert code("no_such_package.Net") is None


def test_what_is_installed_is_told_by_its_version(package: Path) -> None:
    assert {code(name) for name in ("torch.optim.SGD", "torchvision.models.resnet18", "functools.partial")} == {None}
    assert code("gsprune.zoo.models.convnet") is None
    assert versions(["torchvision.models.resnet18", "functools.partial", "gsprune.zoo.models.convnet"]).keys() == {
        "torchvision"
    }
    assert versions(["pack_of_this_test.Net"]).keys() == {"torch"}  # which it imports
    assert code("pluggy.PluginManager") is not None  # installed, and nothing that gsprune requires
