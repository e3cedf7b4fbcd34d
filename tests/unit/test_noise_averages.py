"""What the noise estimator averages, over how long a memory, and what it never takes in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from orchestrator.core import codec, noise
from orchestrator.core.noise import NoiseSettings, NoiseState
from tests.unit.readings import LONG, feed, gaussian_readings, sample


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
