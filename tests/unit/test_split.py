"""Estimator split: every micro-batch is computed in two halves, and nothing else about a run changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from orchestrator.core import controller
from orchestrator.core.controller import Rules, advance
from orchestrator.core.planner import WorkerLimits
from orchestrator.session import Session
from orchestrator.types import ApplyPlan, PlanRejected
from tests import support
from tests.unit.planted import drive, level, requests, rules, scripted

counts = st.integers(1, 300)


def first_plan(settled: Rules) -> Any:
    return controller.current_plan(controller.init(settled, world_size=1), settled, reason="the run begins").plan


@settings(max_examples=200, deadline=None)
@given(batch=counts, micro_batch=st.integers(1, 64), measurable=st.booleans())
def test_the_list_is_cut_at_half_the_micro_batch_and_has_two_parts(
    batch: int, micro_batch: int, measurable: bool
) -> None:
    plan = first_plan(rules(base_batch=batch, micro_batch=micro_batch, measurable=measurable, split=True))
    half = -(-micro_batch // 2)
    assert plan.micro_batch == min(half, max(1, -(-batch // 2)))
    assert plan.num_micro_batches >= 2 or batch == 1
    assert sum(plan.sizes) == batch


@pytest.mark.parametrize("when", ["always", "saves_time"])
@pytest.mark.parametrize("last", [40, 32, 8])
def test_the_workers_asked_for_and_given_back_are_those_without_it(when: str, last: int) -> None:
    asked = []
    for split in (False, True):
        settled = rules(
            total_samples=40_000, split=split, resize_when=when, resize_cost_s=0.01,
            policy=scripted(grow_at={4000: 64, 8000: 128, 20_000: last}),
            workers=WorkerLimits(minimum=1, maximum=6, micro_batches_each=2),
        )  # fmt: skip
        run = drive(settled, level)
        asked.append([number for _, number in requests([action for _, action in run.history])])
    assert asked[0] == asked[1]
    assert max(asked[0]) == 6
    assert asked[0][-1] == max(1, last // 16)


def test_memory_that_ran_out_in_a_half_halves_the_halves() -> None:
    settled = rules(base_batch=64, micro_batch=16, split=True)
    state = controller.init(settled, world_size=1)
    assert first_plan(settled).micro_batch == 8
    for limit in (4, 2, 1):
        state, action = advance(state, PlanRejected(max_micro_batch=limit), settled)
        assert isinstance(action, ApplyPlan)
        assert action.plan.sizes == (limit,) * (64 // limit)


@pytest.mark.parametrize("controls", [{"policy": "fixed"}, {"policy": "noise_scale", "mode": "advise"}])
@pytest.mark.parametrize(("estimator", "sizes"), [("split", 4), ("per_example", 8), ("micro_batch", None)])
def test_one_worker_without_accumulation_is_measured(
    tmp_path: Path, controls: dict[str, str], estimator: str, sizes: int | None
) -> None:
    config = support.config(
        tmp_path, train={"samples": 240}, batch={"initial": 8, "micro_batch": 8, "max": 64},
        measure={"estimator": estimator}, controller=controls,
    )  # fmt: skip
    model = support.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Session(config, model=model, optimizer=optimizer, dataset=support.blobs()) as session:
        for step in session:
            for batch in step:
                session.backward(support.cross_entropy(session.model, batch))
            session.step()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["micro_batch"] for row in rows} == {sizes or 8}
    assert all((row["trace_cov"] is None) is (sizes is None) for row in rows)
    assert rows[-1]["verdict"] in (["too few micro-batches"] if sizes is None else ["measured", "too noisy"])
