"""The one brain: when it decides, what it remembers, and what only a clock may influence."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from orchestrator.core import controller, noise
from orchestrator.core.controller import ControllerState, Rules, advance
from orchestrator.core.lr_rules import build_rule
from orchestrator.core.noise import NoiseSettings
from orchestrator.core.planner import WorkerLimits
from orchestrator.core.policies import PolicyInputs
from orchestrator.runtime.brain import decode_state, encode_state
from orchestrator.types import (
    ApplyPlan,
    Decision,
    Event,
    GradMeasured,
    Keep,
    PlanRejected,
    Preempted,
    RequestWorkers,
    SaveCheckpoint,
    Stop,
    Target,
    WorkersChanged,
)
from tests.unit.planted import Run, drive, gaussian, measured, rules


def scripted(*, grow_at: dict[int, int]):
    """A policy that wants ``grow_at[n]`` once n samples were seen, and otherwise what there is."""

    def propose(inputs: PolicyInputs) -> Decision:
        wanted = [batch for seen, batch in sorted(grow_at.items()) if seen <= inputs.samples_seen]
        return Decision(target_batch=wanted[-1] if wanted else inputs.batch, reason=f"the script at {len(wanted)}")

    return propose


def level(seen: int, batch: int, factor: float) -> dict[str, Any]:
    """Every step reads the same."""
    return {"grad_sq": 1.0, "trace_cov": 50.0, "loss": 1.0, "lr": 0.1}


def steps(settled: Rules, count: int, *, world_size: int = 1, **more: Any) -> tuple[ControllerState, list]:
    """``count`` steps at the target, and their actions."""
    state, actions = controller.init(settled, world_size=world_size), []
    for step in range(count):
        batch = state.target.batch
        state, action = advance(state, measured(step, state.samples_seen + batch, batch, **more), settled)
        actions.append(action)
    return state, actions


def wandering(seed: int):
    """A noise scale that rises thirty-fold over the run, by planted Gaussian micro-gradients."""
    return gaussian(lambda seen: 30.0 * 30.0 ** (seen / 60_000), seed=seed)


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


# --- what it remembers -----------------------------------------------------------------------------------------------


def eventful(step: int) -> list[Event]:
    """Workers come and go and memory runs out on the way."""
    return {
        40: [WorkersChanged(world_size=2, resize_cost_s=3.5)],
        90: [PlanRejected(max_micro_batch=4), PlanRejected(max_micro_batch=2)],
        200: [Preempted(why="planted"), WorkersChanged(world_size=1)],
    }.get(step, [])


LIVELY = {
    "workers": WorkerLimits(minimum=1, maximum=4, micro_batches_each=2),
    "resize_when": "saves_time",
    "resize_cost_s": 0.01,
    "lr_rule": build_rule("noise_scale"),
}


def test_the_state_survives_encoding_at_every_event() -> None:
    settled = rules(total_samples=30_000, **LIVELY)
    run = drive(settled, wandering(1), between=eventful)
    state = controller.init(settled, world_size=1)
    for event, action in run.history:
        read = decode_state(encode_state(state))
        assert read == state
        state, found = advance(read, event, settled)
        assert found == action
    assert state == run.state
    kinds = {type(action) for _, action in run.history}
    assert kinds == {Keep, ApplyPlan, RequestWorkers, SaveCheckpoint, Stop}


def test_events_of_absorbed_steps_change_nothing() -> None:
    settled = rules(total_samples=30_000, **LIVELY)
    run = drive(settled, wandering(0))
    state, known = controller.init(settled, world_size=1), []
    for event, _ in run.history:
        state, _ = advance(state, event, settled)
        known.append(event)
        for old in known[-3:]:
            again, action = advance(state, old, settled)
            assert again == state
            assert isinstance(action, Keep)
            assert action.target_batch is None


def test_decisions_recomputed_from_rows_of_metrics_equal_the_first_runs() -> None:
    """What a replay has: floats through JSON, no clock, no cluster, no memory errors. The target needs none of them."""
    settled = rules(total_samples=50_000, **LIVELY)
    run = drive(settled, wandering(1), between=eventful)
    rows, first = [], []
    for event, action in run.history:
        if not isinstance(event, GradMeasured):
            continue
        s = event.sample
        rows.append(json.dumps({
            "step": s.step, "samples_seen": s.samples_seen, "global_batch": s.batch, "micro_batches": s.micro_batches,
            "loss": s.loss, "lr": s.lr, "grad_sq": s.grad_sq, "trace_cov": s.trace_cov,
        }))  # fmt: skip
        first.append(decision(action))
    state, again = controller.init(settled, world_size=1), []
    for row in map(json.loads, rows):
        batch = row.pop("global_batch")
        state, action = advance(state, measured(row.pop("step"), row.pop("samples_seen"), batch, **row), settled)
        again.append(decision(action))
    assert again == first
    assert len({entry[1] for entry in first if entry and entry[0] == "change"}) >= 3
    assert state.noise == run.state.noise
    assert state.guard == run.state.guard


def decision(action: Any) -> tuple | None:
    if isinstance(action, ApplyPlan):
        return ("change", action.target, action.effective_step, action.lr_factor, action.reason)
    if not isinstance(action, Keep) or action.target_batch is None:
        return None
    return ("keep", action.target_batch, action.reason)


def test_a_step_with_a_broken_loss_takes_no_decision_down() -> None:
    settled = rules(total_samples=60_000)
    world = wandering(2)

    def broken(seen: int, batch: int, factor: float) -> dict[str, Any]:
        bad = {"loss": math.nan, "grad_sq": None, "trace_cov": None}
        return world(seen, batch, factor) | (bad if 9000 < seen < 9100 else {})

    run = drive(settled, broken)
    assert len(run.plans) >= 2
    assert math.isfinite(run.state.loss_sum)
    assert decode_state(encode_state(run.state)) == run.state


# --- layout ----------------------------------------------------------------------------------------------------------


def test_other_workers_keep_the_target_and_plan_again() -> None:
    settled = rules(base_batch=64)
    state, _ = steps(settled, 5)
    for world_size in (2, 4, 3, 1):
        state, action = advance(state, WorkersChanged(world_size=world_size), settled)
        assert isinstance(action, ApplyPlan)
        assert (action.plan.world_size, action.plan.batch, action.plan.micro_batch) == (world_size, 64, 8)
        assert action.target == Target(batch=64)
        assert action.effective_step == 5
        assert action.plan.generation == state.generation
    assert state.generation == 4


@pytest.mark.parametrize("event", [WorkersChanged(world_size=3), PlanRejected(max_micro_batch=4)])
def test_a_pending_target_survives_and_is_planned_for_what_there_is_now(event) -> None:
    settled = rules(policy=scripted(grow_at={0: 128}))
    state, actions = steps(settled, 32)
    assert isinstance(actions[-1], ApplyPlan)
    changed, now = advance(state, event, settled)
    later = controller.pending_plan(changed, settled)
    assert isinstance(now, ApplyPlan)
    assert later is not None
    assert (now.plan.batch, later.plan.batch) == (32, 128)
    assert later.effective_step == actions[-1].effective_step
    assert later.target == actions[-1].target
    assert later.plan.world_size == changed.world_size
    assert max(later.plan.sizes) <= (4 if isinstance(event, PlanRejected) else 8)
    assert now.plan.generation == later.plan.generation > actions[-1].plan.generation


def test_memory_that_ran_out_halves_the_micro_batch_for_good_and_keeps_the_batch() -> None:
    settled = rules(base_batch=64, policy=scripted(grow_at={3000: 128}))
    state, _ = steps(settled, 5)
    for limit in (4, 2, 4):  # a late word of a milder limit does not raise it again
        state, action = advance(state, PlanRejected(max_micro_batch=limit), settled)
        assert isinstance(action, ApplyPlan)
        assert action.plan.batch == 64
        assert action.plan.micro_batch == min(limit, state.max_micro_batch or limit)
    assert action.plan.micro_batch == 2
    state, action = advance(state, WorkersChanged(world_size=2), settled)
    assert isinstance(action, ApplyPlan)
    assert action.plan.sizes == (2,) * 32
    for step in range(5, 60):
        state, action = advance(state, measured(step, 64 * (step + 1), 64), settled)
        if isinstance(action, ApplyPlan):
            break
    assert isinstance(action, ApplyPlan)
    assert action.plan.sizes == (2,) * 64


@pytest.mark.parametrize(("measurable", "micro_batch"), [(True, 4), (False, 8)])
def test_a_batch_of_one_micro_batch_is_cut_only_where_it_must_be_measured(measurable, micro_batch) -> None:
    settled = rules(base_batch=8, measurable=measurable)
    state = controller.init(settled, world_size=1)
    assert controller.current_plan(state, settled, reason="the run begins").plan.micro_batch == micro_batch


# --- workers ---------------------------------------------------------------------------------------------------------


def asking(total_samples: int, **changes: Any) -> Rules:
    """Batch 64 in 8 micro-batches on one worker; two workers would take 4 each. A resize is said to cost 10 s."""
    limits = WorkerLimits(minimum=1, maximum=2, micro_batches_each=2)
    base: dict[str, Any] = {"workers": limits, "resize_when": "saves_time", "every_samples": 10**6, "base_batch": 64}
    return rules(total_samples=total_samples, **(base | changes))


def requests(actions: list) -> list[tuple[int, int]]:
    """(step, workers) of every request, whether alone or beside a decision to hold."""
    asked = [action.workers if isinstance(action, Keep) else action for action in actions]
    return [(i, a.num_workers) for i, a in enumerate(asked) if isinstance(a, RequestWorkers)]


@pytest.mark.parametrize(("left", "expected"), [(25, []), (26, [(7, 2)])])
def test_workers_are_asked_for_when_the_saving_exceeds_the_cost(left, expected) -> None:
    """0.1 s a micro-batch, four fewer a step: 0.4 s saved in each step that is left after the eighth, at 10 s."""
    settled = asking(64 * (8 + left))
    _, actions = steps(settled, 8 + left - 1, step_time_s=0.8)
    assert requests(actions) == expected


@pytest.mark.parametrize(("cost", "expected"), [(2.0, [(7, 2)]), (39.0, [(7, 2)]), (41.0, [])])
def test_the_measured_cost_of_a_resize_replaces_the_assumed_one(cost, expected) -> None:
    settled = asking(64 * 108, resize_cost_s=1e9 if cost < 40 else 0.0)
    state = controller.init(settled, world_size=1)
    state, _ = advance(state, WorkersChanged(world_size=1, resize_cost_s=cost), settled)
    state, _ = advance(state, WorkersChanged(world_size=1), settled)  # this one was not measured
    actions = []
    for step in range(100):
        state, action = advance(state, measured(step, 64 * (step + 1), 64, step_time_s=0.8), settled)
        actions.append(action)
    assert requests(actions) == expected
    if expected:
        assert f"{cost:.1f} s" in actions[7].reason


def test_nothing_is_asked_for_before_steps_were_timed_and_a_single_pause_does_not_count() -> None:
    settled = asking(64 * 1000)
    assert requests(steps(settled, 200)[1]) == []
    state, asked = controller.init(settled, world_size=1), []
    for step in range(200):
        slow = 1e6 if step % 10 == 0 else 1e-6
        state, action = advance(state, measured(step, 64 * (step + 1), 64, step_time_s=slow), settled)
        asked.append(action)
    assert requests(asked) == []


@pytest.mark.parametrize(("when", "expected"), [("never", []), ("always", [(0, 2)])])
def test_never_and_always_do_not_ask_the_clock(when, expected) -> None:
    settled = asking(64 * 1000, resize_when=when)
    assert requests(steps(settled, 100, step_time_s=1e3)[1]) == expected


def test_a_request_is_made_once_and_its_workers_are_planned_for() -> None:
    settled = asking(64 * 10_000)
    state, actions = steps(settled, 50, step_time_s=0.8)
    assert requests(actions) == [(7, 2)]
    state, action = advance(state, WorkersChanged(world_size=2, resize_cost_s=5.0), settled)
    assert isinstance(action, ApplyPlan)
    assert (action.plan.world_size, action.plan.accum_steps, action.plan.batch) == (2, 4, 64)
    for step in range(50, 100):
        state, action = advance(state, measured(step, 64 * (step + 1), 64, step_time_s=0.4), settled)
        assert isinstance(action, Keep)


@pytest.mark.parametrize(("batch", "expected"), [(64, None), (32, None), (16, 1)])
def test_workers_are_given_back_only_when_some_would_be_idle(batch, expected) -> None:
    """Four workers and micro-batches of 8: at 32 each still has one, though two each are preferred."""
    limits = WorkerLimits(minimum=1, maximum=4, micro_batches_each=2)
    settled = asking(10**6, workers=limits, resize_when="always", base_batch=batch)
    _, actions = steps(settled, 30, world_size=4)
    found = requests(actions)
    assert found == ([] if expected is None else [(0, expected)])


def test_a_decision_to_hold_may_ask_for_workers_besides() -> None:
    settled = asking(10**6, resize_when="always", every_samples=64, policy=scripted(grow_at={}))
    _, actions = steps(settled, 5)
    assert requests(actions) == [(0, 2)]
    assert [action.target_batch for action in actions] == [64] * 5


def test_no_more_and_no_fewer_workers_than_the_limits_are_asked_for() -> None:
    for batch, world, expected in ((1024, 2, 3), (8, 3, 2)):
        limits = WorkerLimits(minimum=2, maximum=3, micro_batches_each=1)
        settled = asking(10**6, workers=limits, resize_when="always", base_batch=batch)
        assert requests(steps(settled, 3, world_size=world)[1]) == [(0, expected)]


def test_nothing_is_asked_for_while_a_decision_is_on_its_way() -> None:
    settled = asking(10**6, resize_when="always", every_samples=64, lag_steps=5, policy=scripted(grow_at={0: 128}))
    _, actions = steps(settled, 12)
    assert isinstance(actions[0], ApplyPlan)
    assert [i for i, _ in requests(actions)] == [5], "once the step before the batch of 128 is done"


def test_the_clock_never_touches_the_target() -> None:
    world = dict(total_samples=40_000, **LIVELY)
    runs: list[Run] = [drive(rules(**world), wandering(4), time_s=time_s) for time_s in (1e-4, 10.0)]
    assert runs[0].batches == runs[1].batches
    asked = [len(requests([action for _, action in run.history])) for run in runs]
    assert asked[0] != asked[1], "what it may touch, it touched"
