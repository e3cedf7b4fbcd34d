"""What the normalisation layers tell of the whole: the factors, the slope's interval, and when they are not used."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.core import calibration, codec
from orchestrator.core.calibration import (
    BLOCKS,
    WIDEST,
    CalibrationBlock,
    CalibrationFit,
    CalibrationSettings,
    CalibrationState,
)

SAMPLES, BATCH = 4096, 16
STEPS = SAMPLES // BATCH
Moments = tuple[float, float]  # |G|^2, tr(Sigma)


def state_of(
    readings: list[tuple[Moments, Moments]], *, batch: int = BATCH, samples: int = SAMPLES
) -> CalibrationState:
    """After steps of ``batch`` samples from the run's first on, each with its (whole, part)."""
    state, rules = CalibrationState(), CalibrationSettings(samples=samples)
    for step, (whole, part) in enumerate(readings, start=1):
        state = calibration.absorb(state, rules, whole=whole, part=part, samples_seen=step * batch, batch=batch)
    return state


def drawn(
    rng: np.random.Generator, *, slope: float = 2.0, noise: float = 0.5, trace_noise: float = 0.05
) -> list[tuple[Moments, Moments]]:
    """|G|^2 is 1 and ``slope`` / 300, with own noise and one in common; tr(Sigma) is 40 and 40 / 300."""
    own, part, common = noise * rng.normal(size=(3, STEPS))
    t, t_part = 40 * (1 + trace_noise * rng.normal(size=(2, STEPS)))
    q, q_part = 1 + common + own, slope / 300 * (1 + common + part)
    return [((q[i], t[i]), (q_part[i], t_part[i] / 300)) for i in range(STEPS)]


def test_the_factors_are_ratios_of_the_second_halfs_sums_and_nothing_is_clamped() -> None:
    # By hand: the first two steps do not count; of the others |G|^2 sums to 3 - 1 + 4 = 6 and 0.25 + 0.5 - 0.25 = 0.5.
    readings = [((1e9, 1e9), (1.0, 1.0))] * 2 + [
        ((3.0, 10.0), (0.25, 1.0)),
        ((-1.0, 20.0), (0.5, 4.0)),
        ((4.0, 30.0), (-0.25, 1.0)),
    ]
    state = state_of(readings[:4], batch=4, samples=16)
    state = calibration.absorb(
        state, CalibrationSettings(samples=16), whole=(4.0, 30.0), part=(-0.25, 1.0), samples_seen=20, batch=4
    )
    found = calibration.fit(state)
    assert (found.grad_sq_ratio, found.trace_cov_ratio, found.slope) == (12.0, 10.0, pytest.approx(10 / 12))
    assert (found.steps, found.samples) == (3, 12)


def test_steps_of_more_samples_weigh_more() -> None:
    rules, state = CalibrationSettings(samples=8), CalibrationState()
    state = calibration.absorb(state, rules, whole=(1.0, 1.0), part=(1.0, 1.0), samples_seen=5, batch=1)
    state = calibration.absorb(state, rules, whole=(4.0, 6.0), part=(1.0, 2.0), samples_seen=8, batch=3)
    found = calibration.fit(state)
    assert (found.grad_sq_ratio, found.trace_cov_ratio) == (13 / 4, 19 / 7)


