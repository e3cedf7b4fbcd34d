"""Where the fleet cannot change, no batch is chosen for another one: in a run, and in its replay."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.runtime import folder
from orchestrator.runtime.brain import LocalBrain
from orchestrator.runtime.replay import recomputed
from orchestrator.runtime.rules import rules_from
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from orchestrator.types import ApplyPlan, Event, GradMeasured, Keep, WorkersChanged, decided_batch
from tests.support import blobs, config, cross_entropy, mlp
from tests.unit.planted import Run, drive, gaussian

SIZE, SWITCH = 100_000, 100  # samples of the data set; a step in the midst of the growth


def settings(path: Path, **controls: Any) -> Any:
    """Cost is what counts, and up to two workers."""
    own = {"policy": "goodput", "objective": "cost", "every_samples": 1024, "cooldown_samples": 1024}
    return config(
        path,
        train={"samples": 60_000},
        batch={"initial": 32, "micro_batch": 8, "max": 4096},
        workers={"max": 2},
        controller=own | {"lag_steps": 2, "deadband": 1.2, "half_life_samples": 4096} | controls,
    )


def driven(path: Path, *, workers_stay: bool) -> Run:
    """A whole run on two workers from its second step on, whose steps take 0.1 s + 1 ms a sample."""

    def second_worker(step: int) -> Iterable[Event]:
        return [WorkersChanged(world_size=2)] if step == 0 else []

    settled = rules_from(settings(path), dataset_size=SIZE, workers_stay=workers_stay)
    world = gaussian(lambda seen: 1000.0, seed=0)
    return drive(settled, world, between=second_worker, time_s=lambda batch, workers: 0.1 + 0.001 * batch / workers)


def write(run: Run, path: Path, attempts: list[tuple[str, int, bool]]) -> Path:
    """The folder of ``run``; ``attempts`` holds (kind, first step, whether the workers stay)."""
    place = path / "run"
    place.mkdir()
    (place / folder.CONFIG).write_text(json.dumps(settings(path).model_dump(mode="json")))
    rows = []
    for event, _ in run.history:
        if isinstance(event, GradMeasured):
            sample = event.sample
            rows.append(
                {
                    "attempt": 1,
                    "step": sample.step,
                    "samples_seen": sample.samples_seen,
                    "global_batch": sample.batch,
                    "micro_batch": 8,
                    "world_size": 1 if sample.step == 0 else 2,
                    "loss": sample.loss,
                    "lr": sample.lr,
                    "grad_sq": sample.grad_sq,
                    "trace_cov": sample.trace_cov,
                    "step_time_s": event.step_time_s,
                }
            )
    events = [
        {"attempt": n, "kind": kind, "step": step, "dataset_size": SIZE, "world_size": 1, "workers_stay": stay}
        for n, (kind, step, stay) in enumerate(attempts, start=1)
    ]
    for name, lines in ((folder.METRICS, rows), (folder.EVENTS, events)):
        (place / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def decided(run: Run) -> list[tuple[int, int, str]]:
    found = []
    for event, action in run.history:
        if isinstance(event, GradMeasured) and isinstance(action, (ApplyPlan, Keep)):
            target = decided_batch(action)
            if target is not None:
                found.append((event.sample.samples_seen, target, action.reason))
    return found


def test_cost_on_workers_that_stay_chooses_the_batch_of_those_there_are(tmp_path: Path) -> None:
    """sqrt(S K t0 / t1): 447 on the two there are, 316 on the one that would be cheaper; 1.2 is the dead-band."""
    stays, changes = (driven(tmp_path, workers_stay=stay).state.target.batch for stay in (True, False))
    assert 447 / 1.2 < stays < 447 * 1.2
    assert 316 / 1.2 < changes < 316 * 1.2


@pytest.mark.parametrize(
    ("attempts", "alike"),
    [
        ([("started", 0, True)], True),
        ([("started", 0, False)], False),
        ([("started", 0, False), ("resumed", SWITCH, True), ("resumed", 0, True)], True),
        ([("started", 0, True), ("resumed", SWITCH, False)], False),
    ],
    ids=["stayed", "came and went", "begun again in another runtime", "went on in another runtime"],
)
def test_a_replay_knows_from_the_record_whether_the_workers_stayed(tmp_path: Path, attempts: Any, alike: bool) -> None:
    run = driven(tmp_path, workers_stay=True)
    again = [(d.samples_seen, d.target_batch, d.reason) for d in recomputed(write(run, tmp_path, attempts))]
    assert (again == decided(run)) == alike


def test_a_session_of_this_process_knows_that_its_workers_stay_and_writes_it_down(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    worker = local_worker(chosen)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with Session(chosen, model=model, optimizer=optimizer, dataset=blobs(4096), worker=worker) as session:
        step = next(iter(session))
        for samples in step:
            session.backward(cross_entropy(session.model, samples))
        session.step()
    assert isinstance(worker.brain, LocalBrain)
    assert worker.brain.rules.goodput is not None
    assert worker.brain.rules.goodput.workers is None
    (started,) = [row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "started"]
    assert started["workers_stay"] is True
    assert rules_from(chosen, dataset_size=4096).goodput != worker.brain.rules.goodput
