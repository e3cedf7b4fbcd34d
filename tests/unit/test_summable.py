"""What the ranks sum of the noise is the same in whatever order and grouping it is summed."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
from hypothesis import given, settings, strategies as st

from orchestrator.runtime.reproducible_step import summable

COUNT, SPREAD = 64, 2.0**19  # 2^25 / 64


@given(
    parts=st.lists(st.floats(1.0, SPREAD, exclude_max=True), min_size=1, max_size=COUNT),
    scale=st.integers(-900, 900),
    cut=st.integers(0, COUNT),
    seed=st.integers(0, 100),
)
@settings(deadline=None)
def test_terms_of_one_step_are_added_without_rounding(parts: list[float], scale: int, cut: int, seed: int) -> None:
    terms = [summable(math.ldexp(part, scale)) for part in parts]
    order = np.random.default_rng(seed).permutation(terms).tolist()
    assert Fraction(sum(order[:cut]) + sum(order[cut:])) == sum(map(Fraction, terms))


@given(term=st.floats(allow_nan=False, allow_infinity=False, min_value=0.0, allow_subnormal=False))
def test_a_term_keeps_the_digits_that_gradients_have(term: float) -> None:
    assert abs(Fraction(summable(term)) - Fraction(term)) <= Fraction(1, 2**28) * Fraction(term)


def test_what_is_not_finite_stays_so() -> None:
    assert summable(math.inf) == math.inf
    assert math.isnan(summable(math.nan))
    assert summable(sys.float_info.max) == sys.float_info.max
