"""Workers that did not come are given up: no more are asked for until it is time, and the batch goes on growing."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.core import controller
from orchestrator.core.controller import advance
from orchestrator.core.planner import WorkerLimits
from orchestrator.ports import BrainRecord
from orchestrator.runtime.brain import LocalBrain, decode_state, encode_state
from orchestrator.types import Keep, WorkersMissing
from tests.support import config
from tests.unit.planted import measured, requests, rules, scripted

LIMITS = WorkerLimits(minimum=1, maximum=8, micro_batches_each=1)


def asked_after(retry_samples: int | None, **more: Any) -> tuple[list[tuple[int, int]], int]:
    """Workers asked for by step, of a batch of 64 that is wanted at once, where 2 workers came by step 5."""
    settled = rules(
        policy=scripted(grow_at={20 * 64: 96}), base_batch=64, every_samples=64, workers=LIMITS, resize_when="always",
        total_samples=10**6, retry_samples=retry_samples, **more,
    )  # fmt: skip
    state, actions = controller.init(settled, world_size=2), []
    for step in range(60):
        if step == 5:
            state, said = advance(state, WorkersMissing(present=2), settled)
            assert isinstance(said, Keep)
            assert decode_state(encode_state(state)) == state
        batch = state.target.batch
        state, action = advance(state, measured(step, state.samples_seen + batch, batch), settled)
        actions.append(action)
    return requests(actions), state.target.batch


@pytest.mark.parametrize(
    ("retry_samples", "expected"),
    # 5 + 640 / 64 = 15: the step that ends there is number 14.
    [(None, [(0, 8)]), (640, [(0, 8), (14, 8)])],
)
def test_more_workers_are_asked_for_only_when_it_is_time(retry_samples: int | None, expected: list) -> None:
    asked, batch = asked_after(retry_samples)
    assert asked == expected
    assert batch == 96


def test_workers_that_are_started_anew_may_ask_again() -> None:
    settings = config(".", batch={"max": 64}, workers={"max": 8, "when": "always", "micro_batches_each": 1})
    brain = LocalBrain(settings)
    brain.begin(BrainRecord(), world_size=2, dataset_size=640, resize_cost_s=None)
    brain.post(WorkersMissing(present=2))
    brain.post(measured(0, 32, 32))
    assert brain.commands().notes == ()
    again = LocalBrain(settings)
    again.begin(brain.record(), world_size=2, dataset_size=640, resize_cost_s=None)
    again.post(measured(1, 64, 32))
    assert [note["num_workers"] for note in again.commands().notes] == [4]
