"""Promise 3 under Ray Train: growth, shrink, resizes and SIGKILL lose and repeat nothing, with and without stopping."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify
from orchestrator.runtime.replay import recomputed, recorded
from tests.support import config

EPOCH, EPOCHS = 400, 3


def settings(tmp_path: Path, *, resize: str, slow_save_s: float) -> Any:
    pids = tmp_path / "pids"
    pids.mkdir()
    return config(
        tmp_path,
        task={
            "name": "tests.ray.tasks:slow",
            # Newcomers warm up while the others train, and are to find some training left.
            "options": {
                "size": EPOCH,
                "step_s": 0.12 if resize == "live" else 0.06,
                "pids": str(pids),
                "slow_save_s": slow_save_s,
            },
        },
        train={"samples": None, "epochs": EPOCHS},
        batch={"initial": 8, "micro_batch": 4, "min": 8, "max": 64},
        controller={
            "policy": "schedule",
            "ramp": [[100, 32], [540, 16], [800, 48]],
            "every_samples": 20,
            "shrink": True,
        },
        workers={"initial": 1, "max": 2, "micro_batches_each": 4, "when": "always", "resize": resize},
        checkpoint={"every_samples": 150, "keep": 2},
        ledger=True,
    )


def kill_at(
    run: Path, pids: Path, *, samples: int, rank: int, world_size: int, patience_s: float = 120.0
) -> threading.Thread:
    """SIGKILL the worker of ``rank`` once ``samples`` were seen by ``world_size`` workers."""

    def watch() -> None:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            rows = list(folder.rows(run / folder.METRICS))
            if rows and rows[-1]["samples_seen"] >= samples and rows[-1]["world_size"] == world_size:
                os.kill(int((pids / str(rank)).read_text()), signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def train(tmp_path: Path, *, resize: str, slow_save_s: float, kill_rank: int) -> list[dict[str, Any]]:
    """The events of a run that grows, and loses the worker of ``kill_rank``; every position is used once in it."""
    from orchestrator.ray_train.trainer import AdaptiveTrainer

    run = tmp_path / "run"
    # The decision of 540 samples is taken after the checkpoint of 450 and before that of 600.
    killer = kill_at(run, tmp_path / "pids", samples=560, rank=kill_rank, world_size=2)
    AdaptiveTrainer(settings(tmp_path, resize=resize, slow_save_s=slow_save_s)).fit()
    killer.join()

    report = verify(run)
    print(report.text)
    assert report.violation is None
    assert report.samples == EPOCH * EPOCHS
    batches = {row["global_batch"] for row in folder.surviving(run / folder.METRICS)}
    assert {8, 32, 16, 48} <= batches
    assert recomputed(run) == recorded(run)
    return list(folder.rows(run / folder.EVENTS))


@pytest.mark.ray
@pytest.mark.timeout(280)
@pytest.mark.parametrize(("slow_save_s", "kill_rank"), [(0.0, 0), (2.0, 1)])
def test_every_position_is_used_once_while_workers_come_and_one_is_killed(
    cluster: None, tmp_path: Path, slow_save_s: float, kill_rank: int
) -> None:
    events = train(tmp_path, resize="live", slow_save_s=slow_save_s, kill_rank=kill_rank)
    resizes = [event for event in events if event["kind"] == "resize"]
    assert all(event["live"] for event in resizes)
    assert [(event["from_workers"], event["to_workers"]) for event in resizes][:2] == [(1, 2), (2, 1)]
    (fault,) = [event for event in events if event["kind"] == "fault"]
    assert fault["survived"]
    assert f"the worker of rank {kill_rank} is gone" in fault["reason"]
    # Who was left went on from what it had, rank zero's folder included: no checkpoint was read, and no step repeated.
    taken_over = [event for event in events if event["kind"] == "resumed"]
    assert [event["checkpoint"] for event in taken_over] == [None] * (kill_rank == 0)
    steps = [row["step"] for row in folder.rows(tmp_path / "run" / folder.METRICS)]
    assert steps == list(range(len(steps)))


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_every_position_is_used_once_where_all_workers_stop_for_a_change(cluster: None, tmp_path: Path) -> None:
    events = train(tmp_path, resize="restart", slow_save_s=2.0, kill_rank=1)
    kinds = [event["kind"] for event in events]
    assert "resize" in kinds
    assert "fault" in kinds
    resumed = [event for event in events if event["kind"] == "resumed"]
    after_kill = next(event for event in resumed if event["attempt"] == max(e["attempt"] for e in resumed))
    assert after_kill["checkpoint"] is not None
    # From the newest that was written: the kill may come late on a busy machine.
    saved = [event for event in events if event["kind"] == "checkpoint" and event["attempt"] < after_kill["attempt"]]
    assert after_kill["samples_seen"] == saved[-1]["samples_seen"]
