"""The exact rule: literals a person can check, properties, and the slow version beside the fast one."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsprune.ranking.selection import PRUNED, SHORT, STRIDE, pruned_count, select

# few distinct values, so that ties are the rule; what is pruned already among them
values = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.5, 1e-30, 1e30])
parts_of_floats = st.lists(st.lists(values, min_size=1, max_size=9), min_size=1, max_size=4)


def as_parts(parts: list[list[float]]) -> list[Tensor]:
    return [torch.tensor([part]) for part in parts]


def as_lists(keeps: list[Tensor]) -> list[list[bool]]:
    return [keep[0].tolist() for keep in keeps]


def gone(keeps: list[Tensor]) -> int:
    return sum(int((~keep).sum()) for keep in keeps)


@pytest.mark.parametrize(
    ("sparsity", "n", "count"),
    [(0.0, 7, 0), (0.5, 5, 3), (0.49, 5, 2), (0.9, 10, 9), (0.999, 10, 10), (0.05, 10, 1), (0.049, 10, 0)],
)
def test_count_rounds_half_up(sparsity: float, n: int, count: int) -> None:
    assert pruned_count(sparsity, n) == count


def test_literal_ties_keep_the_lower_index() -> None:
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert [select([score], k)[0].int().tolist()[0] for k in range(5)] == [
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_literal_global_ranking_across_parts() -> None:
    first, second = torch.tensor([[5.0, 1.0]]), torch.tensor([[1.0, 4.0, 0.5]])
    keeps = select([first, second], 2)
    assert as_lists(keeps) == [[True, True], [False, True, False]]


def test_literal_min_kept_protects_the_best_of_every_part() -> None:
    small, large = torch.tensor([[0.1, 0.2]]), torch.tensor([[5.0, 6.0, 7.0]])
    assert as_lists(select([small, large], 3, min_kept=1)) == [[False, True], [False, False, True]]
    assert as_lists(select([small, large], 99, min_kept=1)) == [[False, True], [False, False, True]]


def test_literal_protected() -> None:
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    safe = torch.tensor([[True, False, False, False]])
    assert as_lists(select([score], 2, protected=[safe])) == [[True, False, False, True]]
    assert as_lists(select([score], 4, protected=[safe])) == [[True, False, False, False]]


@given(parts_of_floats, st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_equals_the_slow_version(parts: list[list[float]], k: int, min_kept: int) -> None:
    assert as_lists(select(as_parts(parts), k, min_kept=min_kept)) == reference.select(parts, k, min_kept=min_kept)


@given(parts_of_floats, st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_reaches_the_count_exactly(parts: list[list[float]], k: int, min_kept: int) -> None:
    most = sum(len(part) - min(min_kept, len(part)) for part in parts)
    assert gone(select(as_parts(parts), k, min_kept=min_kept)) == min(k, most)


@given(parts_of_floats, st.integers(0, 40), st.integers(0, 40), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_masks_only_shrink_when_scores_change(parts: list[list[float]], k: int, more: int, min_kept: int) -> None:
    """What was pruned has -inf and goes first, whatever the others' scores have become."""
    first = select(as_parts(parts), k, min_kept=min_kept)
    changed = [(1.0 - score).masked_fill(~keep, PRUNED) for score, keep in zip(as_parts(parts), first, strict=True)]
    second = select(changed, gone(first) + more, min_kept=min_kept)
    assert all(bool((before | ~after).all()) for before, after in zip(first, second, strict=True))


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), min_size=2, max_size=4), st.randoms())
@settings(max_examples=100, deadline=None)
def test_order_of_tensors_does_not_matter_without_ties(parts: list[list[float]], random: object) -> None:
    flat = sorted({value for part in parts for value in part})
    distinct = [list(flat[i :: len(parts)]) or [2.0 + i] for i in range(len(parts))]
    order = list(range(len(distinct)))
    random.shuffle(order)  # type: ignore[attr-defined]
    k = sum(map(len, distinct)) // 2
    plain = as_lists(select(as_parts(distinct), k))
    shuffled = as_lists(select(as_parts([distinct[i] for i in order]), k))
    assert [plain[i] for i in order] == shuffled


@pytest.mark.parametrize("n", [4, SHORT, SHORT + 1, 200])
def test_rows_are_ranked_each_on_its_own(n: int) -> None:
    scores = torch.randint(0, 5, (6, n), generator=torch.Generator().manual_seed(n)).float()
    keep = select([scores], n // 3)[0]
    for row, kept in zip(scores, keep, strict=True):
        assert kept.tolist() == reference.select([row.tolist()], n // 3)[0]


def test_large_input_is_exact() -> None:
    scores = [
        torch.rand(1, n, generator=torch.Generator().manual_seed(n)).round(decimals=4) for n in (300_000, 700_000)
    ]
    keeps = select(scores, 900_000)
    assert gone(keeps) == 900_000
    lowest_kept = min(float(s[k].min()) for s, k in zip(scores, keeps, strict=True))
    highest_gone = max(float(s[~k].max()) for s, k in zip(scores, keeps, strict=True))
    assert highest_gone <= lowest_kept
    assert math.isclose(lowest_kept, 0.9, abs_tol=2e-3)


@pytest.mark.parametrize("kind", ["smooth", "ties", "half pruned", "stripes"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.501, 0.7, 0.999])
def test_sampling_is_exact(kind: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the distribution, and also where the sample misleads (stripes as wide as its stride)."""
    monkeypatch.setattr("gsprune.ranking.selection.LARGE", 1000)
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(1, 60_000, generator=generator)
    if kind == "ties":
        score = (score * 4).floor()
    elif kind == "half pruned":
        score[:, torch.randperm(60_000, generator=generator)[:30_000]] = PRUNED
    elif kind == "stripes":
        score[:, ::STRIDE] += 5
    k = pruned_count(share, 60_000)
    parts = [score[:, :20_000], score[:, 20_000:]]
    keep = torch.cat(select(parts, k), dim=1)
    order = torch.sort(score.flip(1), dim=1, stable=True).indices[0]  # of equals the highest index first
    expected = torch.ones(60_000, dtype=torch.bool)
    expected[59_999 - order[:k]] = False
    assert torch.equal(keep[0], expected)


def test_inputs_are_left_as_they_are() -> None:
    score, safe = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[False, True, False]])
    select([score], 1, protected=[safe], min_kept=1)
    assert score.tolist() == [[3.0, 1.0, 2.0]]
    assert safe.tolist() == [[False, True, False]]


def test_accelerator_path_equals_the_cpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kthvalue` stands in for numpy's partition on devices that numpy does not reach."""
    from gsprune.ranking import selection

    score = torch.randint(0, 9, (1, 500), generator=torch.Generator().manual_seed(0)).float()
    expected = select([score], 123)[0]
    monkeypatch.setattr(selection, "_kth_smallest_", lambda pool, k: pool.kthvalue(k, dim=1, keepdim=True).values)
    assert torch.equal(select([score], 123)[0], expected)
