"""What a run pays in steps and samples when its batch follows the noise scale: the empirical model's own optimum.

McCandlish et al. 2018, arXiv:1812.06162, appendix D: a step at batch B makes 1 / (1 + N / B) of the progress of a
step without noise, N being the noise scale. Progress from 0 to 1 is cut into STEPS_MIN such steps.
"""

import math
from collections.abc import Callable

import pytest

from orchestrator.core.policies import PolicySettings, build_policy
from orchestrator.core.policy_inputs import Policy, PolicyInputs
from orchestrator.types import NoiseStats, Verdict

STEPS_MIN = 2000
FREE = {"deadband": 1.0, "max_growth": 1e9, "shrink": True}

# The noise scale at each of the noise-free steps, as a run would have recorded it.
RISING = [4000 * math.sqrt((s + 0.5) / STEPS_MIN) for s in range(STEPS_MIN)]
SAMPLES_MIN = math.fsum(RISING)


def policy(name: str, **settings) -> Policy:
    return build_policy(PolicySettings(name=name, **FREE, **settings))


def spent(choose: Callable[[PolicyInputs], int], trace: list[float]) -> tuple[int, int]:
    """The steps and samples until the end of the trace."""
    progress, steps, samples, batch = 0.0, 0, 0, 1
    while progress < len(trace):
        scale = trace[int(progress)]
        stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=scale, low=scale, high=scale)
        batch = choose(PolicyInputs(stats=stats, batch=batch, samples_seen=samples))
        progress += 1 / (1 + scale / batch)
        steps, samples = steps + 1, samples + batch
    return steps, samples


def excess(steps: int, samples: int) -> float:
    """(S / S_min - 1) (E / E_min - 1): 1 at any fixed batch, and the less the better."""
    return (steps / STEPS_MIN - 1) * (samples / SAMPLES_MIN - 1)


@pytest.mark.parametrize("exchange_rate", [300.0, 2000.0, 10_000.0])
def test_tradeoff_beats_a_fixed_batch_by_a_twenty_fifth_where_noise_rises_as_the_root(exchange_rate) -> None:
    choose = policy("tradeoff", exchange_rate=exchange_rate)
    assert excess(*spent(lambda inputs: choose(inputs).target_batch, RISING)) == pytest.approx(24 / 25, rel=0.01)


def test_the_noise_scale_itself_gains_nothing_over_a_fixed_batch() -> None:
    choose = policy("noise_scale")
    steps, samples = spent(lambda inputs: choose(inputs).target_batch, RISING)
    assert excess(steps, samples) == pytest.approx(1, rel=0.01)
    assert steps == pytest.approx(2 * STEPS_MIN, rel=0.01)
    assert excess(*spent(lambda _: 2000, RISING)) == pytest.approx(1, rel=0.01)


def test_no_other_batch_pays_less_at_the_exchange_rate() -> None:
    rate = 500.0
    choose = policy("tradeoff", exchange_rate=rate)

    def price(times: float) -> float:
        steps, samples = spent(lambda inputs: max(1, round(times * choose(inputs).target_batch)), RISING)
        return rate * steps + samples

    assert price(1.0) < min(price(0.7), price(1.4))
    follow = policy("noise_scale")
    steps, samples = spent(lambda inputs: follow(inputs).target_batch, RISING)
    assert price(1.0) < rate * steps + samples


@pytest.mark.parametrize(("t0", "t1", "expected"), [(0.1, 0.001, 316), (0.02, 0.005, 63)])
def test_the_exchange_rate_of_step_times_gives_the_shortest_run(t0, t1, expected) -> None:
    def seconds(batch: int) -> float:  # a step takes t0 + t1 x batch, the noise scale stays 1000
        return (1 + 1000 / batch) * (t0 + t1 * batch)

    stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=1000, low=1000, high=1000)
    found = policy("tradeoff", exchange_rate=t0 / t1)(PolicyInputs(stats=stats, batch=1, samples_seen=0)).target_batch
    assert found == expected == min(range(1, 5000), key=seconds)
