"""The search for the largest micro-batch that fits finds it, in few trials, and dares little."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from orchestrator.core.fitting import largest_fitting

SIZES = st.integers(1, 5000)


@st.composite
def searches(draw: st.DrawFn) -> tuple[int, int, int]:
    """(start, most, the largest that fits), the last from nothing at all to more than is asked for."""
    most = draw(SIZES)
    return draw(st.integers(1, most)), most, draw(st.integers(0, most + 10))


@given(searches())
def test_the_largest_that_fits_is_found_in_few_trials_none_of_them_twice(search: tuple[int, int, int]) -> None:
    start, most, limit = search
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_fitting(fits, start=start, most=most) == min(limit, most)
    assert len(tried) == len(set(tried)) <= 2 * math.log2(most) + 2
    assert tried[0] == start
    assert all(1 <= size <= most and size <= 2 * limit for size in tried[1:] if size > start)


@given(SIZES, st.data())
def test_a_size_that_was_never_seen_to_fit_is_never_the_answer(most: int, data: st.DataObject) -> None:
    fitted = {0}

    def fits(size: int) -> bool:
        if data.draw(st.booleans()):
            fitted.add(size)
            return True
        return False

    assert largest_fitting(fits, start=data.draw(st.integers(1, most)), most=most) in fitted


@pytest.mark.parametrize(("start", "most"), [(0, 4), (5, 4), (1, 0)])
def test_a_start_outside_of_the_sizes_is_refused(start: int, most: int) -> None:
    with pytest.raises(ValueError, match=rf"\[1, most={most}\], got start={start}"):
        largest_fitting(lambda size: True, start=start, most=most)
