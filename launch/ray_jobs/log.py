"""How does the log of a job become the rows of a run again, though its stream may break and begin anew?"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from typing import final

from launch.json_rows import read_line
from launch.sources import News

# What Ray itself writes into a job's log before the entrypoint speaks.
_OF_RAY = re.compile(r"Running entrypoint for job |[\d\s,:-]+INFO job_manager\.py:\d+ -- Runtime env is setting up")
# Ray prints where a process was when it was asked to stop, once plain and once as a log line. Of real crashes it stays.
_ASKED_TO_STOP = re.compile(r"(\[.*logging\.cc:\d+: )?\*\*\* SIGTERM received at ")
_WHERE_IT_WAS = re.compile(r"(\[.*logging\.cc:\d+: )?(PC: @|    @ )")


def said_by_the_job(log: str) -> str:
    """A whole log without what Ray wrote before the entrypoint spoke."""
    return "\n".join(line for line in log.splitlines() if not _OF_RAY.match(line))


@final
class LogText:
    """The whole lines of a text that arrives in pieces, and from its first character again after ``begin_again``."""

    def __init__(self) -> None:
        self._taken = 0  # characters
        self._skip = 0
        self._rest = ""

    def begin_again(self) -> None:
        """The next piece is the text's beginning, of which nothing that was taken counts twice."""
        self._skip = self._taken

    def take(self, piece: str) -> list[str]:
        """The lines that this piece completes."""
        new = piece[self._skip :]
        self._skip -= len(piece) - len(new)
        self._taken += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        return lines

    def last(self) -> list[str]:
        """What stands behind the last line's end, once no more will come."""
        rest, self._rest = self._rest, ""
        return [rest] if rest else []


@final
class LogRows:
    """The rows in the lines of a log, one at a time; ``add`` may be called by another thread.

    ``clock`` is the run's own, in seconds since it began: what arrives late, or all at once, is dated as it happened.
    """

    def __init__(self, name: str, *, live: bool, now: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._lines: deque[str] = deque()
        self._live, self._now = live, now
        self._at_s, self._heard_s = 0.0, now()
        self._was_asked_to_stop = False

    def add(self, lines: list[str]) -> None:
        self._lines.extend(line for line in lines if not self._is_of_ray(line))

    @property
    def behind(self) -> bool:
        return bool(self._lines)

    def read(self) -> News:
        if not self._lines:
            return News()
        line = self._lines.popleft()
        said = read_line(line)
        if said is None:
            return News(lines=[line])
        self._at_s, self._heard_s = said.at_s, self._now()
        return said.news

    def clock(self) -> float:
        return self._at_s + (self._now() - self._heard_s if self._live and not self._lines else 0.0)

    def _is_of_ray(self, line: str) -> bool:
        asked = _ASKED_TO_STOP.match(line) is not None
        self._was_asked_to_stop = asked or (self._was_asked_to_stop and _WHERE_IT_WAS.match(line) is not None)
        return self._was_asked_to_stop or _OF_RAY.match(line) is not None
