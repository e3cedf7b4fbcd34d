"""The one brain: when it decides, on what evidence, and what its plans hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from orchestrator.core import codec, controller, noise
from orchestrator.core.companions import Jump
from orchestrator.core.controller import advance
from orchestrator.core.lr_rules import build_rule
from orchestrator.core.noise import NoiseSettings
from orchestrator.core.policies import PolicySettings, build_policy
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.core.ramp import InForce
from orchestrator.runtime.announcement import Announcement
from orchestrator.runtime.brain import decode_state, encode_state
from orchestrator.runtime.run_state import RunState
from orchestrator.types import ApplyPlan, Decision, Keep, NoiseStats, Preempted, SaveCheckpoint, Stop, Target, Verdict
from tests.unit.planted import (
    COOLDOWN,
    EVERY,
    World,
    drive,
    gaussian,
    level,
    measured,
    rules,
    scripted,
    steps,
    wandering,
)

# --- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [32, 48, 1000, 2500])
def test_decisions_are_taken_only_where_a_multiple_of_every_samples_is_passed(batch) -> None:
    settled = rules(base_batch=batch, total_samples=50_000, policy=scripted(grow_at={}))
    run = drive(settled, level)
    for (event, action), before in zip(run.history[:-1], range(0, 10**9, batch), strict=False):
        seen = event.sample.samples_seen
        assert isinstance(action, Keep)
        assert action.target_batch == (batch if seen // 1024 > before // 1024 else None)


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_a_decision_takes_effect_lag_steps_later_and_none_is_taken_meanwhile(lag) -> None:
    asked: list[int] = []

    def doubling(inputs: PolicyInputs) -> Decision:
        asked.append(inputs.samples_seen)
        return Decision(target_batch=2 * inputs.batch, reason="double")

    settled = rules(policy=doubling, lag_steps=lag, every_samples=64, total_samples=64_000)
    run = drive(settled, level)
    pending_until, target = -1, 32
    sizes = {event.sample.step: event.sample.batch for event, _ in run.history[:-1]}  # the last is what was left
    for event, action in run.history[:-1]:
        step = event.sample.step
        if isinstance(action, ApplyPlan):
            assert step + 1 >= pending_until, "a decision while another was on its way"
            assert action.effective_step == step + 1 + lag
            assert action.target.batch == action.plan.batch == 2 * target
            assert {sizes.get(step + 1 + i, target) for i in range(lag)} == {target}
            pending_until, target = action.effective_step, action.target.batch
            assert sizes.get(pending_until, target) == target
        elif isinstance(action, Keep) and action.target_batch is not None:
            assert str(target) in action.reason
            assert f"step {pending_until}" in action.reason
    assert len(run.plans) >= 4
    assert len(asked) == len(run.plans), "the policy is asked only when nothing is pending"


def test_every_plan_has_a_new_generation_and_the_steps_after_it_belong_to_it() -> None:
    run = drive(rules(policy=scripted(grow_at={2000: 64, 9000: 128, 20_000: 96}), total_samples=40_000), level)
    generations = [action.plan.generation for _, action in run.plans]
    assert generations == [1, 2, 3]
    assert [action.target.batch for _, action in run.plans] == [64, 128, 96]


@pytest.mark.parametrize("extra", [0, 7])
def test_it_stops_when_all_samples_are_seen(extra) -> None:
    settled = rules(total_samples=320)
    state, actions = steps(settled, 9)
    assert not any(isinstance(action, Stop) for action in actions)
    _, action = advance(state, measured(9, 320 + extra, 32 + extra), settled)
    assert isinstance(action, Stop)
    assert "320" in action.reason


def test_a_preemption_asks_for_a_checkpoint_and_changes_nothing() -> None:
    settled = rules()
    state, _ = steps(settled, 5)
    after, action = advance(state, Preempted(why="spot price"), settled)
    assert after == state
    assert isinstance(action, SaveCheckpoint)
    assert "spot price" in action.reason


# --- what ------------------------------------------------------------------------------------------------------------


def test_the_rate_follows_the_rule_from_the_base_batch_and_the_noise_scale_of_the_decision() -> None:
    run = drive(rules(lr_rule=build_rule("noise_scale"), total_samples=60_000), gaussian(lambda seen: 400.0, seed=3))
    assert len(run.plans) >= 3
    for _, action in run.plans:
        scale, batch = action.target.noise_scale, action.target.batch
        assert scale is not None
        assert action.lr_factor == pytest.approx((1 + scale / 32) / (1 + scale / batch), rel=1e-12)


def test_a_change_without_a_bounded_interval_keeps_the_last_noise_scale_for_the_rate() -> None:
    settled = rules(policy=scripted(grow_at={0: 64}), lr_rule=build_rule("noise_scale"))
    state, _ = steps(settled, 31)
    known = replace(state, target=Target(batch=32, noise_scale=77.0))
    for start, expected in ((state, None), (known, 77.0)):
        _, action = advance(start, measured(31, 1024, 32), settled)
        assert isinstance(action, ApplyPlan)
        assert action.target.noise_scale == expected


def test_an_old_noise_scale_goes_on_in_the_rate_and_is_not_what_the_second_moments_are_restated_by() -> None:
    """A ramp's second change, 100,000 samples after the first, at which the interval has no upper end."""
    ramp = build_policy(PolicySettings(name="schedule", ramp=((1000, 64), (100_000, 512)), floor=32, ceiling=4096))
    settled = rules(policy=ramp, lr_rule=build_rule("noise_scale"))
    run = RunState(settled, ramp_samples=0)
    run.begin(step=0, samples_seen=0, pending=None, in_force=None)
    state = controller.init(settled, world_size=1)
    run.adopt(controller.current_plan(state, settled, reason="the run begins"))
    jumps = []
    for seen, stats in (
        (1024, NoiseStats(verdict=Verdict.MEASURED, noise_scale=50.0, low=40.0, high=60.0)),
        (100_352, NoiseStats(verdict=Verdict.TOO_NOISY, noise_scale=9000.0, low=4000.0)),
    ):
        state = replace(state, samples_seen=seen, loss_sum=1.0, loss_samples=1)
        state, action = controller.decide(state, stats=stats, lr=0.1, rules=settled)
        assert isinstance(action, ApplyPlan)
        assert action.target.noise_scale == 50.0
        heard = Announcement.decode(Announcement(plan=action).encode()).plan
        assert heard is not None
        jumps.append(run.adopt(heard))
        state = replace(state, target=action.target, pending=None)
    assert jumps == [Jump(old_batch=32, new_batch=64, noise_scale=50.0), Jump(old_batch=64, new_batch=512)]
    assert run.in_force is not None
    saved = json.loads(json.dumps(codec.encode(run.in_force)))
    assert codec.decode(saved, {"InForce": InForce, "Target": Target}) == run.in_force
    assert not run.in_force.target.fresh


