"""Workers are asked for when that saves more time than the resize costs, once, and within the limits."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.core import controller
from orchestrator.core.controller import Rules, advance
from orchestrator.core.planner import WorkerLimits
from orchestrator.types import ApplyPlan, Keep, WorkersChanged
from tests.unit.planted import measured, requests, rules, scripted, steps


def asking(total_samples: int, **changes: Any) -> Rules:
    """Batch 64 in 8 micro-batches on one worker; two workers would take 4 each. A resize is said to cost 10 s."""
    limits = WorkerLimits(minimum=1, maximum=2, micro_batches_each=2)
    base: dict[str, Any] = {"workers": limits, "resize_when": "saves_time", "every_samples": 10**6, "base_batch": 64}
    return rules(total_samples=total_samples, **(base | changes))


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
