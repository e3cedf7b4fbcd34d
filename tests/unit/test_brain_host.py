"""What the controller's side keeps of a rank zero that is gone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from orchestrator.ports import Commands
from orchestrator.ray_train.host import BrainHost
from tests.support import config

NOTE = {"kind": "workers_failed", "reason": "newcomers did not come to train"}


def host(path: Path, call: Any, **given: Any) -> BrainHost:
    return BrainHost(config(path), call, take_resize_cost_s=lambda: None, notes=(), **given)


def test_notes_that_a_rank_zero_did_not_live_to_write_are_for_the_next(tmp_path: Path) -> None:
    asked, told = threading.Event(), threading.Event()
    gone = threading.Event()

    def call(function: Any, deliveries: Any) -> Any:
        asked.set()
        if not deliveries:
            told.wait(10.0)
            return None
        raise RuntimeError("the worker is gone")

    one = host(tmp_path, call, gone=gone.set)
    assert asked.wait(10.0)
    one.command(Commands(notes=(NOTE,)))
    told.set()
    assert gone.wait(10.0)
    one.command(Commands(notes=(NOTE | {"reason": "again"},)))
    assert [note["reason"] for note in one.close()] == [NOTE["reason"], "again"]


def test_the_next_host_has_the_same_controller_and_one_at_a_time_goes_by_it(tmp_path: Path) -> None:
    one = host(tmp_path, lambda function, deliveries: None)
    other = host(tmp_path, lambda function, deliveries: None, goes_on=one)
    assert other.brain is one.brain
    assert other._thinking is one._thinking
    assert one.close() == other.close() == ()
