"""The networks of benchmarks/zoo.py: cut at half, the masked and the cut one compute the same, also from disk.

`pytest -m zoo` cuts all whose library is there; a dozen that take a second each run always.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import zoo
from zoo_vision import Entry

sys.path.pop(0)

ALWAYS = (
    *(
        "torchvision/resnet18",
        "torchvision/squeezenet1_1",
        "torchvision/vit (3 layers)",
        "torchvision/maxvit (2 blocks)",
    ),
    *(f"transformers/{name}" for name in ("t5", "phi3", "xlnet", "deberta_v2", "siglip", "deepseek_v3")),
)


def _cases() -> Iterator[ParameterSet]:
    for name, entry in zoo.NETWORKS.items():
        library = name.partition("/")[0]
        missing = pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")
        yield pytest.param(entry, id=name, marks=[missing] if name in ALWAYS else [missing, pytest.mark.zoo])


@pytest.mark.parametrize("entry", [*_cases()])
def test_a_network_at_half(entry: Entry) -> None:
    row = zoo.measure(entry)
    assert zoo.is_right(row), row
    assert row["left"] < 0.75, row["skipped"]
