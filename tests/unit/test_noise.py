"""Moments, averages, verdicts and the pieces of the interval, against closed forms and brute force."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from scipy import stats as scipy_stats

from orchestrator.core import codec, noise
from orchestrator.core.intervals import fieller, t_quantile
from orchestrator.core.noise import NoiseSettings, NoiseState, moments, moments_from_sums
from orchestrator.types import GradSample, NoiseStats, Verdict

LONG = NoiseSettings(half_life_samples=1e15)


def sample(seen: int, batch: int, trace_cov: float | None, grad_sq: float | None, micro_batches: int = 4) -> GradSample:
    return GradSample(
        step=seen, samples_seen=seen, batch=batch, micro_batches=micro_batches, loss=1.0, lr=0.1,
        grad_sq=grad_sq, trace_cov=trace_cov,
    )  # fmt: skip


def feed(readings: list[tuple[float, float]], config: NoiseSettings = LONG, batch: int = 8) -> NoiseState:
    """Absorb (trace_cov, grad_sq) readings of equal steps."""
    state = noise.init(config)
    for i, (trace_cov, grad_sq) in enumerate(readings, start=1):
        state = noise.absorb(state, sample(i * batch, batch, trace_cov, grad_sq), config)
    return state


def gaussian_readings(
    seed: int, steps: int, *, trace_cov: float, grad_sq: float, sd: float = 0.5
) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    return [
        (trace_cov * (1 + 0.2 * a), grad_sq + sd * b) for a, b in rng.standard_normal((steps, 2)).tolist()
    ]  # fmt: skip


def of_vectors(sizes: list[int], gradients: list[np.ndarray]) -> tuple[float, float]:
    mean = sum(b * g for b, g in zip(sizes, gradients, strict=True)) / sum(sizes)
    found = moments(sizes, [float(g @ g) for g in gradients], float(mean @ mean))
    assert found is not None
    return found


# --- moments -------------------------------------------------------------------------------------------------------


def test_two_orthogonal_unit_gradients_have_no_signal_left() -> None:
    assert moments([1, 1], [1.0, 1.0], 0.5) == (0.0, 1.0)


def test_uneven_pair_has_the_values_worked_out_by_hand() -> None:
    grad_sq, trace_cov = of_vectors([3, 5], [np.array([2.0]), np.array([4.0])])
    assert trace_cov == pytest.approx(7.5)
    assert grad_sq == pytest.approx(9.625)


def test_equal_gradients_have_no_noise() -> None:
    g = np.array([1.0, -2.0])
    assert of_vectors([4, 4, 2], [g, g, g]) == pytest.approx((5.0, 0.0))


def test_halves_of_a_population_of_two_give_its_own_covariance() -> None:
    assert moments([1, 1], [1.0, 1.0], 0.0) == (-1.0, 2.0)


@pytest.mark.parametrize("sizes", [[1, 2, 3], [2, 2], [1, 4, 1], [5, 1]])
def test_moments_are_exactly_unbiased_over_every_outcome_of_a_coin(sizes: list[int]) -> None:
    """Per-example gradients G +- 1 and the mean of the readings over all 2^N equally likely draws."""
    mean_grad = 0.3
    readings = []
    for signs in itertools.product((-1.0, 1.0), repeat=sum(sizes)):
        cuts = np.split(np.array(signs) + mean_grad, np.cumsum(sizes)[:-1])
        readings.append(of_vectors(sizes, [np.array([cut.mean()]) for cut in cuts]))
    assert np.mean(readings, axis=0) == pytest.approx((mean_grad**2, 1.0), rel=1e-12)


def test_equal_sizes_agree_with_the_formula_of_the_paper() -> None:
    """McCandlish et al. 2018, appendix A.1, with B_small = b and B_big = n b."""
    b, n, small, big = 4, 5, 3.7, 1.9
    found = moments([b] * n, [small] * n, big)
    assert found == pytest.approx(((n * b * big - b * small) / (n * b - b), (small - big) / (1 / b - 1 / (n * b))))


sizes_and_vectors = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.floats(-100, 100), min_size=3, max_size=3)), min_size=2, max_size=9
)


@given(sizes_and_vectors, st.randoms(use_true_random=False))
def test_moments_do_not_depend_on_the_order_and_trace_cov_is_not_negative(pairs, shuffler) -> None:
    ordered = of_vectors([b for b, _ in pairs], [np.array(v) for _, v in pairs])
    shuffler.shuffle(pairs)
    shuffled = of_vectors([b for b, _ in pairs], [np.array(v) for _, v in pairs])
    scale = sum(b for b, _ in pairs) * max(float(np.square(v).sum()) for _, v in pairs)
    assert shuffled == pytest.approx(ordered, abs=1e-12 * scale + 1e-300)
    assert ordered[1] >= -1e-13 * scale


@pytest.mark.parametrize(("sizes", "sqs"), [([], []), ([8], [1.0])])
def test_fewer_than_two_micro_batches_give_no_moments(sizes, sqs) -> None:
    assert moments(sizes, sqs, 1.0) is None
    assert moments_from_sums(weighted_sq_sum=8.0, mean_grad_sq=1.0, batch=8, micro_batches=len(sizes)) is None


@pytest.mark.parametrize(("sizes", "sqs"), [([1, 2], [1.0]), ([4, 0], [1.0, 1.0])])
def test_moments_refuse_what_is_no_micro_batch_list(sizes, sqs) -> None:
    with pytest.raises(ValueError, match="one squared norm for each micro-batch"):
        moments(sizes, sqs, 1.0)


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"half_life_samples": 0}, "half_life_samples"),
        ({"half_life_samples": math.inf}, "half_life_samples"),
        ({"half_life_samples": math.nan}, "half_life_samples"),
        ({"confidence": 1.0}, "confidence"),
        ({"blocks": 4}, "blocks"),
        ({"min_blocks": 31}, "min_blocks"),
        ({"min_blocks": 1}, "min_blocks"),
    ],
)
def test_settings_refuse_nonsense_by_name(change, said) -> None:
    with pytest.raises(ValueError, match=said):
        NoiseSettings(**({"half_life_samples": 1000.0} | change))


# --- memory --------------------------------------------------------------------------------------------------------

steps_of_training = st.lists(
    st.tuples(st.integers(1, 300), st.integers(0, 2000), st.just(0.0) | st.floats(1e-6, 50), st.floats(-5, 5)),
    min_size=1,
    max_size=300,
)


def unit_before(i, ends, batches, traces, half_life) -> float:
    """tr(Sigma) averaged over the first ``i`` steps, with a quarter of the half-life."""
    weights = batches[:i] * 0.5 ** ((ends[i - 1] - ends[:i]) / (half_life / 4))
    return float(weights @ traces[:i] / weights.sum())


@hypothesis_settings(deadline=None, max_examples=60)
@given(steps_of_training, st.floats(200, 1e6))
def test_averages_equal_the_faded_sums_over_all_steps(steps, half_life) -> None:
    """Any batches, any gaps between measured steps: blocks, joined or dropped, change nothing in the averages."""
    config = NoiseSettings(half_life_samples=half_life)
    state, seen, rows = noise.init(config), 0, []
    for batch, gap, trace_cov, grad_sq in steps:
        seen += gap + batch
        state = noise.absorb(state, sample(seen, batch, trace_cov, grad_sq), config)
        rows.append((seen, batch, trace_cov, grad_sq))
    ends, batches, traces, grads = np.array(rows).T
    units = [unit_before(i, ends, batches, traces, half_life) for i in range(1, len(rows) + 1)]
    units = np.array([units[0] or 1.0, *[before or units[i + 1] or 1.0 for i, before in enumerate(units[:-1])]])
    now = unit_before(len(rows), ends, batches, traces, half_life) or 1.0
    weights = batches * 0.5 ** ((seen - ends) / half_life)
    found = noise.stats(state, config)
    assert found.trace_cov == pytest.approx(now * (weights @ (traces / units)) / weights.sum(), rel=1e-9, abs=1e-12)
    assert found.grad_sq == pytest.approx(now * (weights @ (grads / units)) / weights.sum(), rel=1e-7, abs=1e-9)
    assert len(state.blocks) < config.capacity
    if found.high is not None:
        assert found.noise_scale is not None
        assert found.low is not None
        assert found.low <= found.noise_scale * (1 + 1e-9) <= found.high * (1 + 1e-6) + 1e-12


def test_memory_stays_bounded_and_small_on_disk_over_a_long_run() -> None:
    config = NoiseSettings(half_life_samples=4000)
    rng = np.random.default_rng(0)
    state, seen = noise.init(config), 0
    for i in range(6000):
        batch = 8 if i < 2000 else 64 if i < 4000 else 16
        seen += batch
        state = noise.absorb(state, sample(seen, batch, float(rng.gamma(4)), float(rng.normal(1))), config)
        assert len(state.blocks) < config.capacity == 60
    assert len(json.dumps(codec.encode(state))) < 12_000


def test_state_survives_json_exactly_and_goes_on_alike() -> None:
    config = NoiseSettings(half_life_samples=5000)
    readings = gaussian_readings(1, 700, trace_cov=3.0, grad_sq=1.0)
    state = feed(readings, config)
    restored = codec.decode(json.loads(json.dumps(codec.encode(state))), {"NoiseState": NoiseState})
    assert restored == state
    following = sample(700 * 8 + 8, 8, 2.0, 1.0)
    assert noise.absorb(restored, following, config) == noise.absorb(state, following, config)
    assert noise.stats(restored, config) == noise.stats(state, config)


@pytest.mark.parametrize(
    ("trace_cov", "grad_sq"),
    [(None, None), (1.0, None), (math.nan, 1.0), (1.0, math.inf), (-math.inf, 1.0), (1e308, 1.0)],
)
def test_what_was_not_measured_or_not_finite_is_never_averaged(trace_cov, grad_sq) -> None:
    state = feed(gaussian_readings(2, 30, trace_cov=3.0, grad_sq=2.0))
    odd = sample(1000, 8, trace_cov, grad_sq)
    assert noise.stats(noise.absorb(state, odd, LONG), LONG) == noise.stats(state, LONG)


def test_order_is_enforced() -> None:
    state = feed([(1.0, 1.0)] * 5)
    with pytest.raises(ValueError, match="in order"):
        noise.absorb(state, sample(39, 8, 1.0, 1.0), LONG)
    with pytest.raises(ValueError, match="at least one sample"):
        noise.absorb(state, sample(50, 0, 1.0, 1.0), LONG)


# --- verdicts ------------------------------------------------------------------------------------------------------


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


# --- the interval's pieces -----------------------------------------------------------------------------------------


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
