"""Goodput: the batch and the workers that make the most of time or of worker-hours, by the run's own step times."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from orchestrator.core import controller
from orchestrator.core.controller import advance
from orchestrator.core.goodput import Goodput, efficiency
from orchestrator.core.planner import WorkerLimits
from orchestrator.core.policies import PolicySettings, build_policy
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.core.throughput import StepModel, Timings, note
from orchestrator.runtime.brain import decode_state, encode_state
from orchestrator.runtime.replay import recomputed, recorded
from orchestrator.runtime.rules import rules_from
from orchestrator.session import Session
from orchestrator.types import ApplyPlan, Event, GradMeasured, NoiseStats, PlanRejected, Target, Verdict, WorkersChanged
from tests.support import EAGER, blobs, config, cross_entropy, mlp
from tests.unit.planted import drive, gaussian, measured, requests, rules

MICRO, CEILING = 8, 4096


def goodput(weight: float, *, workers: tuple[int, int] | None = (1, 8), floor: int = 8) -> Goodput:
    limits = None if workers is None else WorkerLimits(minimum=workers[0], maximum=workers[1], micro_batches_each=1)
    return Goodput(cost_weight=weight, base_batch=8, floor=floor, ceiling=CEILING, workers=limits)


def test_the_known_answers_of_efficiency() -> None:
    assert efficiency(100.0, 300, base_batch=100) == 0.5  # Pollux: phi = M0, M = 3 M0
    assert efficiency(1e9, 300, base_batch=100) == pytest.approx(1, rel=1e-6)
    assert efficiency(0.0, 300, base_batch=100) == pytest.approx(1 / 3)


def brute_force(steps: StepModel, scale: float, weight: float, fleets: range) -> tuple[int, int]:
    """(batch, workers) of the best weighted goodput, over every whole batch; written apart from the code's forms."""

    batches = np.arange(8, CEILING + 1)

    def best_of(workers: int) -> tuple[float, int]:
        busiest = np.maximum(np.minimum(batches, MICRO), batches / workers)
        seconds = (steps.once(workers) or 0.0) + steps.sample_s * busiest
        worth = batches / seconds * (scale + 8) / (scale + batches) / workers**weight
        return float(worth.max()), int(batches[worth.argmax()])

    workers = max(fleets, key=lambda k: best_of(k)[0])
    return best_of(workers)[1], workers


def planted_model(sample_s: float, first: float, more: tuple[float, float]) -> StepModel:
    return StepModel(sample_s=sample_s, once_s=((1, first), (2, first + more[0]), (5, first + sum(more))))


models = st.builds(planted_model, st.floats(1e-4, 1e-2), st.floats(0, 1), st.tuples(st.floats(0, 1), st.floats(0, 1)))
scales = st.floats(1, 1e5)


@given(steps=models, scale=scales, weight=st.floats(0, 1))
def test_the_batch_and_the_workers_are_those_that_brute_force_finds(steps, scale, weight) -> None:
    policy = goodput(weight)
    batch, workers = brute_force(steps, scale, weight, range(1, 6))
    found = policy.best_batch(steps, scale, workers_now=1, micro_batch=MICRO)

    def worth(batch: float, workers: int) -> float:
        return policy.value(steps, batch, workers=workers, micro_batch=MICRO, noise_scale=scale)

    best = max(worth(found, k) for k in range(1, 6))
    assert best >= worth(batch, workers) - 1e-9  # no whole batch is better
    near = max(worth(b, k) for k in range(1, 6) for b in (math.floor(found), math.ceil(found)))
    assert near == pytest.approx(worth(batch, workers), abs=1e-2)
    chosen = policy.best_workers(steps, batch, workers_now=1, micro_batch=MICRO)
    assert worth(batch, chosen) >= worth(batch, workers) - 1e-9


