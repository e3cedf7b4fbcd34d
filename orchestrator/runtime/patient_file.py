"""Lines for a file whose storage may refuse them for a while: they wait in memory, and are written when it is back."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import final


@final
class Outage:
    """Since when, and why, storage refuses what it is given. ``now`` is a clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._since_s: float | None = None
        self._tried_s = 0.0
        self.why = ""

    def failed(self, why: str) -> bool:
        """It refused something; whether it is the first time since it last took something."""
        begins = self._since_s is None
        self._tried_s = self._now()
        if self._since_s is None:
            self._since_s = self._tried_s
        self.why = why
        return begins

    def over(self) -> bool:
        """It took something; whether that ends an outage."""
        ends, self._since_s = self._since_s is not None, None
        return ends

    @property
    def lasted_s(self) -> float:
        """0 while there is none."""
        return 0.0 if self._since_s is None else self._now() - self._since_s

    def tries_again(self, every_s: float) -> bool:
        """Whether something should be tried again: in an outage, so long after it was tried last. Then it is tried."""
        if self._since_s is None or self._now() - self._tried_s < every_s:
            return False
        self._tried_s = self._now()
        return True


@final
class PatientFile:
    """Appends whole lines to the file at ``path``, which is made by the first of them, and never again.

    One that is gone later is waited for: in its folder's place may be the empty one that a network path leaves behind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        self._was_open = False
        self._waiting: deque[bytes] = deque()
        self._begun = 0  # bytes of the first that waits which are in the file already

    @property
    def waiting(self) -> int:
        """How many lines wait."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        return sum(map(len, self._waiting))

    def append(self, lines: Iterable[bytes]) -> None:
        """Write what waits, and these. Raises ``OSError`` where that is refused; the rest goes on waiting."""
        self._waiting.extend(lines)
        while self._waiting:
            handle = self._open()
            data = b"".join(self._waiting)[self._begun :]
            self._take_off(self._begun + os.write(handle, data))

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _take_off(self, written: int) -> None:
        while self._waiting and written >= len(self._waiting[0]):
            written -= len(self._waiting.popleft())
        self._begun = written

    def _open(self) -> int:
        if self._handle is not None and not self._is_same(self._handle):
            self.close()
        if self._handle is None:
            self._begun = 0
            if self._path.exists():
                _leave_whole_lines(self._path)
            flags = os.O_WRONLY | os.O_APPEND | (0 if self._was_open else os.O_CREAT)
            self._handle = os.open(self._path, flags, 0o666)
            self._was_open = True
        return self._handle

    def _is_same(self, handle: int) -> bool:
        """Whether the file that is open still has its name: one that was deleted takes lines, and nobody reads them."""
        try:
            there = os.stat(self._path)
        except OSError:
            return False
        mine = os.fstat(handle)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _leave_whole_lines(path: Path) -> None:
    """Take off the half line that a crash may have left at the end."""
    with path.open("r+b") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
