"""A sum by numbered terms: the same bits however the terms are shared out, and as exact as pairwise summation is."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.core.pairwise import Block, Partials, blocks

terms = st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=70)
UNIT_ROUNDOFF = Fraction(1, 2**24)  # of float32


def add(left: np.float32, right: np.float32) -> np.float32:
    return np.float32(left + right)


def of_run(values: list[float], run: range) -> Partials[np.float32]:
    partials: Partials[np.float32] = Partials()
    for number in run:
        partials = partials.plus(Block(first=number, size=1), np.float32(values[number]), add=add)
    return partials


def shared_out(values: list[float], cuts: list[int]) -> np.float32:
    """The total, where one holder has the terms up to each cut."""
    whole: Partials[np.float32] = Partials()
    for first, last in pairwise([0, *sorted(cut % (len(values) + 1) for cut in cuts), len(values)]):
        for block, value in of_run(values, range(first, last)).sums:
            whole = whole.plus(block, value, add=add)
    return whole.total(add=add)


@given(values=terms, cuts=st.lists(st.integers(0, 70), max_size=9))
@settings(deadline=None)
def test_a_sum_does_not_depend_on_who_holds_which_terms(values: list[float], cuts: list[int]) -> None:
    assert shared_out(values, cuts).tobytes() == shared_out(values, []).tobytes()


@given(values=terms)
@settings(deadline=None)
def test_a_sum_is_as_exact_as_pairwise_summation(values: list[float]) -> None:
    depth = math.ceil(math.log2(len(values)))
    found = Fraction(float(shared_out(values, [])))
    exact = [Fraction(float(np.float32(value))) for value in values]
    bound = depth * UNIT_ROUNDOFF / (1 - depth * UNIT_ROUNDOFF) * sum(map(abs, exact))
    # Sums of float32 numbers that are subnormal are exact.
    assert abs(found - sum(exact)) <= bound


@given(n=st.integers(1, 200))
def test_no_term_goes_through_more_additions_than_halving_takes(n: int) -> None:
    depths: Partials[list[int]] = Partials()

    def deeper(left: list[int], right: list[int]) -> list[int]:
        return [depth + 1 for depth in left + right]

    for number in range(n):
        depths = depths.plus(Block(first=number, size=1), [0], add=deeper)
    found = depths.total(add=deeper)
    assert len(found) == n
    assert max(found) == math.ceil(math.log2(n))


@given(first=st.integers(0, 300), length=st.integers(0, 300))
def test_the_blocks_of_a_run_are_those_that_its_sums_end_in(first: int, length: int) -> None:
    run = range(first, first + length)
    partials: Partials[int] = Partials()
    for number in run:
        partials = partials.plus(Block(first=number, size=1), 1, add=int.__add__)
    assert tuple(block for block, _ in partials.sums) == blocks(run)
    assert [value for _, value in partials.sums] == [block.size for block in blocks(run)]
    assert len(blocks(run)) <= 2 * math.log2(max(1, length)) + 1


@pytest.mark.parametrize("holders", [1, 2, 4, 8])
def test_runs_of_equal_powers_of_two_are_one_block_each(holders: int) -> None:
    each = 8 // holders
    assert [len(blocks(range(r * each, (r + 1) * each))) for r in range(holders)] == [1] * holders


def test_the_order_of_plain_accumulation_does_depend_on_the_layout() -> None:
    # Else a plain sum would do: 2^24 + 1 is rounded to even, and back, where 1 + 1 comes first it is not.
    values = [2.0**24, 1.0, 1.0]
    alone = add(add(np.float32(values[0]), np.float32(1)), np.float32(1))
    shared = add(np.float32(values[0]), add(np.float32(1), np.float32(1)))
    assert alone != shared


def test_what_is_no_sum_is_refused() -> None:
    none: Partials[int] = Partials()
    with pytest.raises(ValueError, match="term 2 does not follow term 0"):
        none.plus(Block(first=0, size=1), 1, add=int.__add__).plus(Block(first=2, size=1), 1, add=int.__add__)
    with pytest.raises(ValueError, match="from number 0 on"):
        none.total(add=int.__add__)
    with pytest.raises(ValueError, match="from number 0 on"):
        none.plus(Block(first=2, size=1), 1, add=int.__add__).total(add=int.__add__)
    with pytest.raises(ValueError, match="got size=4, first=2"):
        Block(first=2, size=4)
    with pytest.raises(ValueError, match="got size=3, first=0"):
        Block(first=0, size=3)
