"""How long worker processes lived, as one outside sees it: from their start to the moment that they are gone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import final


@final
class WorkerTime:
    """Watches the processes whose ids a task (``tests.ray.tasks:slow``) leaves in ``pids``; ``look`` often."""

    def __init__(self, pids: Path) -> None:
        self._pids = pids
        self._lived: dict[int, tuple[float, float]] = {}  # start, and last seen alive [s since boot]

    def look(self) -> None:
        for path in self._pids.iterdir():
            text = path.read_text()
            if text and int(text) not in self._lived and (start := _start_s(int(text))) is not None:
                self._lived[int(text)] = start, start
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        for pid, (start, _) in self._lived.items():
            if _start_s(pid) == start:
                self._lived[pid] = start, now_s

    @property
    def alive(self) -> bool:
        return any(_start_s(pid) == start for pid, (start, _) in self._lived.items())

    @property
    def total_s(self) -> float:
        return sum(last - start for start, last in self._lived.values())

    @property
    def workers(self) -> int:
        return len(self._lived)


def _start_s(pid: int) -> float | None:
    """Since boot; ``None`` for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19]) / os.sysconf("SC_CLK_TCK")