@settings(max_examples=100, deadline=None)
@given(
    whole=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    factors=st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)),
    batch=st.integers(1, 500),
)
def test_where_the_part_is_a_fixed_fraction_the_whole_is_found_again(
    whole: Moments, factors: tuple[float, float], batch: int
) -> None:
    part = (whole[0] / factors[0], whole[1] / factors[1])
    found = calibration.fit(state_of([(whole, part)] * (1 + SAMPLES // batch), batch=batch))
    assert found.problem is None
    assert found.spread == pytest.approx(0, abs=1e-6)
    assert found.slope == pytest.approx(factors[1] / factors[0])
    assert calibration.scaled(part, by=found) == pytest.approx(whole)
    assert calibration.scaled((-part[0], part[1]), by=found) == pytest.approx((-whole[0], whole[1]))


def test_a_part_that_is_the_whole_has_factors_of_exactly_one() -> None:
    readings = [(whole, whole) for whole, _ in drawn(np.random.default_rng(1))]
    found = calibration.fit(state_of(readings))
    assert (found.grad_sq_ratio, found.trace_cov_ratio, found.slope, found.problem) == (1.0, 1.0, 1.0, None)
    assert (found.slope_low, found.slope_high) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_the_memory_is_bounded_and_survives_being_written_down() -> None:
    state = state_of(drawn(np.random.default_rng(2)))
    assert len(state.blocks) == BLOCKS
    assert {block.steps for block in state.blocks} == {STEPS // 2 // BLOCKS}
    kept = (state, calibration.fit(state))
    types = {cls.__name__: cls for cls in (CalibrationState, CalibrationBlock, CalibrationFit)}
    assert codec.decode(json.loads(json.dumps(codec.encode(kept))), types) == kept


@pytest.mark.parametrize(("noise", "trace_noise"), [(0.5, 0.05), (0.05, 0.5)])
def test_the_slopes_interval_covers_the_planted_slope(noise: float, trace_noise: float) -> None:
    covered, runs, widths = 0, 600, []
    rng = np.random.default_rng(3)
    for _ in range(runs):
        found = calibration.fit(state_of(drawn(rng, noise=noise, trace_noise=trace_noise)))
        assert found.slope_low is not None
        assert found.slope_high is not None
        assert found.spread is not None
        covered += found.slope_low <= 2.0 <= found.slope_high
        widths.append(found.spread)
    # Nominal 95 %; four standard deviations of a binomial are 3.6 %: a false alarm in 16,000.
    assert covered / runs == pytest.approx(0.95, abs=0.036)
    # Of whole and part, |G|^2 and tr(Sigma) have noise of their own in each of 128 steps; two standard errors.
    error = math.hypot(noise, noise, trace_noise, trace_noise) / math.sqrt(128)
    assert np.mean(widths) == pytest.approx(2 * error, rel=0.15)


def test_a_slope_that_drifts_through_the_second_half_is_not_used() -> None:
    rng = np.random.default_rng(4)
    drift = np.geomspace(1, 8, STEPS)
    readings = [(whole, (part[0] * f, part[1])) for (whole, part), f in zip(drawn(rng, noise=0.1), drift, strict=True)]
    assert calibration.fit(state_of(drawn(rng, noise=0.1))).problem is None
    found = calibration.fit(state_of(readings))
    assert found.problem is not None
    assert found.spread is None or found.spread > WIDEST


@pytest.mark.parametrize(
    ("whole", "part", "why"),
    [
        ((-1.0, 5.0), (1.0, 5.0), "-1 of the whole, 1 of the part"),
        ((1.0, 5.0), (-1.0, 5.0), "1 of the whole, -1 of the part"),
        ((-1.0, 5.0), (-1.0, 5.0), "-1 of the whole, -1 of the part"),
        ((1.0, 5.0), (0.0, 0.0), "tr(Sigma) of the part, or of the whole, is not positive"),
        ((1.0, 0.0), (1.0, 5.0), "tr(Sigma) of the part, or of the whole, is not positive"),
    ],
)
def test_moments_without_a_positive_sum_give_no_factors(whole: Moments, part: Moments, why: str) -> None:
    found = calibration.fit(state_of([(whole, part)] * STEPS))
    assert found.problem is not None
    assert why in found.problem


def test_a_fit_on_nothing_or_on_one_step_or_on_noise_is_not_used() -> None:
    assert calibration.fit(CalibrationState()).problem == "no step of its second half was measured"
    one = calibration.fit(state_of([((1.0, 5.0), (1.0, 5.0))], batch=SAMPLES))
    assert one == CalibrationFit(problem="no step of its second half was measured")
    two = calibration.fit(state_of([((1.0, 5.0), (1.0, 5.0))] * 2, batch=SAMPLES // 2))
    assert (two.slope, two.problem) == (1.0, "the slope's interval has no upper end")
    wide = calibration.fit(state_of(drawn(np.random.default_rng(5), noise=1.5)))
    assert wide.problem is not None
    assert wide.spread is not None
    assert wide.spread > WIDEST


def test_a_calibration_of_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, got samples=0"):
        CalibrationSettings(samples=0)
