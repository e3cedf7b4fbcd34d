"""The pieces of the interval, t quantiles and Fieller's, against scipy, brute force and the textbook."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats as scipy_stats

from orchestrator.core import noise
from orchestrator.core.intervals import fieller, t_quantile
from tests.unit.readings import LONG, sample


@pytest.mark.parametrize("p", [0.55, 0.9, 0.95, 0.975, 0.995, 0.9995])
@pytest.mark.parametrize("dof", [1, 1.5, 2, 3, 3.3, 4.75, 7, 11.2, 19, 23.4, 60, 400.5, 1e5, 1e9])
def test_t_quantile_agrees_with_scipy(p: float, dof: float) -> None:
    assert t_quantile(p, dof) == pytest.approx(scipy_stats.t.ppf(p, dof), rel=1e-7)


@pytest.mark.parametrize(("p", "dof"), [(0.3, 5), (1.0, 5), (0.9, 0.5), (0.9, math.nan)])
def test_t_quantile_refuses_what_it_cannot_do(p: float, dof: float) -> None:
    with pytest.raises(ValueError, match="t quantile"):
        t_quantile(p, dof)


@given(
    st.floats(0.1, 5), st.floats(-3, 3), st.floats(0.01, 2), st.floats(0.01, 2), st.floats(-0.95, 0.95), st.floats(1, 4)
)
def test_fieller_holds_exactly_the_ratios_that_its_test_accepts(x, y, sd_x, sd_y, correlation, t) -> None:
    v_xx, v_xy, v_yy = sd_x**2, correlation * sd_x * sd_y, sd_y**2
    low, high = fieller(x, y, v_xx, v_xy, v_yy, t)
    ratios = np.concatenate((np.linspace(0, 10, 400), np.geomspace(10, 1e9, 200)))
    margin = t * t * (v_xx - 2 * ratios * v_xy + ratios**2 * v_yy) - (x - ratios * y) ** 2
    size = x**2 + ratios**2 * (y**2 + t * t * v_yy) + t * t * v_xx
    accepted, refused = ratios[margin > 1e-9 * size], ratios[margin < -1e-9 * size]
    if high is not None:
        assert low is not None
        assert not accepted.size or low * (1 - 1e-6) <= accepted.min() <= accepted.max() <= high * (1 + 1e-6)
        assert not ((refused > low * (1 + 1e-6)) & (refused < high * (1 - 1e-6))).any()
    elif low is not None:
        assert not accepted.size or accepted.min() >= low * (1 - 1e-6)
        assert not (refused > low * (1 + 1e-6)).any()
    elif y > 0:
        assert margin[0] > -1e-9 * size[0]  # zero is in it
        assert margin[-1] > -1e-9 * size[-1]  # and so is what is large beyond measure


def test_independent_equal_blocks_give_the_textbook_interval() -> None:
    """Twenty blocks without positive autocorrelation: sample (co)variances over 20, and 19 degrees of freedom."""
    rng = np.random.default_rng(11)
    readings = rng.standard_normal((20, 2)) * [0.5, 0.3] + [3.0, 1.0]
    readings[:, 0] = np.abs(readings[:, 0])
    u = readings[:, 0] * readings[:, 1].mean() - readings[:, 1] * readings[:, 0].mean()
    order = [i for pair in zip(np.argsort(u)[:10], np.argsort(u)[:9:-1], strict=True) for i in pair]
    readings = readings[order]  # high after low: the autocorrelation is negative, so none is assumed
    state = noise.init(LONG)
    for i, (t, q) in enumerate(readings, start=1):
        # What the estimator divides a step by is undone beforehand, so that it sees the readings as they are.
        unit = 1.0 if state.level is None else state.level[1] / state.level[2]
        first = t if state.level is None else 1.0
        pair = (float(t * unit), float(q * unit * first))
        state = noise.absorb(state, sample(i * 8, 8, *pair), LONG)
    readings[0] = (1.0, readings[0, 1])  # the first step is divided by itself
    cov = np.cov(readings.T) / 20
    expected = fieller(*readings.mean(axis=0), cov[0, 0], cov[0, 1], cov[1, 1], scipy_stats.t.ppf(0.975, 19))
    found = noise.stats(state, LONG)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