@pytest.mark.parametrize("seed", range(3))
def test_advise_never_changes_the_target_and_states_its_wish(seed) -> None:
    acting = drive(rules(total_samples=40_000), wandering(seed))
    advising = drive(rules(total_samples=40_000, act=False, measurable=False), wandering(seed))
    assert {event.sample.batch for event, _ in advising.history} == {32}
    assert all(isinstance(action, Keep) for _, action in advising.history[:-1])
    wishes = [(e.sample.samples_seen, a.wish, a.reason) for e, a in advising.history[:-1] if a.wish is not None]
    seen, plan = acting.plans[0]
    assert wishes[0] == (seen, plan.target.batch, f"advise only: {plan.reason}")


# --- the signal decides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_constant_noise_scale_below_the_floor_never_grows_the_batch(seed) -> None:
    run = drive(rules(total_samples=60_000), gaussian(lambda seen: 16.0, seed=seed))
    assert noise.stats(run.state.noise, rules().noise).bounded, "a signal is there, it says small"
    assert run.batches == [(0, 32)]


@hypothesis_settings(max_examples=50)
@given(st.integers(0, 2**32), st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.sampled_from([1, 7, 32]))
def test_an_unbounded_interval_never_grows_the_batch(seed, loud, trace, every) -> None:
    """|G|^2 that averages to less than nothing, as on memorised data, however loud and however often it is read."""
    rng = np.random.default_rng(seed)

    def unbounded(seen: int, batch: int, factor: float) -> dict[str, Any]:
        if (seen // 32) % every % 2:
            return {"loss": 1.0, "lr": 0.1}  # not measured
        reading = loud * float(rng.standard_normal() - 0.5)
        return {"grad_sq": reading, "trace_cov": trace * float(rng.chisquare(50)) / 50, "loss": 1.0, "lr": 0.1}

    run = drive(rules(total_samples=6000, every_samples=128, cooldown_samples=0), unbounded)
    assert run.batches == [(0, 32)]
    assert not noise.stats(run.state.noise, rules().noise).bounded


@pytest.mark.parametrize("seed", range(4))
def test_every_change_is_founded_on_a_bounded_interval_above_the_batch(seed) -> None:
    settled = rules(total_samples=60_000)
    state, changes = controller.init(settled, world_size=1), 0
    for event, expected in drive(settled, wandering(seed)).history:
        batch = state.target.batch
        state, action = advance(state, event, settled)
        assert action == expected, "advance is a function"
        if isinstance(action, ApplyPlan):
            found = noise.stats(state.noise, settled.noise)
            assert found.bounded
            assert found.low is not None
            assert found.low > batch
            changes += 1
    assert changes >= 2


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_step_is_followed_within_one_cooldown(seed) -> None:
    """From half the batch to twelve times it, through ``noise.absorb``; a cooldown is eight half-lives here."""
    at, cooldown = 20_000, 8192
    settled = rules(total_samples=45_000, cooldown_samples=cooldown, noise=NoiseSettings(half_life_samples=1024))
    run = drive(settled, gaussian(lambda seen: 16.0 if seen < at else 400.0, seed=seed))
    assert run.plans
    first = run.plans[0][0]
    print(f"followed after {first - at} samples, {(first - at) / 1024:.1f} half-lives")
    assert at < first <= at + cooldown
    assert run.largest >= 128


def at_rate(lr: Callable[[int], float], *, seed: int) -> World:
    """A noise scale of 1000 under a learning rate by samples seen; the batch has reason to grow all the while."""
    inner = gaussian(lambda seen: 1000.0, seed=seed)
    return lambda seen, batch, factor: inner(seen, batch, factor) | {"lr": lr(seen)}


@pytest.mark.parametrize("factor", [0.1, 10.0, 0.0])
def test_after_a_jump_of_the_rate_the_estimate_is_given_a_cooldown_before_it_is_acted_on(factor) -> None:
    settled = rules(total_samples=60_000)
    usual = [seen for seen, _ in drive(settled, at_rate(lambda seen: 0.1, seed=3)).plans]
    jump = usual[1] - EVERY // 2  # so that it is first heard of where the batch would change
    run = drive(settled, at_rate(lambda seen: 0.1 if seen < jump else 0.1 * factor, seed=3))
    found = [seen for seen, _ in run.plans]
    assert found[0] == usual[0]
    assert usual[1] + COOLDOWN <= found[1] <= usual[1] + COOLDOWN + 2 * EVERY


def test_a_rate_that_moves_little_between_decisions_makes_nobody_wait() -> None:
    settled = rules(total_samples=60_000)

    def cosine(seen: int) -> float:
        return 0.1 * max(0.02, 0.5 * (1 + math.cos(math.pi * seen / 60_000)))

    def warmed(seen: int) -> float:
        return 0.1 * min(1.0, (seen + 32) / 4096)

    usual, *others = (drive(settled, at_rate(lr, seed=3)).batches for lr in (lambda seen: 0.1, cosine, warmed))
    assert len(usual) > 3
    assert all(other == usual for other in others)


def test_the_cooldown_of_a_jump_survives_a_checkpoint() -> None:
    settled = rules()
    state, _ = steps(settled, 33, lr=0.1)
    again = decode_state(encode_state(state))
    assert again == state
    for step in range(33, 64):
        again, _ = advance(again, measured(step, 32 * (step + 1), 32, lr=0.01), settled)
    assert (again.last_change_samples, again.lr) == (2048, 0.01)
