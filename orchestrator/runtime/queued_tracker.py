"""A tracker that may be slow or out of reach, kept away from the training thread by a bounded queue.

Another thread opens the service and hands it the lines. A full queue drops the oldest steps first: they are the most,
and the run's folder has them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, final

from orchestrator.ports import Tracker
from orchestrator.runtime.trackers import Note, dropped

_CAPACITY = 1000  # lines
_PATIENCE_S = 10.0  # for what is still queued when a process ends and the run goes on, as in a resize, which waits
LAST_PATIENCE_S = 30.0  # the same at the run's end

_Kind = Literal["step", "event", "evaluation", "groups"]


class ServiceTracker(Tracker, Protocol):
    """A tracker whose service has an id for the run; ``address`` is where a person finds it, as far as is known."""

    run_id: str
    address: str | None


@final
class QueuedTracker:
    """``orchestrator.ports.Tracker`` in front of one that ``make`` opens in the thread.

    ``say`` takes notes for the run's events: the service's id for the run as ``tracking``, so that an attempt which
    resumes goes on with it; once that lines were dropped; and that the tracker itself was. Steps go on at most every
    ``every_s`` seconds, and always the last one before an event that ends the run, and before ``close``.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], ServiceTracker],
        *,
        say: Callable[[Note], None],
        every_s: float,
        now: Callable[[], float],
        capacity: int = _CAPACITY,
        patience_s: float = _PATIENCE_S,
        last_patience_s: float = LAST_PATIENCE_S,
    ) -> None:
        self.name = name
        self._make = make
        self._say = say
        self._every_s = every_s
        self._now = now
        self._capacity = capacity
        self._patience_s = patience_s
        self._last_patience_s = last_patience_s
        self._last_s = float("-inf")
        self._held: Mapping[str, Any] | None = None  # the newest step, if it was not queued
        self._changed = threading.Condition()
        self._queue: deque[tuple[_Kind, Mapping[str, Any]]] = deque()
        self._lost = 0
        self._closing = False
        self._over = False
        self._thread = threading.Thread(target=self._run, name=f"groundswell-{name}", daemon=True)
        self._thread.start()

    # The training thread

    def step(self, row: Mapping[str, Any]) -> None:
        now = self._now()
        if now - self._last_s < self._every_s:
            self._held = row
            return
        self._last_s, self._held = now, None
        self._put("step", row)

    def event(self, row: Mapping[str, Any]) -> None:
        if row["kind"] in ("finished", "stopped", "fault"):
            self._patience_s = self._last_patience_s
            self._release()
        self._put("event", row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._put("evaluation", row)

    def groups(self, row: Mapping[str, Any]) -> None:
        self._put("groups", row)

    def close(self) -> None:
        """Wait for what is queued, though not for long."""
        self._release()
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(self._patience_s)
        with self._changed:
            late, self._over = not self._over, True
        if late:
            self._say(dropped(self.name, f"it did not take the last lines within {self._patience_s:g} s"))

    def _release(self) -> None:
        if self._held is not None:
            self._put("step", self._held)
            self._held = None

    def _put(self, kind: _Kind, row: Mapping[str, Any]) -> None:
        with self._changed:
            if self._over:
                return
            if len(self._queue) >= self._capacity:
                self._make_room()
            self._queue.append((kind, row))
            self._changed.notify()

    def _make_room(self) -> None:
        oldest = next((at for at, (kind, _) in enumerate(self._queue) if kind == "step"), 0)
        del self._queue[oldest]
        self._lost += 1
        if self._lost == 1:
            reason = f"{self.name} is too slow for this run: the oldest of {self._capacity} queued lines are left out"
            self._say({"kind": "tracker_behind", "reason": reason, "tracker": self.name})

    # The other thread

    def _run(self) -> None:
        try:
            tracker = self._make()
            self._introduce(tracker)
            while (item := self._take()) is not None:
                kind, row = item
                getattr(tracker, kind)(row)
            tracker.close()
        except Exception as error:
            with self._changed:
                given_up, self._over = self._over, True
                self._queue.clear()
            if not given_up:
                self._say(dropped(self.name, error))
        else:
            with self._changed:
                self._over = True

    def _introduce(self, tracker: ServiceTracker) -> None:
        at = "" if tracker.address is None else f" at {tracker.address}"
        reason = f"{self.name} follows this run as {tracker.run_id}{at}"
        self._say({"kind": "tracking", "reason": reason, "tracker": self.name, "run_id": tracker.run_id})

    def _take(self) -> tuple[_Kind, Mapping[str, Any]] | None:
        """The next line; ``None`` when no more comes."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            return self._queue.popleft() if self._queue and not self._over else None
