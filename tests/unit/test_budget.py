"""A run ends within its budget: the controller stops in time, and asks for no workers that the rest cannot pay."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from orchestrator.config import RunConfig
from orchestrator.config.execution import BudgetSection
from orchestrator.core import budget, controller
from orchestrator.core.controller import advance
from orchestrator.core.planner import WorkerLimits, make_plan
from orchestrator.core.staffing import Need, request
from orchestrator.core.throughput import StepTimes, Timings
from orchestrator.ports import BrainRecord
from orchestrator.runtime import folder, paid_time
from orchestrator.runtime.brain import LocalBrain
from orchestrator.runtime.budget_watch import BudgetWatch
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.progress import Moment
from orchestrator.runtime.rules import rules_from
from orchestrator.runtime.spending import ENDING_S, attempts, exhausted, worker_hours_of
from orchestrator.runtime.worker import Worker, local_worker
from orchestrator.train import train
from orchestrator.types import BatchPlan, Event, Keep, RequestWorkers, Spent, Stop
from tests.support import config
from tests.unit.planted import measured, rules
from tests.unit.small_runs import groundswell

HOUR = 3600.0


def need(*, asked: int, micro_batches: int, remaining_steps: int, each_s: float = 1.0, cost_s: float = 0.0) -> Need:
    plan = make_plan(micro_batches * 8, world_size=asked, micro_batch=8, generation=0, measurable=False)
    return Need(
        plan=plan,
        whole_micro_batches=micro_batches,
        micro_batch=8,
        computed_micro_batch=8,
        asked=asked,
        remaining_samples=remaining_steps * plan.batch,
        times=StepTimes(per_micro_batch_s=(each_s,) * 32),
        resize_cost_s=cost_s,
        limits=WorkerLimits(minimum=1, maximum=8, micro_batches_each=1),
        when="always",
    )


def worker_seconds(plan: BatchPlan, workers: int, steps: int, each_s: float) -> float:
    """Counted step by step and worker by worker."""
    busiest = max(len(replace(plan, world_size=workers).run(rank)) for rank in range(workers))
    return sum(busiest * each_s for _ in range(steps) for _ in range(workers))


@settings(max_examples=200, deadline=None)
@given(
    asked=st.integers(1, 8),
    micro_batches=st.integers(1, 24),
    steps=st.integers(1, 30),
    cost_s=st.sampled_from([0.0, 3.0, 40.0]),
    left_s=st.floats(0.0, 2000.0),
)
def test_the_workers_asked_for_are_those_that_the_rest_pays_to_the_end(
    asked: int, micro_batches: int, steps: int, cost_s: float, left_s: float
) -> None:
    wish = need(asked=asked, micro_batches=micro_batches, remaining_steps=steps, cost_s=cost_s)
    spent = Spent(worker_hours=1.0, reserve_worker_hours=0.5)
    found = budget.ceiling(wish, 1.5 + left_s / HOUR, spent)
    assert found is not None

    def price(workers: int) -> float:
        pause = 0.0 if workers == asked else cost_s * max(workers, asked)
        return worker_seconds(wish.plan, workers, steps, 1.0) + pause

    paid = [n for n in range(1, 9) if price(n) <= left_s - 1e-6]
    nearly = [n for n in range(1, 9) if abs(price(n) - left_s) <= 1e-6]
    assert found.workers == max(paid, default=asked) or found.workers in nearly
    wanted = request(replace(wish, ceiling=found), goodput=None, timings=Timings())
    if wanted is not None:
        assert wanted.num_workers <= found.workers


def test_no_workers_are_added_before_their_price_is_known_and_none_limit_without_a_budget() -> None:
    wish = need(asked=2, micro_batches=16, remaining_steps=100)
    spent = Spent(worker_hours=0.0, reserve_worker_hours=0.0)
    assert budget.ceiling(wish, None, spent) is None
    assert budget.ceiling(wish, 10.0, None) is None
    assert budget.ceiling(replace(wish, when="never"), 0.001, spent) is None
    untimed = budget.ceiling(replace(wish, times=StepTimes()), 10.0, spent)
    assert untimed is not None
    assert untimed.workers == 2


def test_the_controller_asks_for_what_the_budget_pays_and_gives_back_what_it_does_not() -> None:
    settled = rules(
        base_batch=64, every_samples=10**6, total_samples=64 * 1008, resize_when="always", resize_cost_s=0.0,
        workers=WorkerLimits(minimum=1, maximum=8, micro_batches_each=1), budget_worker_hours=8100 / HOUR,
    )  # fmt: skip
    state = controller.init(settled, world_size=3)
    # Eight micro-batches of 1 s: 3 workers need 9 worker-seconds a step, and 1, 2, 4 and 8 workers 8.
    state, said = advance(state, Spent(worker_hours=0.0, reserve_worker_hours=0.0), settled)
    assert isinstance(said, Keep)
    asked = []
    for step in range(8):
        state, action = advance(state, measured(step, 64 * (step + 1), 64, step_time_s=3.0), settled)
        asked.append(action.num_workers if isinstance(action, RequestWorkers) else None)
    assert asked == [None] * 7 + [8]
    state, _ = advance(state, Spent(worker_hours=90 / HOUR, reserve_worker_hours=0.0), settled)
    assert state.requested_workers == 8


@pytest.mark.parametrize(("spent", "stops"), [(0.80, False), (0.91, True), (1.2, True)])
def test_the_controller_stops_when_what_is_left_is_what_a_stop_takes(spent: float, stops: bool) -> None:
    settled = rules(budget_worker_hours=1.0)
    state = controller.init(settled, world_size=1)
    state, action = advance(state, Spent(worker_hours=spent, reserve_worker_hours=0.1), settled)
    assert isinstance(action, Stop) == stops
    if isinstance(action, Stop):
        assert "budget of 1 worker-hours" in action.reason
    free = rules()
    assert isinstance(
        advance(controller.init(free, world_size=1), Spent(worker_hours=9.0, reserve_worker_hours=9.0), free)[1], Keep
    )


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return time.time() + self.now_s


class Told(LocalBrain):
    """The controller, and how often it was told."""

    def __init__(self, settings_: RunConfig) -> None:
        super().__init__(settings_)
        self.heard: list[Spent] = []

    def post(self, event: Event) -> None:
        if isinstance(event, Spent):
            self.heard.append(event)
        super().post(event)


def watched(
    place: Path, limit_s: float, *, samples: int = 640, **more: Any
) -> tuple[BudgetWatch, Told, Journal, Clock]:
    """A run of one worker with so many worker-seconds, as its first attempt begins; ``more`` are the config's."""
    given_config = config(place, **{"train": {"samples": samples}, "budget": {"worker_hours": limit_s / HOUR}, **more})
    run = place / "run"
    run.mkdir(parents=True, exist_ok=True)
    clock, settled = Clock(), rules_from(given_config, dataset_size=640)
    brain = Told(given_config)
    worker = Worker(
        collective=Solo(), device=torch.device("cpu"), brain=brain, runtime="local", now=clock.now, wall_time=clock.wall
    )
    journal = Journal(given_config, worker=worker, rules=settled, dataset_size=640)
    watch = BudgetWatch(given_config, run=run, worker=worker, journal=journal, rules=settled)
    journal.open(run)
    brain.begin(BrainRecord(), world_size=1, dataset_size=640, resize_cost_s=None)
    journal.event("started", reason="", step=0, samples_seen=0, world_size=1)
    return watch, brain, journal, clock


