"""Workers that never come are given up and said; too few to train end the run; and a budget holds under Ray as well."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.execution import BudgetSection
from orchestrator.errors import SessionError
from orchestrator.runtime import folder
from orchestrator.runtime.replay import recomputed, recorded
from orchestrator.runtime.spending import attempts, worker_hours_of
from tests.support import config
from tests.worker_time import WorkerTime


def settings(place: Path, **sections: Any) -> Any:
    pids = place / "pids"
    pids.mkdir()
    base: dict[str, Any] = {
        "task": {"name": "tests.ray.tasks:slow", "options": {"pids": str(pids), "step_s": 0.03}},
        "train": {"samples": 1_000_000},
        "batch": {"initial": 8, "micro_batch": 4, "max": 64},
        "controller": {"policy": "schedule", "ramp": [[80, 16], [800, 32]], "every_samples": 40},
    }
    return config(place, **(base | sections))


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_workers_that_never_come_are_given_up_and_the_next_attempt_ends_within_the_budget(
    cluster: None, tmp_path: Path
) -> None:
    from orchestrator.ray_train.trainer import AdaptiveTrainer

    # The cluster has 4 CPUs: a second worker of 3 will never be there.
    workers = {
        "initial": 1, "max": 2, "cpus_per_worker": 3.0, "micro_batches_each": 2, "when": "always", "patience_s": 15.0,
    }  # fmt: skip
    chosen, run = settings(tmp_path, workers=workers), tmp_path / "run"
    paid, over = WorkerTime(tmp_path / "pids"), threading.Event()

    def missing() -> list[dict[str, Any]]:
        return [event for event in folder.rows(run / folder.EVENTS) if event["kind"] == "workers_missing"]

    def watch() -> None:
        asked = False
        while not over.is_set() or paid.alive:
            paid.look()
            if not asked and missing() and folder.surviving(run / folder.METRICS)[-1]["global_batch"] == 32:
                asked = True
                (run / folder.STOP_REQUEST).touch()
            time.sleep(0.05)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        AdaptiveTrainer(chosen).fit()
        assert [(event["asked"], event["present"]) for event in missing()] == [(2, 1)]
        assert 15.0 <= missing()[0]["waited_s"] < 60
        events = list(folder.rows(run / folder.EVENTS))
        after = events[events.index(missing()[0]) :]
        assert not any(event["kind"] in ("workers_wanted", "resize", "fault") for event in after)

        before = attempts(run)
        used_s = worker_hours_of(before) * 3600
        # What the first attempt took to begin, twice, and some time to train and to keep.
        limit_s = used_s + 2 * before[0].began_s + 25
        AdaptiveTrainer(
            chosen.model_copy(update={"budget": BudgetSection(worker_hours=limit_s / 3600)}), resume=True
        ).fit()
    finally:
        over.set()
        watcher.join(30)
    ended = list(folder.rows(run / folder.EVENTS))[-1]
    assert ended["kind"] == "stopped"
    assert "the budget of" in ended["reason"]
    print(f"{paid.total_s:.1f} of {limit_s:.1f} worker-seconds")
    assert paid.workers == 2  # one in each attempt
    assert 0.5 * used_s < paid.total_s <= limit_s
    decided = recorded(run)
    assert recomputed(run)[: len(decided)] == decided


@pytest.mark.ray
def test_a_run_whose_fewest_workers_never_come_ends_with_the_reason(cluster: None, tmp_path: Path) -> None:
    from orchestrator.ray_train.trainer import AdaptiveTrainer, own_error

    chosen = settings(tmp_path, workers={"initial": 2, "min": 2, "max": 2, "cpus_per_worker": 3.0, "patience_s": 2.0})
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Ray's wrapper of ours
        AdaptiveTrainer(chosen).fit()
    error = own_error(caught.value)
    assert isinstance(error, SessionError)
    assert "room for 1 workers of 3 CPUs" in str(error)
    assert "needs workers.min, 2" in str(error)
