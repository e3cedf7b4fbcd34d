"""Checkpoints that rank zero writes behind training's back: all ranks hear of each at the same step, in one order."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.runtime import checkpoints
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp, run_fleet
from tests.unit.small_runs import BATCH, assert_readable, events, rows_of

pytestmark = pytest.mark.dist
STEPS, SLOW_S = 40, 0.02


def part(rank: int, path: str, asynchronous: bool, resume: bool, stop: int | None) -> list[tuple[int, str]]:
    """What this rank reported, and before which step; rank zero's disk is slow, and the ranks' steps are not alike."""
    sync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(SLOW_S)
        sync(handle)

    checkpoints.os.fsync = slow
    settings = config(
        path,
        train={"samples": STEPS * BATCH},
        checkpoint={"every_samples": 6 * BATCH, "keep": 3, "asynchronous": asynchronous},
        ledger=True,
    )
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reported: list[tuple[int, str]] = []
    at = 0

    def report(saved: str) -> None:
        assert threading.current_thread() is threading.main_thread()
        reported.append((at, Path(saved).name))

    worker = replace(local_worker(settings), report_checkpoint=report)
    with Session(
        settings, model=model, optimizer=optimizer, dataset=blobs(), worker=worker, resume=resume
    ) as session:
        # Known to each, for any of them may have to go on in rank zero's place.
        assert session._history.succession.told.step == session.step_number
        for step in session:
            for samples in step:
                time.sleep(0.004 * (rank + 1))
                session.backward(cross_entropy(session.model, samples))
            if session.step_number == stop:
                session.request_stop("the test asked")
            session.step()
            at = session.step_number
    return reported


def names(*steps: int) -> list[str]:
    return [f"step-{step:09d}" for step in steps]


def test_all_ranks_report_the_same_checkpoints_at_the_same_steps_and_any_number_of_them_goes_on(
    tmp_path: Path,
) -> None:
    run_fleet(part, 1, str(tmp_path / "whole"), False, False, None)
    first, second = run_fleet(part, 2, str(tmp_path / "parts"), True, False, 27)
    assert first == second
    assert [name for _, name in first][:4] == names(6, 12, 18, 24)
    late = [at - int(name[5:]) for at, name in first[:4]]
    assert all(steps > 0 for steps in late), late  # training went on meanwhile
    told = [e["step"] for e in events(tmp_path / "parts", "checkpoint")]
    assert names(*told) == [name for _, name in first]
    assert_readable(tmp_path / "parts")

    found: list[list[Any]] = run_fleet(part, 3, str(tmp_path / "parts"), True, True, None)
    assert found[0] == found[1] == found[2]
    assert_readable(tmp_path / "parts")
    parts, whole = rows_of(tmp_path / "parts", "step", "loss"), rows_of(tmp_path / "whole", "step", "loss")
    assert [step for step, _ in parts] == list(range(STEPS))
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=1e-5)
