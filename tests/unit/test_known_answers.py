"""Known answers that no other test holds the code to: numbers of the papers, and what follows from them by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.core import noise
from orchestrator.core.advising import Stretch, advise
from orchestrator.core.curvature import MICRO_BATCHES
from orchestrator.core.noise import NoiseSettings
from orchestrator.core.policies import PolicySettings, build_policy
from orchestrator.core.schedules import ScheduleSettings, build_schedule
from orchestrator.measure.curvature import read
from orchestrator.types import NoiseStats, Verdict
from tests.unit.planted import rules, without_guard
from tests.unit.readings import LONG, feed
from tests.unit.test_noise_coverage import exact_readings, read_moments

# --- the estimator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[8] * 4, [1, 2, 3, 16], [4, 4]])
def test_the_readings_of_normal_gradients_have_the_variances_of_the_closed_form(sizes: list[int]) -> None:
    """Var T = 2 tr(Sigma^2) / (n - 1) whatever the sizes, Var Q = 4 G'Sigma G / N + 2 n tr(Sigma^2) / (N^2 (n - 1)),
    and their covariance -2 tr(Sigma^2) / (N (n - 1))."""
    rng, variance, mean = np.random.default_rng(len(sizes)), np.array([2.0, 1.0, 0.25]), np.array([0.3, -0.2, 0.5])
    n, total, count = len(sizes), sum(sizes), 200_000
    unit = rng.standard_normal((count, n, 3))
    trace_cov, grad_sq = read_moments(mean + np.sqrt(variance) * unit / np.sqrt(np.array(sizes))[:, None], sizes)
    squared, along = float(variance @ variance), float(mean**2 @ variance)
    found = np.cov(trace_cov, grad_sq)
    off = -2 * squared / (total * (n - 1))
    expected = [
        [2 * squared / (n - 1), off],
        [off, 4 * along / total + 2 * n * squared / (total**2 * (n - 1))],
    ]
    assert found == pytest.approx(np.array(expected), rel=0.04)


def test_averages_fade_together_and_are_divided_last() -> None:
    """X = (1, 3) and Y = (1, 1), the older of half the weight: 7/3 over 1. With Y = (3, 1) the mean of the ratios would
    be (0.5 / 3 + 3) / 1.5 = 2.1, and the ratio of the means is 3.5 / 2.5."""
    config = NoiseSettings(half_life_samples=8.0)
    for second, expected in (([1.0, 1.0], 7 / 3), ([3.0, 1.0], 3.5 / 2.5)):
        found = noise.stats(feed(list(zip([1.0, 3.0], second, strict=True)), config), config)
        assert found.noise_scale == pytest.approx(expected, rel=1e-12)


def test_readings_below_zero_are_kept_and_clipping_them_would_not_average_away() -> None:
    """Truth 80: with a third of the readings of |G|^2 below zero the ratio of averages is right, the clipped low."""
    dim, steps = 16, 20_000
    batches = np.full(steps, 16.0)
    (trace_cov,), (grad_sq,) = exact_readings(
        np.random.default_rng(8), count=1, batches=batches, grad_sq=np.full(steps, dim / 80.0), dim=dim
    )
    assert 0.3 < np.mean(grad_sq < 0) < 0.4

    def ratio(readings: np.ndarray) -> float:
        found = noise.stats(feed(list(zip(trace_cov.tolist(), readings.tolist(), strict=True)), batch=16), LONG)
        assert found.noise_scale is not None
        assert found.high is not None
        return found.noise_scale

    assert ratio(grad_sq) == pytest.approx(80, rel=0.06)
    assert ratio(np.maximum(grad_sq, 0)) < 60


# --- what a run costs ------------------------------------------------------------------------------------------------


def retraced(scales: list[float], *, batch: int, policy: PolicySettings) -> tuple[float, float]:
    """Steps and samples over their least, by the advice on a run whose noise scale was ``scales``, one a unit."""
    stats = [NoiseStats(verdict=Verdict.MEASURED, noise_scale=s, low=s, high=s) for s in scales]
    trace = [
        Stretch(samples=round(batch + s), mean_loss=1.0, lr=0.1, stats=x) for s, x in zip(scales, stats, strict=True)
    ]
    settled = rules(base_batch=batch, every_samples=1, lag_steps=1, policy=without_guard(build_policy(policy)))
    found = advise(trace, settled)
    assert found is not None
    return found.steps / len(scales), found.samples / math.fsum(scales)


@pytest.mark.parametrize(("batch", "steps", "samples"), [(250, 5.0, 1.25), (1000, 2.0, 2.0), (4000, 1.25, 5.0)])
def test_the_hyperbola_of_steps_and_samples_at_a_noise_scale_of_1000(batch, steps, samples) -> None:
    """McCandlish et al. 2018, arXiv:1812.06162, equation 2.11: (S / S_min - 1) (E / E_min - 1) = 1."""
    found = retraced([1000.0] * 400, batch=batch, policy=PolicySettings(name="fixed"))
    assert found == pytest.approx((steps, samples), rel=0.003)


@pytest.mark.parametrize("rate", [100.0, 10_000.0])
def test_tradeoffs_gain_where_the_noise_scale_rises_from_1_to_100_in_a_straight_line(rate) -> None:
    """gamma = (integral of sqrt(1 + 99 s))^2 / integral of 1 + 99 s = (666 / 99)^2 / 50.5 = 0.89616."""
    free = {"deadband": 1.0, "max_growth": 1e9, "shrink": True}
    scales = [100 * (1 + 99 * (k + 0.5) / 4000) for k in range(4000)]
    policy = PolicySettings(name="tradeoff", exchange_rate=100 * rate, **free)
    steps, samples = retraced(scales, batch=4000, policy=policy)
    assert (steps - 1) * (samples - 1) == pytest.approx(0.89616, rel=0.01)


# --- Hessian, schedules ----------------------------------------------------------------------------------------------


def test_a_hessian_from_the_gradients_own_samples_would_weigh_their_noise_too_heavily() -> None:
    """Linear regression at e with A = I and d = 4: tr(H Sigma) is 4 q + 1 with q = 2, and 9 is what others' H gives."""
    generator, error, size = torch.Generator().manual_seed(5), nn.Parameter(torch.full((4,), 0.5)), 2

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x @ error - y).square().mean()

    own, others = [], []
    for _ in range(4000):
        x = torch.randn(2, MICRO_BATCHES * size, 4, generator=generator)
        y = torch.randn(2, MICRO_BATCHES * size, generator=generator)
        parts = [partial(loss, *part) for part in zip(x[0].split(size), y[0].split(size), strict=True)]
        signs = (1 - 2 * torch.randint(2, (MICRO_BATCHES,), generator=generator)).tolist()
        for inputs, targets, found in zip(x, y, (own, others), strict=True):
            reading = read(parts, partial(loss, inputs, targets), [error], signs=signs, micro_batch=size)
            found.append(reading.trace_hessian_cov)
    error_of_mean = np.std(others, ddof=1) / math.sqrt(len(others))
    assert abs(np.mean(others) - 9.0) < 4.5 * error_of_mean
    assert np.mean(own) > 9.0 + 9 * error_of_mean


def test_a_cosine_stepped_by_optimizer_steps_would_end_at_a_seventh_of_its_rate() -> None:
    """A batch doubled half-way takes 750 steps of 1000: (1 + cos(3 pi / 4)) / 2 = 0.146 of the rate would be left."""
    schedule = build_schedule(ScheduleSettings(name="cosine", final_fraction=0.0), total_samples=1000)
    assert schedule(750) == pytest.approx(0.1464, abs=1e-4)
    assert schedule(1000) == 0.0
