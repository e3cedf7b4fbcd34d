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
from orchestrator.types import GradSample, NoiseStats

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


def exact_readings(
    rng: np.random.Generator, *, count: int, batches: np.ndarray, grad_sq: np.ndarray, dim: int, micro_batch: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """``(trace_cov, grad_sq)``, each (count, steps), as micro-batches with noise N(0, I) a sample would be read.

    Drawn from their distributions: the spread of the micro-batches is chi-squared and independent of their mean.
    """
    freedom, shape = (batches / micro_batch - 1) * dim, (count, len(batches))
    trace_cov = rng.chisquare(freedom, shape) * dim / freedom
    mean_sq = rng.noncentral_chisquare(dim, grad_sq * batches, shape) / batches
    return trace_cov, mean_sq - trace_cov / batches


def grad_sq_for(level: float, *, batches: np.ndarray, half_life: float, dim: int, micro_batch: int = 8) -> float:
    """The |G|^2 that is ``level`` standard errors of its own faded average away from zero.

    A reading's variance is 4 |G|^2 / N + 2 n dim / (N^2 (n - 1)) for n micro-batches and noise N(0, I) a sample.
    """
    seen, pieces = np.cumsum(batches), batches / micro_batch
    weights = batches * np.exp2((seen - seen[-1]) / half_life)
    weights /= weights.sum()
    with_signal = float(np.sum(weights**2 * 4 / batches))
    alone = float(np.sum(weights**2 * 2 * pieces * dim / (batches**2 * (pieces - 1))))
    half = level**2 * with_signal / 2
    return half + float(np.sqrt(half**2 + level**2 * alone))


LEVELS = {"signal ten standard errors": (10.0, 0.99, 1.0), "near zero": (3.0, 0.6, 0.9), "lost": (1.0, 0.03, 0.3)}


@pytest.mark.parametrize("batches", [[32] * 64, [32] * 32 + [128] * 32], ids=["one batch", "grown fourfold"])
@pytest.mark.parametrize("name", list(LEVELS))
def test_interval_covers_92_to_98_percent_of_4000_windows_at_any_signal_and_after_a_growth(name, batches) -> None:
    """The averages fade with a half-life of half the window; ``fewest`` and ``most`` bound the share with two ends."""
    level, fewest, most = LEVELS[name]
    dim, sizes, half_life = 16, np.array(batches, dtype=float), sum(batches) / 2
    grad_sq = grad_sq_for(level, batches=sizes, half_life=half_life, dim=dim)
    rng = np.random.default_rng(int(100 * level) + sum(batches))
    trace_read, grad_read = exact_readings(rng, count=4000, batches=sizes, grad_sq=np.full(64, grad_sq), dim=dim)
    # The planted level is what it says: the spread of the faded average, seen over the windows.
    weights = sizes * np.exp2((np.cumsum(sizes) - sizes.sum()) / half_life)
    assert grad_sq / (grad_read @ (weights / weights.sum())).std() == pytest.approx(level, rel=0.06)
    steps, config = [[8] * (batch // 8) for batch in batches], NoiseSettings(half_life_samples=half_life)
    covered, bounded = count_covered(trace_read, grad_read, steps, dim / grad_sq, config)
    report(f"{name}, batch {batches[0]} to {batches[-1]}, noise scale {dim / grad_sq:.0f}", covered, bounded, 4000)
    assert 0.92 <= covered / 4000 <= 0.98
    assert fewest <= bounded / 4000 <= most


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


def drifting(doublings: float, *, count: int, seed: int) -> tuple[list[NoiseStats], float]:
    """``(found, present)``: windows of six half-lives in which the noise scale doubles so often in each half-life."""
    per_half_life, dim, present = 128, 64, 60.0
    steps = 6 * per_half_life
    batches, age = np.full(steps, 32.0), np.arange(steps)[::-1] / per_half_life
    grad_sq = dim / (present * 2.0 ** (-doublings * age))
    config = NoiseSettings(half_life_samples=32 * per_half_life)
    rng = np.random.default_rng(seed)
    readings = exact_readings(rng, count=count, batches=batches, grad_sq=grad_sq, dim=dim)
    found = []
    for traces, grads in zip(*(moment.tolist() for moment in readings), strict=True):
        state = noise.init(config)
        for i, (t, q) in enumerate(zip(traces, grads, strict=True)):
            reading = GradSample(
                step=i, samples_seen=32 * (i + 1), batch=32, micro_batches=4, loss=0.0, lr=0.1, grad_sq=q, trace_cov=t
            )
            state = noise.absorb(state, reading, config)
        found.append(noise.stats(state, config))
    return found, present


def test_a_drift_shows_in_the_width_and_a_rise_never_lifts_the_low_end_above_the_present() -> None:
    """What ``stats`` says of drifts: the averages lag, so growth on a rising noise scale is late and not too far."""
    widths, behind = {}, {}
    for doublings in (0.0, 0.1, 0.25, 0.5):
        found, present = drifting(doublings, count=100, seed=int(100 * doublings))
        assert sum(stats.low > present for stats in found if stats.low is not None) <= 10  # 2.5 are due without drift
        if doublings:
            assert all(stats.low is None or stats.low <= present for stats in found)
        both = [stats for stats in found if stats.bounded]
        assert len(both) > 50
        widths[doublings] = float(np.median([(stats.high - stats.low) / stats.noise_scale for stats in both]))
        behind[doublings] = float(np.median([stats.noise_scale for stats in both])) / present
    print(f"\nwidth over noise scale {widths}, noise scale over the present one {behind}", end="")
    assert behind == pytest.approx({0.0: 1.0, 0.1: 0.91, 0.25: 0.77, 0.5: 0.56}, abs=0.02)
    assert widths[0.0] < 0.8 * widths[0.1] < 0.5 * widths[0.25] < 0.25 * widths[0.5]


def test_a_noise_scale_that_doubles_in_a_half_life_has_no_upper_end_and_a_falling_one_is_read_too_high() -> None:
    found, _ = drifting(1.0, count=40, seed=1)
    assert not any(stats.bounded for stats in found)
    found, present = drifting(-0.25, count=40, seed=2)
    assert np.median([stats.noise_scale for stats in found]) == pytest.approx(1.23 * present, rel=0.03)
    assert sum(stats.low > present for stats in found) > 20  # the limit that ``stats`` names


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
