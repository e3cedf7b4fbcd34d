"""What the controller remembers survives its encoding, and its decisions come again from what was written down."""

from __future__ import annotations

import json
import math
from typing import Any

from orchestrator.core import controller
from orchestrator.core.controller import advance
from orchestrator.runtime.brain import decode_state, encode_state
from orchestrator.types import (
    ApplyPlan,
    Event,
    GradMeasured,
    Keep,
    PlanRejected,
    Preempted,
    RequestWorkers,
    SaveCheckpoint,
    Stop,
    WorkersChanged,
)
from tests.unit.planted import LIVELY, Run, drive, measured, requests, rules, wandering


def eventful(step: int) -> list[Event]:
    """Workers come and go and memory runs out on the way."""
    return {
        40: [WorkersChanged(world_size=2, resize_cost_s=3.5)],
        90: [PlanRejected(max_micro_batch=4), PlanRejected(max_micro_batch=2)],
        200: [Preempted(why="planted"), WorkersChanged(world_size=1)],
    }.get(step, [])


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


def decision(action: Any) -> tuple | None:
    if isinstance(action, ApplyPlan):
        return ("change", action.target, action.effective_step, action.lr_factor, action.reason)
    if not isinstance(action, Keep) or action.target_batch is None:
        return None
    return ("keep", action.target_batch, action.reason)


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


def test_the_clock_never_touches_the_target() -> None:
    world = dict(total_samples=40_000, **LIVELY)
    runs: list[Run] = [drive(rules(**world), wandering(4), time_s=time_s) for time_s in (1e-4, 10.0)]
    assert runs[0].batches == runs[1].batches
    asked = [len(requests([action for _, action in run.history])) for run in runs]
    assert asked[0] != asked[1], "what it may touch, it touched"
