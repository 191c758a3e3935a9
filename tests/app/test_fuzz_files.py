"""Every kind of file that gsprune reads, spoiled again and again: it loads, or one sentence says why not.

Never a crash, a hang, a huge allocation, a process that is started, or a file opened elsewhere. `pytest -m long` spoils
each a thousand times; `python benchmarks/faults_files.py` tries others and counts them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from fuzzing import KINDS, forget, fuzz, outcome

SLOW = ("the ancestor's YAML", "texts, CSV", "result.json", "sweep.json", "tracking.json", "overrides.yaml")
LEFT_OUT = (
    "result.json",
    "sweep.json",
    "tracking.json",
    "overrides.yaml",
    "metrics.jsonl",
    "outbox.jsonl",
)  # what is bad, in silence
EXAMPLES = [
    *(pytest.param(kind, 60 if kind in SLOW else 200, marks=pytest.mark.slow) for kind in KINDS),
    *(pytest.param(kind, 1000, marks=pytest.mark.long) for kind in KINDS),
]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited the way Linux does")


@pytest.fixture(scope="module", autouse=True)
def _leaving_nothing() -> Iterator[None]:
    yield
    forget()


@pytest.mark.parametrize(("kind", "examples"), EXAMPLES)
def test_a_spoiled_file_loads_or_is_refused_in_one_sentence(kind: str, examples: int) -> None:
    assert outcome(kind, []) == "clean"
    seen = fuzz(kind, examples, repeatable=True)
    assert sum(seen.values()) >= examples
    assert seen["clean"] > 0
    assert (seen["refused"] > 0) != (kind in LEFT_OUT)


@pytest.mark.parametrize("value", ["9" * 400, '"../0"', "1e400", '{"a": 1}'])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].structure == "json"])
def test_every_value_of_a_file_in_turn_may_be_any_other(kind: str, value: str) -> None:
    seen = {outcome(kind, [("replace", place / 20, value)]) for place in range(20)}
    assert seen <= {"clean", "refused"}
