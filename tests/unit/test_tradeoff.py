"""What a run pays in steps and samples when its batch follows the noise scale: the empirical model's own optimum.

McCandlish et al. 2018, arXiv:1812.06162, appendix D: a step at batch B makes 1 / (1 + N / B) of the progress of a
step without noise, N being the noise scale. Progress from 0 to 1 is cut into STEPS_MIN such steps.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from orchestrator.core.policies import PolicySettings, build_policy, sees_clock
from orchestrator.core.policy_inputs import Policy, PolicyInputs
from orchestrator.core.throughput import StepModel
from orchestrator.types import Decision, NoiseStats, Verdict
from tests.unit.planted import drive, gaussian, rules

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


def timed(once_s: float, sample_s: float, workers: int = 1) -> StepModel:
    return StepModel(sample_s=sample_s, once_s=((workers, once_s),))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(("t0", "t1"), [(0.1, 0.001), (0.02, 0.005)])
@pytest.mark.parametrize("prices", [None, (3.6, 0.0), (3.6, 1e-5), (36.0, 1e-6)])
def test_without_a_rate_the_step_times_and_prices_give_the_shortest_or_cheapest_run(workers, t0, t1, prices) -> None:
    """Against every batch: what the run costs at a noise scale that stays 1000, on workers that stay."""

    def cost(batch: int) -> float:
        step = t0 + t1 * batch / workers
        if prices is not None:
            step = prices[0] * workers * step / 3600 + prices[1] * batch
        return (1 + 1000 / batch) * step

    keys = {} if prices is None else {"price_per_worker_hour": prices[0], "price_per_sample": prices[1]}
    stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=1000, low=1000, high=1000)
    inputs = PolicyInputs(stats=stats, batch=1, samples_seen=0, workers=workers, steps=timed(t0, t1, workers))
    assert policy("tradeoff", **keys)(inputs).target_batch == min(range(1, 5000), key=cost)


def test_before_the_times_tell_it_explores_within_the_cap_and_the_noise_and_says_so() -> None:
    def decide(low: float, **more) -> Decision:
        stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=2 * low, low=low, high=4 * low)
        settings = PolicySettings(name="tradeoff", deadband=1.0, max_growth=2.0)
        return build_policy(settings)(PolicyInputs(stats=stats, batch=64, samples_seen=0, **more))

    grown, held = decide(500), decide(50)
    assert (grown.target_batch, held.target_batch) == (128, 64)
    assert all("growing to learn what a step costs" in decision.reason for decision in (grown, held))
    assert "samples for a step" in decide(500, steps=timed(0.1, 0.001)).reason
    assert decide(500, steps=timed(0.1, 0.001), workers=2).target_batch == 64  # two workers were not timed
    nothing = decide(500, steps=timed(0.0, 0.001))
    assert nothing.target_batch == 64
    assert "saves no time" in nothing.reason


@pytest.mark.parametrize("name", ["tradeoff", "goodput"])
def test_where_longer_steps_take_no_longer_it_grows_to_the_noise_scale_and_says_why(name) -> None:
    """A step takes 0.1 s, a longer one even a little less: the first growth is to learn it, the others know."""
    run = drive(
        rules(name=name, total_samples=150_000, base_batch=32, cooldown_samples=1024, deadband=1.2),
        gaussian(lambda _: 1000.0, seed=2),
        time_s=lambda batch, _: 0.1 - 1e-6 * batch,
    )
    first, *others = [action.reason for _, action in run.plans]
    assert "growing to learn what a step costs" in first
    assert len(others) >= 3
    assert all("growing as longer steps took no longer" in reason for reason in others)
    assert 1000 / 1.5 < run.state.target.batch < 1000 * 1.5


def test_a_given_rate_does_not_look_at_the_clock() -> None:
    assert sees_clock(PolicySettings(name="tradeoff"))
    assert not sees_clock(PolicySettings(name="tradeoff", exchange_rate=100.0))


@pytest.mark.parametrize(
    "keys",
    [
        {"price_per_sample": 1.0},
        {"price_per_worker_hour": 1.0},
        {"price_per_worker_hour": 0.0, "price_per_sample": 1.0},
        {"price_per_worker_hour": 1.0, "price_per_sample": -1.0},
    ],
)
def test_prices_that_say_nothing_are_refused(keys) -> None:
    with pytest.raises(ValueError, match=r"controller\.price_per"):
        policy("tradeoff", **keys)


def test_a_whole_run_finds_the_rate_of_its_own_times() -> None:
    """Planted: 0.1 s a step and 0.001 s a sample, a noise scale of 1000; sqrt(1000 x 100) = 316, and 1.5 for noise."""
    rng = np.random.default_rng(0)
    run = drive(
        rules(name="tradeoff", total_samples=150_000, base_batch=32, cooldown_samples=1024, deadband=1.2),
        gaussian(lambda _: 1000.0, seed=2),
        time_s=lambda batch, _: (0.1 + 0.001 * batch) * float(np.exp(0.05 * rng.standard_normal())),
    )
    assert 316 / 1.5 < run.state.target.batch < 316 * 1.5
    assert "growing to learn" in run.plans[0][1].reason
    assert "samples for a step" in run.plans[1][1].reason
