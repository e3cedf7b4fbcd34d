"""Is the estimator unbiased, and does its 95 % interval hold the truth 95 % of the time?

Everything here starts from micro-batch gradients with a known mean G and covariance Sigma. Run with ``-s`` to read
the coverages with their binomial intervals. An interval without an upper end covers what lies above its lower end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats as scipy_stats

from orchestrator.core import noise
from orchestrator.core.noise import NoiseSettings
from orchestrator.types import GradSample

Z = 4.5  # |z| beyond it happens by chance with 7e-6; about 30 such tests here, so 2e-4 in all


def read_moments(gradients: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """``(trace_cov, grad_sq)``, one for each leading index, from ``gradients[..., micro-batch, coordinate]``."""
    b = np.asarray(sizes, dtype=float)
    mean = np.einsum("...nd,n->...d", gradients, b) / b.sum()
    weighted_sq, mean_sq = np.einsum("...nd,...nd,n->...", gradients, gradients, b), np.square(mean).sum(axis=-1)
    pairs = [
        noise.moments_from_sums(weighted_sq_sum=w, mean_grad_sq=q, batch=sum(sizes), micro_batches=len(sizes))
        for w, q in zip(weighted_sq.ravel().tolist(), mean_sq.ravel().tolist(), strict=True)
    ]
    grad_sq, trace_cov = np.array(pairs, dtype=float).T.reshape(2, *mean_sq.shape)
    return trace_cov, grad_sq


class Planted:
    """Micro-batch gradients of a known noise scale, whose noise is AR(1) from step to step."""

    def __init__(self, *, seed: int, noise_scale: float, dim: int = 16) -> None:
        self.rng = np.random.default_rng(seed)
        self.sd = self.rng.uniform(0.5, 1.5, dim)  # of one sample's gradient, by coordinate
        self.trace_cov = float(np.square(self.sd).sum())
        direction = self.rng.standard_normal(dim)
        self.grad = direction * np.sqrt(self.trace_cov / noise_scale) / np.linalg.norm(direction)
        self.noise_scale = noise_scale

    def windows(self, count: int, steps: Sequence[Sequence[int]], rho: float) -> tuple[np.ndarray, np.ndarray]:
        """``(trace_cov, grad_sq)`` of shape (count, len(steps)); ``steps`` lists each step's micro-batch sizes."""
        shape = (count, max(len(sizes) for sizes in steps), len(self.grad))
        unit = self.rng.standard_normal(shape)
        readings = []
        for sizes in steps:
            per_sample = self.sd * unit[:, : len(sizes)]
            readings.append(read_moments(self.grad + per_sample / np.sqrt(np.array(sizes))[:, None], sizes))
            unit = rho * unit + np.sqrt(1 - rho * rho) * self.rng.standard_normal(shape)
        trace_cov, grad_sq = np.moveaxis(np.array(readings), 0, -1)
        return trace_cov, grad_sq


def count_covered(
    trace_cov: np.ndarray, grad_sq: np.ndarray, steps: Sequence[Sequence[int]], truth: float, config: NoiseSettings
) -> tuple[int, int]:
    """In how many windows the interval holds the truth, and in how many it has two ends."""
    batches, counts = [sum(sizes) for sizes in steps], [len(sizes) for sizes in steps]
    seen = np.cumsum(batches).tolist()
    covered = bounded = 0
    for traces, grads in zip(trace_cov.tolist(), grad_sq.tolist(), strict=True):
        state = noise.init(config)
        for i, (t, q) in enumerate(zip(traces, grads, strict=True)):
            reading = GradSample(
                step=i, samples_seen=seen[i], batch=batches[i], micro_batches=counts[i], loss=0.0, lr=0.1,
                grad_sq=q, trace_cov=t,
            )  # fmt: skip
            state = noise.absorb(state, reading, config)
        found = noise.stats(state, config)
        covered += (found.low is None or found.low <= truth) and (found.high is None or truth <= found.high)
        bounded += found.bounded
    return covered, bounded


