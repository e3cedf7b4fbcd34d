"""Orders to a job under Ray Train: hold, caps on batch and workers, and a checkpoint act within two decisions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launch.cli import main
from orchestrator.runtime import folder
from orchestrator.runtime.checkpoints import verify
from orchestrator.runtime.ledger import verify as verify_ledger
from orchestrator.runtime.replay import recomputed, recorded
from tests.support import config

EVERY = 64


def until(there: Callable[[], Any]) -> Any:
    deadline_s = time.monotonic() + 100
    while not (found := there()):
        assert time.monotonic() < deadline_s, "nothing happened"
        time.sleep(0.02)
    return found


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(run / folder.EVENTS) if row["kind"] in kinds]


def order(run: Path, *arguments: str) -> dict[str, Any]:
    """Give an order and return the event that answers it."""
    done = CliRunner().invoke(main, ["control", str(run), *arguments])
    assert done.exit_code == 0, done.output
    return events(run, "control")[-1]


def rows_after(run: Path, event: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the steps after ``event``, once there are some."""
    return until(
        lambda: [row for row in folder.surviving(run / folder.METRICS) if row["samples_seen"] > event["samples_seen"]]
    )


def rows_from(run: Path, answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps after the second decision that follows the answer, once there are as many again."""
    due = answer["samples_seen"] + 2 * EVERY

    def after() -> list[dict[str, Any]]:
        rows = [
            row for row in folder.surviving(run / folder.METRICS) if row["samples_seen"] - row["global_batch"] > due
        ]
        return rows if rows and rows[-1]["samples_seen"] > due + 3 * EVERY else []

    return until(after)


def operate(run: Path, failed: list[BaseException]) -> None:
    try:
        until(lambda: (run / folder.METRICS).exists())
        held = order(run, "hold")
        assert len({row["global_batch"] for row in rows_from(run, held)}) == 1

        order(run, "cap", "--max-batch", "24")
        assert {row["global_batch"] for row in rows_from(run, order(run, "release"))} == {24}

        saved = order(run, "checkpoint")
        assert verify(Path(saved["path"])) is None
        assert len(events(run, "checkpoint")) == 1
        assert saved["samples_seen"] - events(run, "control")[-2]["samples_seen"] < 20 * EVERY

        order(run, "cap", "--max-workers", "1")
        resize = until(lambda: events(run, "resize"))[0]
        assert (resize["from_workers"], resize["to_workers"]) == (2, 1)
        alone = until(lambda: [row for row in rows_after(run, resize) if row["world_size"] == 1])
        assert {row["global_batch"] for row in alone} == {24}  # the orders stand
        wanted = events(run, "workers_wanted")[-1]
        assert (wanted["num_workers"], wanted["reason"]) == (1, "workers at most 1 by order")
        order(run, "stop")
    except BaseException as error:
        failed.append(error)
        (run / folder.STOP_REQUEST).touch()


@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.parametrize("resize", ["live", "restart"])
def test_orders_act_on_a_running_job_and_workers_above_a_cap_go_without_a_loss(
    cluster: None, tmp_path: Path, resize: str
) -> None:
    from orchestrator.ray_train.trainer import AdaptiveTrainer

    (tmp_path / "pids").mkdir()
    settings = config(
        tmp_path,
        task={"name": "tests.ray.tasks:slow", "options": {"pids": str(tmp_path / "pids"), "step_s": 0.02}},
        train={"samples": 100_000},
        batch={"initial": 16, "micro_batch": 4, "max": 48},
        controller={"policy": "schedule", "ramp": [[64, 24], [256, 32], [768, 48]], "every_samples": EVERY},
        workers={"initial": 2, "max": 2, "micro_batches_each": 2, "when": "always", "resize": resize},
        ledger=True,
    )
    run = tmp_path / "run"
    failed: list[BaseException] = []
    operator = threading.Thread(target=operate, args=(run, failed))
    operator.start()
    AdaptiveTrainer(settings).fit()
    operator.join()
    assert not failed, failed
    assert events(run, "stopped")[-1]["reason"] == "by order"
    # Where all were started again, the group of one worker was told of the orders that stand.
    still = [row for row in events(run, "control") if row["request"] is None]
    told = [(row["max_batch"], row["max_workers"], row["held"]) for row in still]
    assert told == [(24, 1, False)] * (resize == "restart")
    assert verify_ledger(run).violation is None
    decided = recorded(run)
    assert recomputed(run)[: len(decided)] == decided
