"""A job whose head is gone is over, although what waits for the head never returns."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import jobs, ray_cluster
from launch.jobs import Job
from orchestrator.config import RunConfig
from orchestrator.errors import SessionError
from tests.support import config


def listening() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def until(there: Callable[[], bool]) -> float:
    """Seconds until it holds, at most twenty."""
    began_s = time.monotonic()
    while not there() and time.monotonic() - began_s < 20:
        time.sleep(0.02)
    return time.monotonic() - began_s


def test_a_job_ends_when_its_head_has_answered_nobody_for_its_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, over = listening(), threading.Event()
    address = "{}:{}".format(*head.getsockname())

    def fit(settings: RunConfig, *, resume: bool, address: str, on_start: Callable[[str], None]) -> None:
        on_start(address)
        over.wait()

    monkeypatch.setattr(ray_cluster, "fit", fit)
    monkeypatch.setattr(jobs, "_LOOK_FOR_HEAD_EVERY_S", 0.05)
    job = Job(
        config(tmp_path), runtime="ray", resume=False, address=address, tell=lambda line: None, head_patience_s=0.5
    )
    try:
        time.sleep(1.0)
        assert job.running
        head.close()
        assert 0.4 <= until(lambda: not job.running) < 10
        assert job.head_is_lost
        assert isinstance(job.error, SessionError)
        assert f"the head of the Ray cluster at {address} is gone" in job.failure
    finally:
        over.set()


@pytest.mark.parametrize("alive", [True, False])
def test_an_error_of_ray_is_named_after_the_head_only_where_the_head_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    head = listening()
    address = "{}:{}".format(*head.getsockname())

    def fit(settings: RunConfig, *, resume: bool, address: str, on_start: Callable[[str], None]) -> None:
        on_start(address)
        if not alive:
            head.close()
        raise RuntimeError("an actor died")

    monkeypatch.setattr(ray_cluster, "fit", fit)
    job = Job(config(tmp_path), runtime="ray", resume=False, address=address, tell=lambda line: None)
    until(lambda: not job.running)
    head.close()
    assert ("is gone" in job.failure) != alive
    assert ("an actor died" in job.failure) == alive
