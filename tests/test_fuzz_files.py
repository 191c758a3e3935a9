"""Every kind of file that gsprune reads, spoiled a thousand times: it loads, or one sentence says why not.

Never a crash, a hang, a huge allocation, a process that is started, or a file opened elsewhere. GSPRUNE_FUZZ=1000 tries
as many also of the kinds that are slow to read, other ones each time; `python benchmarks/faults_files.py` counts them.
"""

from __future__ import annotations

import os
import sys

import pytest
from fuzzing import KINDS, fuzz, outcome

EXAMPLES = int(os.environ.get("GSPRUNE_FUZZ", "1000"))
SLOW = ("the ancestor's YAML", "texts, CSV", "result.json", "sweep.json", "tracking.json", "overrides.yaml")
LEFT_OUT = (
    "result.json",
    "sweep.json",
    "tracking.json",
    "overrides.yaml",
    "metrics.jsonl",
    "unsent.jsonl",
)  # what is bad, in silence
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited the way Linux does")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_file_loads_or_is_refused_in_one_sentence(kind: str) -> None:
    assert outcome(kind, []) == "clean"
    repeatable = "GSPRUNE_FUZZ" not in os.environ
    wanted = EXAMPLES // 4 if repeatable and kind in SLOW else EXAMPLES  # those take 20 ms each
    seen = fuzz(kind, wanted, repeatable=repeatable)
    assert sum(seen.values()) >= wanted
    assert seen["clean"] > 0
    assert (seen["refused"] > 0) != (kind in LEFT_OUT)


@pytest.mark.parametrize("value", ["9" * 400, '"../0"', "1e400", '{"a": 1}'])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].structure == "json"])
def test_every_value_of_a_file_in_turn_may_be_any_other(kind: str, value: str) -> None:
    seen = {outcome(kind, [("replace", place / 20, value)]) for place in range(20)}
    assert seen <= {"clean", "refused"}