@given(steps=models, scale=scales, weights=st.tuples(st.floats(0, 1), st.floats(0, 1)), now=st.integers(1, 5))
def test_cost_never_asks_for_a_larger_batch_nor_more_workers_than_time(steps, scale, weights, now) -> None:
    dear, cheap = (goodput(weight) for weight in sorted(weights, reverse=True))
    slack = 1 + 1e-9
    batches = [p.best_batch(steps, scale, workers_now=now, micro_batch=MICRO) for p in (dear, cheap)]
    assert batches[0] <= batches[1] * slack
    for batch in (8, 64, 500, 4096):
        assert dear.best_workers(steps, batch, workers_now=now, micro_batch=MICRO) <= cheap.best_workers(
            steps, batch, workers_now=now, micro_batch=MICRO
        )


@given(steps=models, many=st.lists(scales, min_size=2, max_size=6), weight=st.floats(0, 1))
def test_a_larger_noise_scale_never_asks_for_a_smaller_batch(steps, many, weight) -> None:
    wished = [goodput(weight).best_batch(steps, scale, workers_now=2, micro_batch=MICRO) for scale in sorted(many)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(wished))


@given(steps=models, scale=scales)
def test_on_a_fleet_that_stays_time_and_cost_choose_the_same_batch(steps, scale) -> None:
    for elsewhere in (None, (6, 8)):  # a launcher's fleet is outside the limits, and not ours to change
        time, cost = (goodput(weight, workers=elsewhere) for weight in (0.0, 1.0))
        assert time.best_batch(steps, scale, workers_now=4, micro_batch=MICRO) == cost.best_batch(
            steps, scale, workers_now=4, micro_batch=MICRO
        )
        assert cost.best_workers(steps, 64, workers_now=4, micro_batch=MICRO) == 4


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_an_objective_out_of_range_is_refused(weight) -> None:
    with pytest.raises(ValueError, match=r"controller\.objective"):
        build_policy(PolicySettings(name="goodput", cost_weight=weight))


# Whole runs of the real controller

NOISE = 1000.0


def clock(seed: int, *, once_s: float = 0.1, sample_s: float = 0.001) -> Callable[[int, int], float]:
    """Planted step times with 5 % of noise."""
    rng = np.random.default_rng(seed)
    return lambda batch, workers: (once_s + sample_s * batch / workers) * float(np.exp(0.05 * rng.standard_normal()))


def lively(**more: Any) -> Any:
    base = {"total_samples": 150_000, "base_batch": 32, "cooldown_samples": 1024, "deadband": 1.2, "micro_batch": 8}
    return rules(**({"name": "goodput"} | base | more))


@pytest.mark.parametrize("seed", [0, 1])
def test_on_planted_noise_and_times_the_batch_goes_to_the_argmax(seed) -> None:
    """sqrt(1000 x 0.1 / 0.001) = 316 by the closed form; the estimate of the noise and the dead-band leave 1.5."""
    run = drive(lively(), gaussian(lambda _: NOISE, seed=seed), time_s=clock(seed))
    best = max(range(1, 4096), key=lambda b: b / (0.1 + 0.001 * b) / (NOISE + b))
    assert best == pytest.approx(316, abs=1)
    assert best / 1.5 < run.state.target.batch < best * 1.5


def test_where_a_step_costs_nothing_once_the_batch_stays_after_one_look() -> None:
    """Time proportional to the batch: the first growth shows that a larger batch saves nothing."""
    run = drive(lively(total_samples=60_000), gaussian(lambda _: NOISE, seed=3), time_s=lambda batch, _: 0.001 * batch)
    assert [batch for _, batch in run.batches] == [32, 64]


def test_it_says_that_it_explores_and_later_what_the_times_say() -> None:
    run = drive(lively(total_samples=60_000), gaussian(lambda _: NOISE, seed=0), time_s=clock(0))
    changes = [action.reason for _, action in run.plans]
    assert "growing to learn what a step costs" in changes[0]
    assert "at most 2 times" in changes[0]
    assert "a sample on 1 workers" in changes[1]
    assert "learn" not in changes[1]


def test_without_a_bounded_interval_it_does_not_even_explore() -> None:
    policy = build_policy(PolicySettings(name="goodput"))
    stats = NoiseStats(verdict=Verdict.TOO_NOISY, noise_scale=1e6, low=1e5)
    assert policy(PolicyInputs(stats=stats, batch=32, samples_seen=0)).target_batch == 32