@settings(max_examples=40, deadline=None)
@given(
    cycles=st.floats(2.1, 4.0),
    step_s=st.floats(0.5, 20.0),
    unevenness=st.lists(st.floats(0.7, 1.0), min_size=20, max_size=20),
    save_s=st.floats(0.0, 90.0),
    save_every=st.integers(30, 300),
    evaluation_s=st.floats(0.0, 2000.0),
    evaluate_every=st.integers(30, 300),
    late=st.integers(0, 2),
)
def test_whatever_steps_evaluations_and_checkpoints_take_the_run_ends_within_its_budget(
    tmp_path_factory: pytest.TempPathFactory,
    cycles: float,
    step_s: float,
    unevenness: list[float],
    save_s: float,
    save_every: int,
    evaluation_s: float,
    evaluate_every: int,
    late: int,
) -> None:
    limit_s = cycles * (max(save_every, evaluate_every) * step_s + evaluation_s + save_s) + 60
    place = tmp_path_factory.mktemp("run")
    # How long they take is known from an attempt before; the first ones are not foreseen.
    write(
        place / "run",
        {"attempt": 0, "kind": "checkpoint", "time": 0.0, "duration_s": save_s},
        {"attempt": 0, "kind": "budget", "time": 0.0, "longest_pause_s": evaluation_s + step_s},
    )
    watch, brain, journal, clock = watched(
        place,
        limit_s,
        samples=10**9,
        evaluation={"every_samples": 32 * evaluate_every},
        checkpoint={"every_samples": 32 * save_every},
    )
    watch.begin(brain, Moment(step=0, samples_seen=0))
    step, stopped_at, saved_at = 0, None, None
    while stopped_at is None or step < stopped_at + late:
        clock.now_s += step_s * unevenness[step % 20] if step % 50 else step_s
        step += 1
        # What is told is a step behind.
        watch.look(brain, Moment(step=step - 1, samples_seen=32 * (step - 1)))
        if stopped_at is None and brain.commands().stop is not None:
            stopped_at, stopped_s = step, clock.now_s
        heard = stopped_at is not None and step >= stopped_at + late
        if step % evaluate_every == 0 and not heard:
            clock.now_s += evaluation_s
        if step % save_every == 0:
            clock.now_s += save_s
            watch.saved(save_s)
            saved_at = step
    total_s = clock.now_s + (0.0 if saved_at == step else save_s) + ENDING_S
    # Three steps are kept back, each as long as the longest of the last eight looks, which may be 0.7 of the longest.
    assert total_s <= limit_s + 3 * 0.3 * step_s + 1e-6
    # And it is not given up long before: what is kept for steps, for what is due, and for the end, and the last look.
    kept_s = 5 * step_s + evaluation_s + 3 * save_s + ENDING_S
    assert stopped_s + kept_s >= limit_s - 0.01 * limit_s
    # The controller is not told at every look, but for the end.
    assert len(brain.heard) <= 105 + 2 * kept_s / (0.7 * step_s) + 10
    journal.close()


