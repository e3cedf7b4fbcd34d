"""Who follows a run, and what becomes of one that fails: it is dropped, and training goes on.

What a tracker has to say about itself (its id of the run, that it was dropped) is a note, which the journal writes
among the run's events.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from orchestrator.ports import Tracker
from orchestrator.runtime import folder

logger = logging.getLogger(__name__)

_USER_OF_ADDRESS = re.compile(r"//[^/@\s]+@")

Note = Mapping[str, Any]  # an event's kind, reason and evidence

_METHODS: Mapping[str, Callable[[Tracker, Mapping[str, Any]], None]] = {
    folder.METRICS: lambda tracker, row: tracker.step(row),
    folder.EVENTS: lambda tracker, row: tracker.event(row),
    folder.EVALS: lambda tracker, row: tracker.evaluation(row),
    folder.GROUPS: lambda tracker, row: tracker.groups(row),
}


@final
class Trackers:
    """Hands each line of the run's files on to those that follow it."""

    def __init__(self, live: Sequence[Tracker] = ()) -> None:
        self._live = list(live)
        self._notes: queue.SimpleQueue[Note] = queue.SimpleQueue()

    def add(self, tracker: Tracker) -> None:
        """Let ``tracker`` follow the run from here on."""
        self._live.append(tracker)

    def take(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that were appended to the run's ``file``."""
        if (method := _METHODS.get(file)) is None:
            return
        for tracker in tuple(self._live):
            try:
                for row in rows:
                    method(tracker, row)
            except Exception as error:
                self._live.remove(tracker)
                self.say(dropped(tracker.name, error))

    def say(self, note: Note) -> None:
        """From any thread: a note for the run's events."""
        self._notes.put(note)

    def notes(self) -> list[Note]:
        """What was said since the last call."""
        said = []
        while not self._notes.empty():
            said.append(self._notes.get())
        return said

    def close(self) -> None:
        """All at once, so that two that do not answer take no longer than one."""
        live, self._live = self._live, []
        threads = [threading.Thread(target=self._close, args=(tracker,), daemon=True) for tracker in live]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _close(self, tracker: Tracker) -> None:
        try:
            tracker.close()
        except Exception as error:
            self.say(dropped(tracker.name, error))


def dropped(name: str, error: BaseException | str) -> Note:
    """The note that a tracker follows the run no more."""
    said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    # Libraries repeat the address that they were given, and a user and password may stand in it.
    why = _USER_OF_ADDRESS.sub("//", " ".join(said.split()))[:500]
    reason = f"{name} follows this run no more: {why}; what it has not got is in the run's folder"
    logger.warning("%s", reason)
    return {"kind": "tracker_dropped", "reason": reason, "tracker": name}
