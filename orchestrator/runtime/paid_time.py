"""How long has an attempt been paid for? A worker costs from the start of its process, before it has imported anything.

By clocks that are never set: two attempts are compared by how long each took, and not by the time of day, which may be
put back, and differs from node to node.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import final

from orchestrator.runtime import folder
from orchestrator.runtime.worker import Worker

_IMPORTED_S = time.monotonic()
_START_TIME = 19  # of the fields behind the command's name, counted from 0; see proc(5), field 22


def process_age_s() -> float:
    """Seconds; where the system does not say (it is Linux that does), since this module was imported."""
    imported_s = time.monotonic() - _IMPORTED_S
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
        return max(imported_s, up_s - int(fields[_START_TIME]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return imported_s


@final
class PaidTime:
    """For each worker of this attempt: from its process's start, where that was started for the run, or from now on."""

    def __init__(self, worker: Worker, *, anew: bool = False) -> None:
        """``anew``: another process has counted what these workers cost so far."""
        self._worker = worker
        self._age_s = process_age_s() if worker.own_process and not anew else 0.0
        self._counted_s = worker.now()  # up to then
        self._first_workers = self._workers = max(1, worker.world_size)
        self._worker_s = 0.0  # up to then, besides the age

    def limit(self, run: Path) -> None:
        """Ray may give the run a process that it kept ready: before the run, or its last attempt, it was not paid.

        That time is known only by the time of day. A clock that was set meanwhile shortens what is counted to nothing,
        or leaves it at the age of the process.
        """
        if self._worker.runtime != "ray":
            return
        config = run / folder.CONFIG  # written as the run was started
        written = config.stat().st_mtime if config.exists() else 0.0
        given = max([written, *(row.get("time", 0.0) for row in folder.rows(run / folder.EVENTS))])
        self._age_s = min(self._age_s, max(0.0, self._worker.wall_time() - given))

    def regrouped(self, *, newcomers_s: float) -> None:
        """The group has changed; its newcomers' processes are ``newcomers_s`` old together."""
        now_s = self._worker.now()
        self._worker_s += (now_s - self._counted_s) * self._workers + newcomers_s
        self._counted_s, self._workers = now_s, self._worker.world_size

    @property
    def worker_s(self) -> float:
        """[worker-seconds]"""
        since_s = (self._worker.now() - self._counted_s) * self._workers
        return self._age_s * self._first_workers + self._worker_s + since_s

    @property
    def now_s(self) -> float:
        """Seconds, as if all of it had been for those workers that the attempt began with."""
        return self.worker_s / self._first_workers