def report(name: str, covered: int, bounded: int, count: int) -> tuple[float, float]:
    """Print the coverage with its exact (Clopper-Pearson) 95 % binomial interval, and return a 99.9 % one."""
    exact = scipy_stats.binomtest(covered, count)
    near, wide = exact.proportion_ci(0.95, "exact"), exact.proportion_ci(0.999, "exact")
    print(
        f"\n{name}: {covered}/{count} = {covered / count:.4f} covered, binomial interval "
        f"[{near.low:.4f}, {near.high:.4f}]; {bounded / count:.1%} with two ends",
        end="",
    )
    return wide.low, wide.high


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_interval_covers_the_truth_92_to_98_percent_of_4000_windows(rho: float) -> None:
    planted = Planted(seed=20 + int(10 * rho), noise_scale=48.0)
    steps, config = [[8, 8, 8, 8]] * 240, NoiseSettings(half_life_samples=1e12)
    trace_cov, grad_sq = planted.windows(4000, steps, rho)
    covered, bounded = count_covered(trace_cov, grad_sq, steps, planted.noise_scale, config)
    report(f"autocorrelation {rho}", covered, bounded, 4000)
    assert 0.92 <= covered / 4000 <= 0.98
    assert bounded > 2000  # the coverage is not that of intervals without an end


@pytest.mark.parametrize(
    ("name", "noise_scale", "steps", "half_life_steps", "rho"),
    [
        ("little noise", 8, [[8] * 4] * 120, 1e9, 0.6),
        ("signal 1.7 sd of its average", 960, [[8] * 4] * 150, 1e9, 0.0),
        ("signal lost, correlated", 960, [[8] * 4] * 150, 1e9, 0.9),
        ("half-life a sixth of the window", 48, [[8] * 4] * 240, 40, 0.0),
        ("half-life a sixth of the window, correlated", 48, [[8] * 4] * 240, 40, 0.6),
        ("batch doubled in mid-window", 48, [[8] * 4] * 100 + [[8] * 8] * 100, 1e9, 0.6),
        ("batch grown eightfold", 48, [[8] * 2] * 150 + [[8] * 16] * 60, 1e9, 0.0),
        ("batch shrunk fourfold while fading", 48, [[8] * 8] * 100 + [[8] * 2] * 100, 300, 0.6),
        ("uneven micro-batches", 44, [[1, 2, 3, 16]] * 160, 1e9, 0.6),
        ("two micro-batches", 16, [[4, 4]] * 200, 1e9, 0.9),
    ],
)
def test_interval_holds_under_hard_conditions(name, noise_scale, steps, half_life_steps, rho) -> None:
    planted = Planted(seed=len(name), noise_scale=noise_scale)
    config = NoiseSettings(half_life_samples=half_life_steps * sum(steps[0]))
    trace_cov, grad_sq = planted.windows(800, steps, rho)
    covered, bounded = count_covered(trace_cov, grad_sq, steps, noise_scale, config)
    low, high = report(f"{name} (autocorrelation {rho})", covered, bounded, 800)
    assert low <= 0.98
    assert high >= 0.92
    assert 0.90 <= covered / 800 <= 0.99


def z_score(values: np.ndarray, truth: float) -> float:
    return float((values.mean() - truth) / (values.std(ddof=1) / np.sqrt(len(values))))


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [8] * 7 + [1], [1, 2, 3, 16], [1, 1]])
def test_readings_are_unbiased_for_any_sizes(sizes: list[int]) -> None:
    planted = Planted(seed=31, noise_scale=20.0)
    trace_cov, grad_sq = planted.windows(20_000, [sizes], 0.0)
    assert abs(z_score(trace_cov[:, 0], planted.trace_cov)) < Z
    assert abs(z_score(grad_sq[:, 0], float(planted.grad @ planted.grad))) < Z