def test_where_the_noise_does_not_allow_growth_it_holds_and_says_why() -> None:
    policy = build_policy(PolicySettings(name="goodput", floor=8))
    stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=40, low=30, high=60)
    decision = policy(PolicyInputs(stats=stats, batch=32, samples_seen=0))
    assert decision.target_batch == 32
    assert "growing to learn" in decision.reason
    assert "not surely above" in decision.reason


def test_a_fleet_that_was_not_timed_yet_holds_the_batch() -> None:
    policy = build_policy(PolicySettings(name="goodput"))
    stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=1e4, low=1e4, high=1e4)
    steps = StepModel(sample_s=0.001, once_s=((1, 0.1), (2, 0.2)))
    decision = policy(PolicyInputs(stats=stats, batch=32, samples_seen=0, workers=3, steps=steps))
    assert decision.target_batch == 32
    assert "3 workers were not timed yet" in decision.reason


LIMITS = {"workers": WorkerLimits(minimum=1, maximum=4, micro_batches_each=2), "resize_when": "saves_time"}


def eventful(step: int) -> list[Event]:
    return {60: [WorkersChanged(world_size=2, resize_cost_s=0.5)]}.get(step, [])


def test_a_replay_with_the_recorded_times_decides_alike_and_the_state_is_saved_whole() -> None:
    settled = lively(total_samples=60_000, resize_cost_s=0.1, **LIMITS)
    run = drive(settled, gaussian(lambda _: NOISE, seed=1), time_s=clock(1), between=eventful)
    assert len(run.plans) >= 3
    state = controller.init(settled, world_size=1)
    for event, action in run.history:
        if isinstance(event, GradMeasured):  # through a row of metrics.jsonl
            event = GradMeasured(sample=event.sample, step_time_s=json.loads(json.dumps(event.step_time_s)))
        state, again = advance(decode_state(encode_state(state)), event, settled)
        assert again == action
    assert state.timings.layouts


def test_the_times_do_decide() -> None:
    slow, fast = (
        drive(lively(total_samples=60_000), gaussian(lambda _: NOISE, seed=1), time_s=clock(1, once_s=once))
        for once in (1.0, 0.01)
    )
    assert slow.state.target.batch > 2 * fast.state.target.batch


