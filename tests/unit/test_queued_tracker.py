"""A service that is slow or gone holds nobody up: lines wait in a bounded queue, and what is lost is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runtime import folder, tracking
from orchestrator.runtime.queued_tracker import QueuedTracker
from orchestrator.runtime.trackers import Trackers
from tests.support import config

PATIENCE_S = 20.0


class Service:
    """A tracker that takes nothing until ``open`` is set, and then remembers what came."""

    name = "service"
    run_id = "abc"
    address: str | None = "http://example.org/abc"

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.open = threading.Event()
        self.taken: list[tuple[str, int]] = []
        self.closed = threading.Event()
        self.fails_at = fails_at
        self.calls = 0

    def _take(self, kind: str, row: Mapping[str, Any]) -> None:
        assert self.open.wait(PATIENCE_S)
        self.calls += 1
        if self.calls == self.fails_at:
            raise ConnectionError("gone")
        self.taken.append((kind, row["samples_seen"]))

    def step(self, row: Mapping[str, Any]) -> None:
        self._take("step", row)

    def event(self, row: Mapping[str, Any]) -> None:
        self._take("event", row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._take("evaluation", row)

    def groups(self, row: Mapping[str, Any]) -> None:
        self._take("groups", row)

    def close(self) -> None:
        self.closed.set()


def queued(make: Callable[[], Any], said: list[Mapping[str, Any]], **more: Any) -> QueuedTracker:
    return QueuedTracker("service", make, say=said.append, **({"every_s": 0.0, "now": lambda: 0.0} | more))


def row(samples_seen: int, kind: str = "decision") -> dict[str, Any]:
    return {"samples_seen": samples_seen, "kind": kind}


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_lines_arrive_in_order_and_the_runs_id_is_said_once() -> None:
    service, said = Service(), []
    service.open.set()
    tracker = queued(lambda: service, said)
    tracker.event(row(1))
    tracker.step(row(2))
    tracker.evaluation(row(2))
    tracker.groups(row(3))
    tracker.close()
    assert service.taken == [("event", 1), ("step", 2), ("evaluation", 2), ("groups", 3)]
    assert service.closed.is_set()
    assert [(note["kind"], note["run_id"]) for note in said] == [("tracking", "abc")]
    assert "http://example.org/abc" in said[0]["reason"]


def test_a_full_queue_drops_the_oldest_steps_and_says_so_once() -> None:
    service, said = Service(), []
    tracker = queued(lambda: service, said, capacity=4)
    tracker.event(row(0))
    until(lambda: said)  # open
    until(lambda: not tracker._queue)  # its thread waits in the service with the first line
    for samples_seen in range(1, 8):
        (tracker.event if samples_seen == 2 else tracker.step)(row(samples_seen))
    service.open.set()
    tracker.close()
    assert service.taken == [("event", 0), ("event", 2), ("step", 5), ("step", 6), ("step", 7)]
    assert [note["kind"] for note in said] == ["tracking", "tracker_behind"]
    assert "queued lines" in said[1]["reason"]


def test_a_queue_of_other_lines_than_steps_is_bounded_too() -> None:
    service, said = Service(), []
    tracker = queued(lambda: service, said, capacity=3)
    tracker.event(row(0))
    until(lambda: said)
    until(lambda: not tracker._queue)
    for samples_seen in range(1, 6):
        tracker.event(row(samples_seen))
    service.open.set()
    tracker.close()
    assert [samples_seen for _, samples_seen in service.taken] == [0, 3, 4, 5]


def test_steps_are_thinned_by_the_clock_and_the_last_one_is_always_sent() -> None:
    service, clock = Service(), iter([0.0, 1.0, 4.9, 5.0, 6.0, 7.0, 11.0, 12.0])
    service.open.set()
    tracker = queued(lambda: service, [], every_s=5.0, now=lambda: next(clock))
    for samples_seen in range(1, 7):
        tracker.step(row(samples_seen))
    tracker.event(row(6, "finished"))
    tracker.step(row(7))
    tracker.step(row(8))
    tracker.close()
    assert service.taken == [("step", 1), ("step", 4), ("step", 6), ("event", 6), ("step", 7), ("step", 8)]


def raises() -> Service:
    raise PermissionError("no key")


@pytest.mark.parametrize(("make", "why"), [(raises, "no key"), (lambda: Service(fails_at=1), "gone")])
def test_a_service_that_fails_is_dropped_once_and_costs_nothing_more(make: Callable[[], Service], why: str) -> None:
    said: list[Mapping[str, Any]] = []

    def opened() -> Service:
        service = make()
        service.open.set()
        return service

    tracker = queued(opened, said)
    tracker.event(row(0))
    until(lambda: any(note["kind"] == "tracker_dropped" for note in said))
    for samples_seen in range(1, 2000):
        tracker.step(row(samples_seen))
    tracker.close()
    (note,) = [note for note in said if note["kind"] != "tracking"]
    assert why in note["reason"]
    assert len(tracker._queue) == 0


@pytest.mark.parametrize("kind", ["decision", "finished"])
def test_a_service_that_hangs_holds_the_end_up_only_for_its_patience(kind: str) -> None:
    service, said = Service(), []
    patience = {"patience_s": 0.2, "last_patience_s": 99.0} if kind == "decision" else {"last_patience_s": 0.2}
    tracker = queued(lambda: service, said, **patience)
    tracker.event(row(0, kind))
    began_s = time.monotonic()
    tracker.step(row(1))
    tracker.close()
    assert 0.15 < time.monotonic() - began_s < 5.0
    assert [note["kind"] for note in said] == ["tracking", "tracker_dropped"]
    assert "within 0.2 s" in said[1]["reason"]
    service.open.set()
    tracker._thread.join(PATIENCE_S)
    assert service.taken == [("event", 0)]  # nothing after it was given up
    assert len(said) == 2


def test_services_that_hang_do_not_hold_the_end_of_a_run_up_beyond_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = [Service(), Service()]
    monkeypatch.setattr(tracking, "ENDING_S", 1.0)
    monkeypatch.setattr(tracking, "MlflowTracker", lambda *_, **__: services[0])
    monkeypatch.setattr(tracking, "WandbTracker", lambda *_, **__: services[1])
    followed = config(
        tmp_path, tracking={"mlflow_experiment": "one", "wandb_project": "two"}, budget={"worker_hours": 1.0}
    )
    trackers = Trackers()
    tracking.follow(trackers, followed, tmp_path, now=time.monotonic)
    trackers.take(folder.EVENTS, [row(0, "stopped")])
    began_s = time.monotonic()
    trackers.close()
    assert 0.9 < time.monotonic() - began_s < 1.9  # one after another it would be 2 s
    dropped = [note for note in trackers.notes() if note["kind"] == "tracker_dropped"]
    assert sorted(note["tracker"] for note in dropped) == ["mlflow", "wandb"]
    for service in services:
        service.open.set()
