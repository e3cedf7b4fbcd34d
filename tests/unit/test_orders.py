"""Orders to a running job: never exceeded, a hold keeps, and what cannot be done is refused with the reason."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.core import controller, orders
from orchestrator.core.controller import advance
from orchestrator.core.lr_rules import build_rule
from orchestrator.core.planner import WorkerLimits
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.runtime.brain import decode_state, encode_state
from orchestrator.types import ApplyPlan, Decision, Keep, Ordered, Orders, RequestWorkers, WorkersChanged
from tests.unit.planted import measured, requests, rules, scripted

LIMITS = WorkerLimits(minimum=1, maximum=8, micro_batches_each=1)
CAPS = st.one_of(st.none(), st.integers(1, 200))
ORDERS = st.builds(Orders, held=st.booleans(), max_batch=CAPS, max_workers=st.one_of(st.none(), st.integers(1, 10)))


def fickle(seed: int):
    """A policy that wants another batch every time."""
    draw = random.Random(seed)

    def propose(inputs: PolicyInputs) -> Decision:
        return Decision(target_batch=draw.randint(1, 256), reason="a whim")

    return propose


@settings(max_examples=150, deadline=None)
@given(
    given_at=st.dictionaries(st.integers(0, 59), ORDERS, max_size=5),
    lag_steps=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_no_decision_exceeds_a_cap_and_none_moves_what_is_held(
    given_at: dict[int, Orders], lag_steps: int, seed: int
) -> None:
    settled = rules(
        policy=fickle(seed), every_samples=64, lag_steps=lag_steps, workers=LIMITS, resize_when="always",
        total_samples=10**6,
    )  # fmt: skip
    state, standing = controller.init(settled, world_size=1), Orders()
    for step in range(60):
        if step in given_at:
            standing = given_at[step]
            state, said = advance(state, Ordered(orders=standing), settled)
            assert isinstance(said, Keep)
        batch, asked = state.target.batch, state.requested_workers
        came = state.pending
        state, action = advance(state, measured(step, state.samples_seen + batch, batch), settled)
        if standing.held:
            assert not isinstance(action, (ApplyPlan, RequestWorkers))
            assert state.requested_workers == asked
            # What was decided before the hold is all that still happens.
            assert state.target.batch == (batch if came is None or state.pending is not None else came.target.batch)
        if isinstance(action, ApplyPlan) and standing.max_batch is not None:
            assert action.target.batch <= standing.max_batch
        wanted = action.workers if isinstance(action, Keep) else action
        if isinstance(wanted, RequestWorkers):
            assert LIMITS.minimum <= wanted.num_workers <= min(LIMITS.maximum, standing.max_workers or LIMITS.maximum)
        # A batch above the cap is brought down by the first decision that is free to.
        if (
            not standing.held and standing.max_batch is not None and state.pending is None
            and isinstance(action, Keep) and action.target_batch is not None and came is None
        ):  # fmt: skip
            assert action.target_batch <= standing.max_batch


def test_a_cap_below_the_batch_takes_it_down_at_once_by_the_rule_without_cooldown_or_dead_band() -> None:
    settled = rules(
        policy=scripted(grow_at={}),
        base_batch=64,
        every_samples=64,
        lr_rule=build_rule("linear"),
        cooldown_samples=10**6,
    )
    state = replace(controller.init(settled, world_size=1), last_change_samples=0)
    state, _ = advance(state, Ordered(orders=Orders(max_batch=60)), settled)
    _, action = advance(state, measured(0, 64, 64), settled)
    assert isinstance(action, ApplyPlan)
    assert action.target.batch == 60
    assert action.lr_factor == 60 / 64
    assert "at most 60 by order" in action.reason


def test_the_batch_grows_on_once_a_hold_or_a_cap_is_over() -> None:
    settled = rules(policy=scripted(grow_at={0: 96}), every_samples=32, lag_steps=1)
    state, found = controller.init(settled, world_size=1), []
    given = {0: Orders(held=True), 4: Orders(max_batch=48), 8: Orders()}
    for step in range(14):
        if step in given:
            state, _ = advance(state, Ordered(orders=given[step]), settled)
        batch = state.target.batch
        found.append(batch)
        state, _ = advance(state, measured(step, state.samples_seen + batch, batch), settled)
    assert found == [32, 32, 32, 32, 32, 32, 48, 48, 48, 48, 96, 96, 96, 96]


@pytest.mark.parametrize("when", ["saves_time", "always", "never"])
def test_workers_above_a_cap_are_given_back_and_come_again_after_it(when: str) -> None:
    settled = rules(
        policy=scripted(grow_at={}), base_batch=64, workers=LIMITS, resize_when=when, total_samples=10**6,
        resize_cost_s=1.0,
    )  # fmt: skip
    state, actions = controller.init(settled, world_size=8), []
    for step in range(30):
        if step in (5, 15):
            state, _ = advance(state, Ordered(orders=Orders(max_workers=3 if step == 5 else None)), settled)
        if step == 6:
            state, _ = advance(state, WorkersChanged(world_size=3), settled)
        state, action = advance(state, measured(step, 64 * (step + 1), 64, step_time_s=1.0), settled)
        actions.append(action)
    asked = requests(actions)
    assert asked[0] == (5, 3)
    assert asked[1:] == ([] if when == "never" else [(15, 8)])


def test_a_hold_takes_back_the_workers_that_did_not_come_and_they_are_asked_for_again_after_it() -> None:
    settled = rules(
        policy=scripted(grow_at={}), base_batch=64, workers=LIMITS, resize_when="always", total_samples=10**6
    )
    state, actions = controller.init(settled, world_size=2), []
    for step in range(12):
        if step in (5, 8):
            state, _ = advance(state, Ordered(orders=Orders(held=step == 5)), settled)
            assert state.requested_workers == 2
        state, action = advance(state, measured(step, 64 * (step + 1), 64, step_time_s=1.0), settled)
        actions.append(action)
    assert requests(actions) == [(0, 8), (8, 8)]


def test_a_resize_that_had_begun_before_a_hold_stays_and_a_worker_that_is_lost_meanwhile_comes_back() -> None:
    settled = rules(
        policy=scripted(grow_at={}), base_batch=64, workers=LIMITS, resize_when="always", total_samples=10**6
    )
    state, _ = advance(controller.init(settled, world_size=2), measured(0, 64, 64), settled)
    hold = Ordered(orders=Orders(held=True, max_workers=4))
    for event, asked in (
        (hold, 2),
        (WorkersChanged(world_size=4), 4),
        (hold, 4),
        (WorkersChanged(world_size=3), 4),
        (Ordered(orders=Orders(held=True)), 4),
    ):
        state, _ = advance(state, event, settled)
        assert state.requested_workers == asked
    # Workers that were asked to go are going.
    fewer = replace(state, requested_workers=1, orders=Orders())
    assert advance(fewer, hold, settled)[0].requested_workers == 1


def test_orders_are_part_of_the_state_that_is_saved() -> None:
    settled = rules()
    given = Orders(held=True, max_batch=64, max_workers=2)
    state, _ = advance(controller.init(settled, world_size=1), Ordered(orders=given), settled)
    assert decode_state(encode_state(state)).orders == given


@pytest.mark.parametrize(
    ("given", "facts", "said"),
    [
        (Orders(max_batch=31), {}, "below the floor of the batch, 32"),
        (Orders(max_batch=64), {"smallest_batch": None}, "never altered"),
        (Orders(max_workers=1), {}, "fewer than workers.min, 2"),
        (Orders(max_workers=4), {"workers_stay": True}, "under Ray only"),
    ],
)
def test_what_cannot_be_done_is_refused(given: Orders, facts: dict, said: str) -> None:
    usual = {"smallest_batch": 32, "min_workers": 2, "workers_stay": False}
    why = orders.refusal(given, **(usual | facts))
    assert why is not None
    assert said in why


def test_what_can_be_done_is_not_refused() -> None:
    for wanted in (Orders(), Orders(held=True), Orders(max_batch=32, max_workers=2)):
        assert orders.refusal(wanted, smallest_batch=32, min_workers=2, workers_stay=False) is None
    assert orders.refusal(Orders(held=True), smallest_batch=None, min_workers=1, workers_stay=True) is None