def ask(weight: float, *, world_size: int, batch: int = 256, once: Callable[[int], float], **more: Any) -> list[Any]:
    """What is asked for by a run that timed one worker and ``world_size`` before, and stays at ``batch``."""
    settled = lively(
        **({"total_samples": 10**6, "base_batch": batch, "cost_weight": weight, "resize_cost_s": 1.0} | LIMITS | more)
    )
    state, actions, seen = controller.init(settled, world_size=1), [], 0
    for number, (workers, size) in enumerate([(1, batch // 2), (1, batch)] + [(world_size, batch)] * (world_size > 1)):
        if workers != state.world_size:
            state, _ = advance(state, WorkersChanged(world_size=workers), settled)
        state = replace(state, target=Target(batch=size), requested_workers=workers)
        for step in range(10):
            seen += size
            event = measured(10 * number + step, seen, size, step_time_s=once(workers) + 0.001 * size / workers)
            state, action = advance(state, event, settled)
            if (workers, size) == (world_size, batch):
                actions.append(action)
    return requests(actions)


def test_time_asks_for_more_as_now_until_larger_fleets_were_timed() -> None:
    assert [n for _, n in ask(0.0, world_size=1, once=lambda _: 0.1)] == [4]


def test_cost_gives_workers_back_and_never_asks_for_more() -> None:
    assert ask(1.0, world_size=1, once=lambda _: 0.1) == []
    assert [n for _, n in ask(1.0, world_size=4, once=lambda _: 0.1)] == [1]


def test_time_gives_workers_back_where_synchronising_takes_longer_than_they_save() -> None:
    """0.5 s on four, 0.328 on two (between one and four, as on a line), 0.356 on one."""
    assert [n for _, n in ask(0.0, world_size=4, once=lambda workers: 0.1 * workers)] == [2]
    assert ask(0.0, world_size=4, once=lambda _: 0.1) == []


def test_a_resize_that_costs_more_than_the_rest_of_the_run_gains_is_not_asked_for() -> None:
    assert ask(1.0, world_size=4, once=lambda _: 0.1, resize_cost_s=1e9) == []
    assert ask(1.0, world_size=4, once=lambda _: 0.1, resize_when="never") == []
    found = ask(1.0, world_size=4, once=lambda _: 0.1, resize_cost_s=1e9, resize_when="always")
    assert [n for _, n in found] == [1]


def timed(*layouts: tuple[int, int], once_s: float, sample_s: float) -> Timings:
    """Ten steps of each (workers, samples of the busiest)."""
    timings = Timings()
    for workers, samples in layouts * 10:
        timings = note(timings, once_s + sample_s * samples, workers=workers, busiest_samples=samples)
    return timings


@pytest.mark.parametrize(
    ("sections", "rejected", "computed"),
    [
        ({}, None, 16),
        ({"optimizer": {"name": "vr_sgd", "part_samples": 2}}, None, 2),
        ({"measure": {"estimator": "split"}}, None, 8),
        ({}, 4, 4),
        ({"measure": {"estimator": "split"}}, 4, 4),
    ],
    ids=["whole", "parts", "halves", "out of memory", "halves out of memory"],
)
def test_the_batch_is_shared_out_by_what_a_worker_really_computes_at_once(sections, rejected, computed) -> None:
    """On four workers a batch up to four times that takes no longer than a quarter of it."""
    controls = {"policy": "goodput", "max_growth": 1000.0, "deadband": 1.0, "cooldown_samples": 0}
    batch = {"initial": 8, "micro_batch": 16, "max": 256}
    settled = rules_from(config("runs", batch=batch, controller=controls, **sections), dataset_size=10**6)
    state = controller.init(settled, world_size=4)
    if rejected is not None:
        state, _ = advance(state, PlanRejected(max_micro_batch=rejected), settled)
    timings = timed((4, 16), (4, 64), once_s=0.001, sample_s=0.001)
    state = replace(state, samples_seen=1024, loss_sum=1.0, loss_samples=1, timings=timings)
    stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=30.0, low=30.0, high=30.0)
    _, action = controller.decide(state, stats=stats, lr=0.1, rules=settled)

    def seconds(batch: int) -> float:
        return 0.001 + 0.001 * max(min(batch, computed), batch / 4)

    best = max(range(8, 257), key=lambda b: b / seconds(b) / (30 + b))
    assert isinstance(action, ApplyPlan)
    assert action.target.batch == pytest.approx(best, abs=1)
    assert max(s for r in range(4) for _, s in action.plan.spans(r)) <= computed


@pytest.mark.parametrize(
    ("rejected", "split", "asked"), [(None, False, [1]), (None, True, [2]), (4, False, []), (4, True, [])]
)
def test_the_workers_are_asked_for_by_what_one_really_computes_at_once(rejected, split, asked) -> None:
    """A batch of 16 on four workers: in one micro-batch it is one worker's, in halves two workers', in fours all's."""
    more = {"total_samples": 10**6, "base_batch": 16, "micro_batch": 16, "measurable": False, "split": split}
    settled = lively(**(LIMITS | {"resize_when": "always"} | more))
    state = controller.init(settled, world_size=4)
    if rejected is not None:
        state, _ = advance(state, PlanRejected(max_micro_batch=rejected), settled)
    state = replace(state, timings=timed((1, 8), (1, 16), (4, 4), once_s=0.05, sample_s=0.001))
    _, action = advance(state, measured(0, 16, 16), settled)
    assert [n for _, n in requests([action])] == asked


def test_a_replay_of_a_runs_folder_decides_as_the_run_did_by_a_real_clock(tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        train={"samples": 2560},
        batch={"initial": 8, "micro_batch": 4, "max": 64},
        workers={"max": 2},
        controller=EAGER | {"policy": "goodput", "objective": 0.5, "half_life_samples": 256},
    )
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    found = recorded(tmp_path / "run")
    assert recomputed(tmp_path / "run") == found
    assert any("a sample on 1 workers" in decided.reason for decided in found), "the clock was asked"
