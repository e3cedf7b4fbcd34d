"""What a run that only advised says at its end: the schedule that the policy would have chosen, and what it saves.

Costs are those of McCandlish et al. 2018, arXiv:1812.06162, appendix D: at noise scale S and batch B the progress of a
step without noise takes 1 + S / B steps and S + B samples.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.core import noise
from orchestrator.core.advising import Stretch, advise, follow_plan
from orchestrator.core.lr_rules import build_rule
from orchestrator.core.policies import PolicySettings, build_policy
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.types import Decision, GradMeasured, Keep, NoiseStats, Verdict
from tests.unit.planted import COOLDOWN, EVERY, drive, gaussian, rules, without_guard

FREE = {"deadband": 1.0, "max_growth": 1e9, "shrink": True}


def known(scale: float) -> NoiseStats:
    return NoiseStats(verdict=Verdict.MEASURED, noise_scale=scale, low=scale, high=scale)


def stretch(scale: float | None, *, samples: int = EVERY, loss: float = 1.0, lr: float = 0.1) -> Stretch:
    stats = NoiseStats(verdict=Verdict.TOO_NOISY, noise_scale=7e7) if scale is None else known(scale)
    return Stretch(samples=samples, mean_loss=loss, lr=lr, stats=stats)


def cost(progress: float, schedule: list[tuple[float, int]], scale: float) -> tuple[float, float]:
    """Steps and samples of ``progress`` at a constant noise scale; ``schedule`` holds (samples seen, batch)."""
    steps = samples = 0.0
    for (begin, batch), (end, _) in pairwise([*schedule, (math.inf, 0)]):
        part = min(progress, (end - begin) / (scale + batch))
        progress -= part
        steps, samples = steps + part * (1 + scale / batch), samples + part * (scale + batch)
    return steps, samples


def test_a_constant_noise_scale_is_climbed_to_within_the_limits_and_costs_what_the_model_says() -> None:
    settled, total = rules(ceiling=640), 64 * EVERY
    found = advise([stretch(1000.0)] * 64, settled)
    assert found is not None
    assert [batch for _, batch in found.schedule] == [64, 128, 256, 512, 640]
    assert found.schedule[0][0] == EVERY
    in_force = [(0.0, 32)]
    for seen, batch in found.schedule:  # lag_steps of the batch before
        in_force.append((seen + settled.lag_steps * in_force[-1][1], batch))
    assert all(b - a >= COOLDOWN for (a, _), (b, _) in zip(in_force[1:], found.schedule[1:], strict=False))
    steps, samples = cost(total / 1032, in_force, 1000.0)
    assert found.steps == math.ceil(steps)
    assert found.samples == pytest.approx(samples, abs=1)
    assert (found.fixed_steps, found.fixed_samples, found.unmeasured_samples) == (total // 32, total, 0)


@pytest.mark.parametrize("rate", [300.0, 2000.0, 10_000.0])
def test_a_noise_scale_that_rises_as_the_root_of_progress_gives_the_integrals_and_their_gain(rate) -> None:
    """B = sqrt(r S) with S = 4000 sqrt(s / s0): the excess is 24/25, and the costs are integrals over s."""
    least_steps = 2000
    scales = [4000 * math.sqrt((s + 0.5) / least_steps) for s in range(least_steps)]
    policy = without_guard(build_policy(PolicySettings(name="tradeoff", exchange_rate=rate, **FREE)))
    settled = rules(base_batch=1024, every_samples=1, lag_steps=1, policy=policy)
    found = advise([stretch(scale, samples=round(1024 + scale)) for scale in scales], settled)
    assert found is not None
    least_samples = math.fsum(scales)
    steps = math.fsum(1 + math.sqrt(scale / rate) for scale in scales)
    samples = math.fsum(scale + math.sqrt(rate * scale) for scale in scales)
    assert found.steps == pytest.approx(steps, rel=0.005)
    assert found.samples == pytest.approx(samples, rel=0.005)
    assert (found.steps / least_steps - 1) * (found.samples / least_samples - 1) == pytest.approx(24 / 25, rel=0.01)
    assert found.fixed_steps == pytest.approx(math.fsum(1 + scale / 1024 for scale in scales), rel=0.001)


@pytest.mark.parametrize("seed", range(3))
def test_the_first_change_is_the_one_that_the_acting_controller_makes(seed) -> None:
    acting = rules(total_samples=40_000)
    advising = replace(acting, act=False)
    state, found, samples = noise.init(advising.noise), [], 0
    run = drive(advising, gaussian(lambda seen: 400.0, seed=seed))
    for event, action in run.history:
        assert isinstance(event, GradMeasured)
        state, samples = noise.absorb(state, event.sample, advising.noise), samples + event.sample.batch
        if isinstance(action, Keep) and action.target_batch is not None:
            stats = noise.stats(state, advising.noise)
            found.append(Stretch(samples=samples, mean_loss=1.0, lr=0.1, stats=stats))
            samples = 0
    advice = advise(found, advising)
    assert advice is not None
    seen, first = drive(acting, gaussian(lambda seen: 400.0, seed=seed)).plans[0]
    assert advice.schedule[0] == (seen, first.target.batch)
    # So long as the virtual batch is the run's own, the last one known before stands for a stretch that was not.
    assert advice.unmeasured_samples == sum(s.samples for s in found if not s.stats.bounded)


def test_the_guard_holds_a_rise_that_the_growth_itself_would_explain() -> None:
    rising = [stretch(100.0 * 1.004**k) for k in range(100)]
    falling = [replace(s, mean_loss=5.0 - 0.01 * k) for k, s in enumerate(rising)]
    held, free = (advise(trace, rules(ceiling=4096, deadband=1.1)) for trace in (rising, falling))
    assert held is not None
    assert free is not None
    assert max(batch for _, batch in held.schedule) <= 110  # what the noise scale was at the first growth
    assert max(batch for _, batch in free.schedule) >= 125


@pytest.mark.parametrize(("rule", "largest"), [("constant", 100), ("linear", 200)])
def test_the_guard_sees_the_rate_that_the_rule_would_have_given(rule, largest) -> None:
    """A doubling is more than the growth explains only where the rate grew with the batch."""
    trace = [stretch(100.0)] * 10 + [stretch(200.0)] * 30
    found = advise(trace, rules(ceiling=4096, lr_rule=build_rule(rule)))
    assert found is not None
    assert max(batch for _, batch in found.schedule) == largest


def test_a_batch_that_is_right_stays_and_saves_nothing() -> None:
    found = advise([stretch(20.0)] * 9, rules())
    assert found is not None
    assert found.schedule == ()
    assert (found.steps, found.samples) == (found.fixed_steps, found.fixed_samples)
    assert "stayed as it was" in found.sentence()


def test_where_nothing_was_known_the_last_noise_scale_stands_for_it() -> None:
    scales = [None, None, 100.0, 100.0, None, 900.0, None]
    carried = [100.0] * 5 + [900.0] * 2
    settled = rules(policy=build_policy(PolicySettings(name="fixed")))
    found = advise([stretch(scale) for scale in scales], settled)
    grown = advise([stretch(scale) for scale in scales], rules(deadband=1.0, max_growth=1e9, cooldown_samples=0))
    assert found is not None
    assert grown is not None
    assert (found.steps, found.samples, found.unmeasured_samples) == (7 * 32, 7 * EVERY, 4 * EVERY)
    first, batch = grown.schedule[0]
    assert (first, batch) == (3 * EVERY, 100)  # at the end of the first stretch that was measured
    # 32 until two steps after that, then 100; the 900 is heard of too late to take effect.
    assert grown.schedule[1:] == ((8236, 900),)
    done, samples = (3 * EVERY + 64) / 132, 3 * EVERY + 64.0
    for scale, progress in zip(carried, (EVERY / (32 + scale) for scale in carried), strict=True):
        done -= progress
        if done < 0:
            samples, done = samples - done * (100 + scale), 0.0
    assert grown.samples == pytest.approx(samples, abs=1)
    assert "for 4,096 of the run's own samples the noise scale was not known" in grown.sentence()


@pytest.mark.parametrize("samples", [200_000, 70_003])
@pytest.mark.parametrize(
    "own",
    [
        {"name": "decay_to_growth", "schedule": lambda seen: 1 - seen / 200_000},
        {"name": "decay_to_growth", "schedule": lambda seen: max(0.0, 1 - abs(seen - 5500) / 100_000)},  # a top between
        {"name": "decay_to_growth", "schedule": lambda seen: 0.5 ** (seen // 30_000), "every_samples": 5000},
        {"name": "schedule", "ramp": ((3000, 64), (9000, 200), (50_000, 40)), "shrink": True},
    ],
    ids=["line", "top", "milestones", "ramp"],
)
def test_the_advice_of_a_plan_is_what_the_acting_controller_does(own, samples) -> None:
    settled = rules(deadband=1.1, lag_steps=3, **own)
    found = follow_plan(replace(settled, act=False), samples=samples)
    run = drive(replace(settled, total_samples=samples), gaussian(lambda seen: 400.0, seed=0))
    assert list(found.schedule) == [(seen, action.target.batch) for seen, action in run.plans]
    assert len(found.schedule) >= 2
    assert (found.steps, found.samples) == (len(run.history), samples)
    assert (found.fixed_steps, found.fixed_samples) == (-(-samples // 32), samples)
    assert f"in {found.steps:,}" not in found.sentence()
    assert (
        f"{found.steps:,} steps instead of {found.fixed_steps:,} for the same {samples:,} samples" in found.sentence()
    )


def test_a_policy_that_looks_at_the_schedule_is_shown_the_peak_at_which_a_step_began() -> None:
    """Its top is over one step alone, far from the decisions on either side."""
    shown: dict[int, float] = {}

    def looking(inputs: PolicyInputs) -> Decision:
        shown[inputs.samples_seen] = inputs.peak_lr_fraction
        return Decision(target_batch=32, reason="looked")

    top = rules(policy=looking, schedule=lambda seen: 1.0 if seen == 1600 else 0.25)
    assert advise([stretch(1000.0)] * 4, top) is not None
    assert shown == {1024: 0.25, 2048: 1.0, 3072: 1.0}


@pytest.mark.parametrize("trace", [[], [stretch(None)], [stretch(None)] * 30])
def test_without_any_measurement_there_is_no_advice(trace) -> None:
    assert advise(trace, rules()) is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.none() | st.floats(1, 1e6), st.integers(1, 3000), st.floats(0, 9)), min_size=1, max_size=30),
    st.integers(1, 300),
    st.sampled_from([256, 1024, 10_000]),
)
def test_any_record_gives_a_ramp_that_rises_and_the_costs_of_its_growth(record, base_batch, every_samples) -> None:
    settled = rules(base_batch=base_batch, every_samples=every_samples, ceiling=4096, cooldown_samples=500)
    found = advise([stretch(scale, samples=n, loss=loss) for scale, n, loss in record], settled)
    if all(scale is None for scale, _, _ in record):
        assert found is None
        return
    assert found is not None
    sizes = [base_batch, *(batch for _, batch in found.schedule)]
    assert all(a < b <= min(4096, max(2 * a, a + 1)) for a, b in pairwise(sizes))
    assert all(a < b for a, b in pairwise([0, *(seen for seen, _ in found.schedule)]))
    # A larger batch takes no more steps and no fewer samples, up to the rounding of both.
    assert found.steps <= found.fixed_steps
    assert found.samples >= found.fixed_samples - 1
