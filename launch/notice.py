"""Notice to end, as a worker under torchrun gets it: by a signal, or by the death of the agent that started it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import final

from orchestrator.runtime import folder

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # an agent hands on the one that it got
_LOOK_EVERY_S = 1.0


@final
class Notice:
    """Turns notice into a stop request in the run's folder, which reaches rank zero, and through it all ranks.

    ``is_current`` says whether this process's group is still the one that trains there: one that was left behind must
    not stop its successor, and ends instead. Two things end a process at once, without saving: a further signal after
    Ctrl-C, and a stop request of the year 1970, which is how ``groundswell run`` says so.

    A second SIGTERM does not: where a whole job is ended, Slurm and the agent each send one.
    """

    def __init__(self, path: Path, *, is_current: Callable[[], bool]) -> None:
        self._request = path / folder.STOP_REQUEST
        self._is_current = is_current
        self._training = True
        self._interrupted = False
        self._parent = os.getppid()
        self.given = False

    def listen(self) -> None:
        """From now on; called on the main thread."""
        for number in _SIGNALS:
            signal.signal(number, self._take)
        threading.Thread(target=self._watch_agent, name="watch-agent", daemon=True).start()

    def training_is_over(self) -> None:
        """There is nothing left to stop: from now on notice is only remembered."""
        self._training = False

    def wait(self, patience_s: float) -> bool:
        """Whether notice was given, after waiting for it."""
        end_s = time.monotonic() + patience_s
        while not self.given and time.monotonic() < end_s:
            time.sleep(0.02)
        return self.given

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted or self._end_now():
            os._exit(128 + number)
        self._interrupted = number == signal.SIGINT
        self._give(128 + number)

    def _give(self, code: int) -> None:
        self.given = True
        if not self._training:
            return
        if not self._is_current():
            os._exit(code)
        with suppress(OSError):
            self._request.touch()

    def _end_now(self) -> bool:
        try:
            return self._request.stat().st_mtime == 0
        except OSError:
            return False

    def _watch_agent(self) -> None:
        """A worker whose agent died would train on where nobody can tell it of nodes that come and go."""
        while os.getppid() == self._parent:
            time.sleep(_LOOK_EVERY_S)
        if self.given:
            os._exit(128 + signal.SIGTERM)
        self._give(128 + signal.SIGTERM)
