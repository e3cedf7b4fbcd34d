"""What the noise estimator says: measured or not, and where its interval lies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.core import noise
from orchestrator.core.noise import NoiseSettings
from orchestrator.types import NoiseStats, Verdict
from tests.unit.readings import LONG, feed, gaussian_readings, sample


def test_nothing_measured_is_too_noisy_without_numbers() -> None:
    assert noise.stats(noise.init(LONG), LONG) == NoiseStats(verdict=Verdict.TOO_NOISY)


def test_single_micro_batches_are_named_and_forgotten_once_measured_again() -> None:
    alone = sample(8, 8, None, None, micro_batches=1)
    state = noise.absorb(noise.init(LONG), alone, LONG)
    assert noise.stats(state, LONG) == NoiseStats(verdict=Verdict.TOO_FEW_MICRO_BATCHES)

    measured = feed(gaussian_readings(3, 100, trace_cov=3.0, grad_sq=3.0))
    before = noise.stats(measured, LONG)
    assert before.verdict is Verdict.MEASURED
    late = noise.absorb(measured, replace(alone, samples_seen=900), LONG)
    assert noise.stats(late, LONG) == replace(before, verdict=Verdict.TOO_FEW_MICRO_BATCHES)
    unmeasured = noise.absorb(late, sample(1000, 8, None, None), LONG)
    assert noise.stats(unmeasured, LONG) == before
    again = noise.absorb(late, sample(1000, 8, 3.0, 3.0), LONG)
    assert noise.stats(again, LONG).verdict is Verdict.MEASURED


def test_no_interval_before_min_blocks() -> None:
    readings = gaussian_readings(4, 20, trace_cov=3.0, grad_sq=30.0)
    early, enough = noise.stats(feed(readings[:19]), LONG), noise.stats(feed(readings), LONG)
    assert (early.verdict, early.low, early.high) == (Verdict.TOO_NOISY, None, None)
    assert early.noise_scale == pytest.approx(0.1, rel=0.5)
    assert enough.verdict is Verdict.MEASURED


def test_identical_samples_have_noise_scale_zero_for_certain() -> None:
    steady = noise.stats(feed([(0.0, 2.0)] * 30), LONG)
    assert (steady.verdict, steady.noise_scale, steady.low, steady.high) == (Verdict.MEASURED, 0.0, 0.0, 0.0)
    rng = np.random.default_rng(5)
    moving = noise.stats(feed([(0.0, float(q)) for q in rng.exponential(1.0, 50) ** 4]), LONG)
    assert (moving.verdict, moving.low, moving.high) == (Verdict.MEASURED, 0.0, 0.0)


def test_constant_readings_have_an_interval_of_no_width() -> None:
    found = noise.stats(feed([(3.0, 1.5)] * 200), LONG)
    assert (found.noise_scale, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert found.verdict is Verdict.MEASURED


def test_negative_averaged_signal_is_a_value_and_gives_no_noise_scale() -> None:
    found = noise.stats(feed(gaussian_readings(6, 100, trace_cov=3.0, grad_sq=-2.0)), LONG)
    assert found.noise_scale is None
    assert (found.verdict, found.high) == (Verdict.TOO_NOISY, None)
    assert found.grad_sq is not None
    assert found.grad_sq < 0


def test_signal_lost_in_noise_has_a_lower_end_and_no_upper() -> None:
    found = noise.stats(feed(gaussian_readings(7, 100, trace_cov=30.0, grad_sq=0.02, sd=1.0)), LONG)
    assert (found.verdict, found.high) == (Verdict.TOO_NOISY, None)
    assert found.low is not None
    assert found.low > 50  # 30 / (0.02 + 2 sd of the mean) = 136 at most half of the time


def test_without_any_signal_an_upper_end_is_as_rare_as_the_confidence_says() -> None:
    bounded = sum(
        noise.stats(feed(gaussian_readings(100 + i, 60, trace_cov=3.0, grad_sq=0.0)), LONG).bounded for i in range(800)
    )
    # One tail of a 95 % interval: 2.5 %. P(more than 40 of 800) is 2e-5 at 2.5 %.
    assert 3 <= bounded <= 40


def test_a_planted_step_in_the_noise_scale_is_followed_within_a_few_half_lives() -> None:
    config = NoiseSettings(half_life_samples=40 * 8)
    before = gaussian_readings(8, 400, trace_cov=2.0, grad_sq=2.0)
    after = gaussian_readings(9, 240, trace_cov=20.0, grad_sq=2.0)
    old, new = noise.stats(feed(before, config), config), noise.stats(feed(before + after, config), config)
    assert old.noise_scale == pytest.approx(1.0, rel=0.2)
    assert new.noise_scale == pytest.approx(10.0, rel=0.2)
    assert new.verdict is Verdict.MEASURED
    assert new.low is not None
    assert new.low > 5


@pytest.mark.parametrize("unit", [1e-150, 1e-20, 1e30, 1e140])
def test_the_unit_of_the_gradients_does_not_matter(unit: float) -> None:
    readings = gaussian_readings(10, 150, trace_cov=3.0, grad_sq=1.0)
    plain = noise.stats(feed(readings), LONG)
    scaled = noise.stats(feed([(t * unit, q * unit) for t, q in readings]), LONG)
    assert (scaled.noise_scale, scaled.low, scaled.high) == pytest.approx((plain.noise_scale, plain.low, plain.high))