def test_what_an_earlier_attempt_paused_is_kept_back_before_the_next_evaluation(tmp_path: Path) -> None:
    write(tmp_path / "run", {"attempt": 0, "kind": "budget", "time": 1.0, "longest_pause_s": 500.0})
    watch, brain, journal, clock = watched(tmp_path, 1000.0, samples=10**6, evaluation={"every_samples": 3200})
    watch.begin(brain, Moment(step=0, samples_seen=0))
    for step in range(1, 150):
        clock.now_s += 6.0
        watch.look(brain, Moment(step=step, samples_seen=32 * step))
        if brain.commands().stop is not None:
            break
    journal.close()
    # 100 steps would reach the evaluation, after 600 s, when 500 s more cannot be paid.
    assert 90 <= step < 100


def test_a_tenth_is_written_down_once_with_whether_the_rest_suffices(tmp_path: Path) -> None:
    limit_s = 100_000.0
    watch, brain, journal, clock = watched(
        tmp_path, limit_s, budget={"worker_hours": limit_s / HOUR, "money": 1.0, "price_per_worker_hour": 0.01}
    )
    watch.begin(brain, Moment(step=0, samples_seen=0))
    for step in range(1, 41):
        clock.now_s += 1.001 * limit_s / 100
        watch.look(brain, Moment(step=step, samples_seen=4 * step))
    watch.end(Moment(step=40, samples_seen=160))
    journal.close()
    rows = [row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "budget"]
    assert len(rows) == 5
    shares = [row["used_worker_hours"] / (row["used_worker_hours"] + row["left_worker_hours"]) for row in rows]
    assert shares[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.012)
    # 4 samples take a hundredth of the budget, and 640 samples take it 1.6 times.
    assert all("does not suffice" in row["reason"] for row in rows)
    used_s = rows[3]["used_worker_hours"] * HOUR
    assert rows[3]["needed_worker_hours"] * HOUR == pytest.approx((640 - 160) * limit_s / 400, rel=0.02)
    assert rows[3]["used_money"] == pytest.approx(used_s / HOUR * 0.01)


def write(run: Path, *rows: dict[str, Any], name: str = folder.EVENTS) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / name).open("a") as file:
        file.writelines(json.dumps({"step": 0, **row}) + "\n" for row in rows)


def test_attempts_cost_from_their_workers_start_to_their_last_sign_of_life_whatever_the_time_of_day(
    tmp_path: Path,
) -> None:
    write(
        tmp_path,
        {"attempt": 1, "kind": "started", "time": 110.0, "paid_s": 10.0, "world_size": 2},
        {"attempt": 1, "kind": "checkpoint", "time": -3500.0, "paid_s": 30.0, "duration_s": 4.0},  # the clock was set
        {"attempt": 2, "kind": "checkpoint_passed_over", "time": 190.0},
        {"attempt": 2, "kind": "resumed", "time": 200.0, "paid_s": 20.0, "world_size": 3},
        {"attempt": 3, "kind": "resumed", "time": 300.0, "paid_s": 0.0, "world_size": 1},
        {"attempt": 3, "kind": "stopped", "time": 360.0, "paid_s": 60.0},
    )
    # The second died without a word, 40 s of steps after it began.
    write(tmp_path, *({"attempt": 2, "step_time_s": 10.0} for _ in range(4)), name=folder.METRICS)
    found = attempts(tmp_path)
    assert [(a.began_s, a.lasted_s, a.workers) for a in found] == [(10.0, 30.0, 2), (20.0, 60.0, 3), (0.0, 60.0, 1)]
    expected_s = 2 * (30 + ENDING_S) + 3 * (60 + ENDING_S) + 60 + ENDING_S
    assert worker_hours_of(found) == pytest.approx(expected_s / HOUR)
    # Another attempt of one worker is ready at once, and keeps 1.5 x 4 s to save, and the time to end.
    for left_s, enough in ((6 + ENDING_S + 1, True), (6 + ENDING_S - 1, False)):
        limit = config(tmp_path, budget={"worker_hours": (expected_s + left_s) / HOUR})
        assert (exhausted(limit, tmp_path) is None) == enough
    assert exhausted(config(tmp_path), tmp_path) is None
    # A budget that ended the run has ended it, until it is raised.
    by_budget = {"attempt": 3, "kind": "stopped", "time": 361.0, "budget_worker_hours": 1.0, "reason": "used up"}
    write(tmp_path, by_budget)
    assert exhausted(config(tmp_path, budget={"worker_hours": 1.0}), tmp_path) == "used up"
    assert exhausted(config(tmp_path, budget={"worker_hours": 1.1}), tmp_path) is None


