"""Errors and warnings by the facts they have to tell, names and numbers: not by the sentence around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

needs_cuda_build = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA device")


def assert_tells(text: str, *facts: object) -> None:
    """One line that holds every fact."""
    assert "\n" not in text, text
    missing = [fact for fact in facts if str(fact) not in text]
    assert not missing, f"{missing} not in: {text}"


@contextmanager
def refused(
    *facts: object, error: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Inside the block that error is raised, and tells the facts."""
    with pytest.raises(error) as caught:
        yield caught
    assert_tells(str(caught.value), *facts)


@contextmanager
def warned(*facts: object) -> Iterator[None]:
    """Inside the block there is a UserWarning that tells the facts."""
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        yield
    assert any(all(str(fact) in str(w.message) for fact in facts) for w in caught), [str(w.message) for w in caught]
