"""A run at a URL has one writer, and object stores know no locks: who writes leaves a note there, and renews it.

Whoever comes watches the note. One that changes is of a writer who lives; one that stays as it is for ``WATCH_S`` is of
one who died. No clocks are compared. Two who come in the same moment both write: the first to find the other's note in
the place of its own gives way.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections.abc import Callable
from typing import final

from orchestrator.errors import RunFolderError
from orchestrator.runtime.remote_store import RemoteFolder

NOTE = "writer.json"
RENEW_S = 5.0
WATCH_S = 4 * RENEW_S
_LOOK_EVERY_S = 1.0


@final
class Lease:
    """The right to write at ``remote``. ``take`` comes first."""

    def __init__(self, remote: RemoteFolder, *, now: Callable[[], float] = time.monotonic) -> None:
        self._remote, self._now = remote, now
        self._writer = secrets.token_hex(8)
        self._renewals = 0
        self._renewed_s = float("-inf")

    def take(self, *, watch_s: float = WATCH_S) -> None:
        """Raises ``RunFolderError`` while another one writes there."""
        seen, until_s = self._remote.read(NOTE), self._now() + watch_s
        while seen is not None and not _died_here(seen) and self._now() < until_s:
            time.sleep(min(_LOOK_EVERY_S, watch_s))
            now_there = self._remote.read(NOTE)
            if now_there not in (None, seen):
                raise RunFolderError(
                    f"{self._remote.url} is being written by {_whose(now_there)}, and a run has one writer: wait for "
                    "that run to end, or stop it first"
                )
            seen = now_there
        self._write()

    def renew(self) -> bool:
        """Whether it is still held; it is lost once another one writes there."""
        if self._now() - self._renewed_s < RENEW_S:
            return True
        there = self._remote.read(NOTE)
        if there is not None and _field(there, "writer") != self._writer:
            return False
        self._write()
        return True

    def give_back(self) -> None:
        there = self._remote.read(NOTE)
        if there is not None and _field(there, "writer") == self._writer:
            self._remote.remove(NOTE)

    def _write(self) -> None:
        self._renewals += 1
        note = {"writer": self._writer, "host": platform.node(), "pid": os.getpid(), "renewals": self._renewals}
        self._remote.write(NOTE, json.dumps(note).encode())
        self._renewed_s = self._now()


def is_written(remote: RemoteFolder) -> bool | None:
    """Whether a process writes there; ``None`` where only watching the note would tell."""
    note = remote.read(NOTE)
    return False if note is None or _died_here(note) else None


def _died_here(note: bytes) -> bool:
    """Whether the writer was a process of this machine, and is gone; one under this process's number was before it."""
    if _field(note, "host") != platform.node():
        return False
    pid = _field(note, "pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _whose(note: bytes | None) -> str:
    return f"process {_field(note or b'', 'pid')} on {_field(note or b'', 'host')}"


def _field(note: bytes, name: str) -> object:
    try:
        found = json.loads(note)
    except ValueError:
        return None
    return found.get(name) if isinstance(found, dict) else None