def test_an_attempt_that_grew_and_died_without_a_word_costs_all_the_workers_that_its_steps_had(tmp_path: Path) -> None:
    write(tmp_path, {"attempt": 1, "kind": "started", "time": 0.0, "paid_s": 10.0, "world_size": 2})
    steps = [{"attempt": 1, "step_time_s": 5.0, "world_size": workers} for workers in (2, 2, 6, 6)]
    write(tmp_path, *steps, name=folder.METRICS)
    expected_s = 2 * 10 + 2 * 5 * 2 + 2 * 5 * 6
    assert worker_hours_of(attempts(tmp_path)) * HOUR == pytest.approx(expected_s + 2 * ENDING_S)


def test_a_process_knows_how_old_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    age_s = paid_time.process_age_s()
    assert 0 < age_s < 4000
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot = next(
        int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime")
    )
    assert age_s == pytest.approx(time.time() - boot - ticks / os.sysconf("SC_CLK_TCK"), abs=2.0)
    monkeypatch.setattr(Path, "read_text", lambda self: "no such system")
    assert 0 <= paid_time.process_age_s() < age_s


@pytest.mark.parametrize(
    ("runtime", "own", "given_before_s", "paid_s"),
    [
        ("local", False, 50.0, 0.0),  # a notebook may be days old: its run is paid from the session on
        ("torchrun", True, 50.0, 1000.0),
        ("ray", True, 50.0, 50.0),  # a process that Ray had kept ready
        ("ray", True, 5000.0, 1000.0),
        ("ray", True, -3600.0, 0.0),  # the clock was put back
    ],
)
def test_workers_are_paid_from_the_start_of_a_process_that_was_started_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, own: bool, given_before_s: float, paid_s: float
) -> None:
    monkeypatch.setattr(paid_time, "process_age_s", lambda: 1000.0)
    write(tmp_path, {"attempt": 1, "kind": "fault", "time": 10_000.0 - given_before_s})
    clock = Clock()
    worker = Worker(
        collective=Solo(), device=torch.device("cpu"), brain=None, runtime=runtime, own_process=own, now=clock.now,
        wall_time=lambda: 10_000.0,
    )  # fmt: skip
    paid = paid_time.PaidTime(worker)
    paid.limit(tmp_path)
    clock.now_s += 7.0
    assert paid.now_s == paid_s + 7.0


def test_an_attempt_whose_budget_is_used_up_takes_no_step_and_saves(tmp_path: Path) -> None:
    broke = config(
        tmp_path, task={"name": "tests.launch.small_task:make"}, budget={"money": 0.001, "price_per_worker_hour": 2.0}
    )
    assert train(broke, local_worker(broke), resume=False) is False
    run = tmp_path / "run"
    events = list(folder.rows(run / folder.EVENTS))
    assert [row["kind"] for row in events] == ["started", "checkpoint", "budget", "stopped"]
    assert "the budget of 0.0005 worker-hours is used up" in events[-1]["reason"]
    assert not (run / folder.METRICS).exists()
    again = groundswell(broke, "--resume")
    assert again.exit_code == 0
    assert "Nothing was started: the budget of" in again.output
    richer = groundswell(broke.model_copy(update={"budget": BudgetSection(worker_hours=1000.0)}), "--resume")
    assert richer.exit_code == 0, richer.output
    rows = folder.surviving(run / folder.METRICS)
    assert (rows[0]["step"], rows[-1]["samples_seen"]) == (0, 640)
    assert "Used:      " in richer.output