@pytest.mark.parametrize("sizes", [[8] * 7 + [1], [1, 2, 3, 16]])
def test_the_same_test_catches_the_equal_size_formula_with_a_mean_size(sizes: list[int]) -> None:
    planted = Planted(seed=32, noise_scale=20.0)
    b, n = np.array(sizes, dtype=float), len(sizes)
    unit = planted.rng.standard_normal((20_000, n, len(planted.grad)))
    gradients = planted.grad + planted.sd * unit / np.sqrt(b)[:, None]
    small = np.square(gradients).sum(axis=2).mean(axis=1)
    big = np.square(np.einsum("rnd,n->rd", gradients, b) / b.sum()).sum(axis=1)
    assert z_score((small - big) / (1 / b.mean() - 1 / b.sum()), planted.trace_cov) > 10 * Z


def regression_gradients(
    rng: np.random.Generator, spectrum: np.ndarray, error: np.ndarray, sigma: float, shape: tuple[int, ...]
) -> np.ndarray:
    """Per-example gradients of (x.w - y)^2 / 2 at w = w* + error, x ~ N(0, diag(spectrum)), y = x.w* + sigma z."""
    x = rng.standard_normal((*shape, len(error))) * np.sqrt(spectrum)
    return x * (x @ error - sigma * rng.standard_normal(shape))[..., None]


def regression_moments(spectrum: np.ndarray, error: np.ndarray, sigma: float) -> tuple[float, float]:
    """``(|G|^2, tr(Sigma))``: G = A e and Sigma = q A + A e e'A with q = e'A e + sigma^2."""
    q = float(spectrum @ np.square(error)) + sigma**2
    grad_sq = float(np.square(spectrum * error).sum())
    return grad_sq, q * float(spectrum.sum()) + grad_sq


@pytest.mark.parametrize(("sigma", "truth"), [(0.0, 11.0), (1.0, 21.0)])
def test_closed_form_of_isotropic_regression(sigma: float, truth: float) -> None:
    error = np.full(10, 10**-0.5)
    grad_sq, trace_cov = regression_moments(np.ones(10), error, sigma)
    assert trace_cov / grad_sq == pytest.approx(truth)


@pytest.mark.parametrize(
    ("spectrum", "error", "sigma"),
    [
        (np.ones(10), np.full(10, 10**-0.5), 1.0),
        (np.array([4.0, 2.0, 1.0, 0.5]), np.array([0.5, -1.0, 0.3, 2.0]), 0.7),
        (1.0 / np.arange(1, 13), np.ones(12), 2.0),
    ],
)
def test_noise_scale_of_linear_regression_agrees_with_its_closed_form(spectrum, error, sigma) -> None:
    """Unbiased moments, and coverage, on gradients that are not normal; micro-batches of 4, 8, 8 and 4 examples."""
    rng, sizes, count, length = np.random.default_rng(41), [4, 8, 8, 4], 400, 80
    grad_sq_truth, trace_cov_truth = regression_moments(spectrum, error, sigma)
    traces, grads = [], []
    for _ in range(count):
        examples = regression_gradients(rng, spectrum, error, sigma, (length, sum(sizes)))
        micro = np.add.reduceat(examples, np.cumsum([0, *sizes[:-1]]), axis=1) / np.array(sizes)[:, None]
        trace_cov, grad_sq = read_moments(micro, sizes)
        traces.append(trace_cov)
        grads.append(grad_sq)
    trace_cov, grad_sq = np.array(traces), np.array(grads)
    assert abs(z_score(trace_cov.ravel(), trace_cov_truth)) < Z
    assert abs(z_score(grad_sq.ravel(), grad_sq_truth)) < Z
    truth = trace_cov_truth / grad_sq_truth
    assert trace_cov.mean() / grad_sq.mean() == pytest.approx(truth, rel=0.05)
    config = NoiseSettings(half_life_samples=1e12)
    covered, bounded = count_covered(trace_cov, grad_sq, [sizes] * length, truth, config)
    low, high = report(f"linear regression, noise scale {truth:.3g}", covered, bounded, count)
    assert low <= 0.98
    assert high >= 0.92
