"""Other workers or less memory change how a batch is laid out, and never the batch."""

from __future__ import annotations

import pytest

from orchestrator.core import controller
from orchestrator.core.controller import advance
from orchestrator.types import ApplyPlan, PlanRejected, Target, WorkersChanged
from tests.unit.planted import measured, rules, scripted, steps


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
