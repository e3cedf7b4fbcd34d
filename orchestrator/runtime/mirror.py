"""Carries a run's folder to its URL while it trains, and orders from there to the run. Two threads of rank zero's.

The training thread writes into the folder and never waits for the network, but at an end. Lines go up before the
checkpoints that count on them, the events before all other lines, and a checkpoint's manifest after its other files: a
run that is cut off anywhere leaves at the URL what an attempt can go on from. While the URL is out of reach training
goes on, and what has changed is sent when it is back.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from orchestrator.errors import StorageError
from orchestrator.runtime import folder
from orchestrator.runtime.control_requests import CONTROL, SUFFIX
from orchestrator.runtime.remote_checkpoints import CHECKPOINTS, CheckpointsThere
from orchestrator.runtime.remote_lease import Lease
from orchestrator.runtime.remote_store import RemoteFolder

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0  # for orders, and for what has changed
_SEND_EVERY_S = 5.0  # at most, each time the whole file
_SHARE_OF_TIME = 0.1  # of the time may go to sending one file again and again
_LONGEST_PAUSE_S = 30.0  # between two tries while the URL is out of reach
_SHORT_PAUSE_S = 1.0  # the same while the run waits
_ENDING_S = 10.0  # for the thread to give back what it holds

# The lines are read in this order, and sent in the other one: the events are never behind what they are about, nor is
# the ledger behind the steps.
_LINES = (folder.METRICS, folder.EVALS, folder.GROUPS, folder.LEDGER, folder.EVENTS)
_STAYS = (CONTROL, CHECKPOINTS, folder.STOP_REQUEST, "checkpoint_manager_snapshot.json")
_UNFINISHED = (".tmp", ".part")


@final
class Mirror:
    """Keeps what lies at ``remote`` like the folder ``path``, whose lock the caller holds.

    ``say`` takes notes for the run's events, from another thread. Raises ``RunFolderError`` where another process
    writes there, and ``StorageError`` where it is out of reach.
    """

    def __init__(
        self,
        path: Path,
        remote: RemoteFolder,
        *,
        keep: int,
        patience_s: float,
        say: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._path, self._remote, self._say = path, remote, say
        self._patience_s = patience_s
        self._lease = Lease(remote)
        self._lease.take()
        remote.remove(f"{CONTROL}/{folder.STOP_REQUEST}")  # meant for the attempt before
        there = remote.sizes()
        self._checkpoints = CheckpointsThere(path / CHECKPOINTS, remote, names=there, keep=keep)
        self._sent: dict[str, tuple[int, int]] = {}  # what was sent of each file: bytes, and its time
        self._due_s: dict[str, float] = {}
        for name, size in there.items():
            if "/" in name and _size(path / name) == size:  # such as curves, which an attempt begins afresh
                self._sent[name] = self._state(name)
        self._changed = threading.Condition()
        self._begun = self._complete = self._wanted = 0  # numbers of looks
        self._moved_s = time.monotonic()
        self._trouble: str | None = None
        self._lost = self._closing = False
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._run, self._listen)]
        for thread in self._threads:
            thread.start()

    # The training thread

    def wait(self) -> str | None:
        """Until all that lies in the folder now is at the URL; why not, where nothing has moved for ``patience_s``."""
        with self._changed:
            number = self._wanted = self._begun + 1  # the look under way may have come too early
            self._changed.notify_all()
            asked_s = time.monotonic()
            while self._complete < number:
                left_s = max(asked_s, self._moved_s) + self._patience_s - time.monotonic()
                if self._lost or left_s <= 0:
                    return self._missing()
                self._changed.wait(min(left_s, 1.0))
        return None

    def close(self) -> None:
        """Wait for the last uploads, and stop; what is not there is logged."""
        if not self._lost and (missing := self.wait()) is not None:
            logger.error("%s", missing)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_ENDING_S)

    def _missing(self) -> str:
        names = [name for name in self._names() if self._sent.get(name) != self._state(name)]
        names += self._checkpoints.missing
        why = "another process writes there" if self._lost else self._trouble
        why = why or f"nothing has moved for {self._patience_s:g} s"
        return (
            f"not all of the run is at {self._remote.url} ({why}): {', '.join(names[:5])}"
            f"{f' and {len(names) - 5} more' if len(names) > 5 else ''} {'is' if len(names) == 1 else 'are'} only in "
            f"{self._path} on {platform.node()}; once it is in reach, resume the run there, which sends them"
        )

    # The other thread

    def _run(self) -> None:
        pause_s = LOOK_EVERY_S
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._wanted > self._begun or self._closing or self._lost, timeout=pause_s
                )
                if self._closing or self._lost:
                    return
                self._begun += 1
                number, at_once = self._begun, self._wanted >= self._begun
            try:
                more = not self._look(at_once=at_once)
            except (StorageError, OSError) as error:
                self._out_of_reach(str(error))
                pause_s = min(max(2 * pause_s, LOOK_EVERY_S), _LONGEST_PAUSE_S)
                if at_once:  # somebody waits
                    with self._changed:
                        self._changed.wait(_SHORT_PAUSE_S)
                        self._wanted = self._begun + 1
                continue
            pause_s = 0.0 if more else LOOK_EVERY_S
            self._in_reach()
            with self._changed:
                if not more:
                    self._complete = number
                elif at_once:
                    self._wanted = number + 1
                self._changed.notify_all()

    @property
    def _over(self) -> bool:
        return self._closing or self._lost

    def _listen(self) -> None:
        """Besides, for sending a large checkpoint takes long."""
        while not self._lost:
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, timeout=LOOK_EVERY_S):
                    break
            with suppress(StorageError, OSError):  # whoever sends says so
                if not self._lease.renew():
                    self._give_way()
                    return
                self._take_orders()
        with suppress(StorageError):
            self._lease.give_back()

    def _look(self, *, at_once: bool) -> bool:
        """Send what has changed, with one checkpoint at most; whether that is all there is."""
        # The checkpoint first, then the lines: it goes up after all that it counts on.
        checkpoint = self._checkpoints.set_aside()
        at_once = at_once or checkpoint is not None
        lines = [(name, self._state(name)) for name in _LINES if (self._path / name).exists()]
        others = [(name, self._state(name)) for name in self._names() if name not in _LINES]
        for name, state in [*others, *reversed(lines)]:
            if self._sent.get(name) != state and (at_once or time.monotonic() >= self._due_s.get(name, 0.0)):
                self._send(name, state)
        if checkpoint is not None:
            self._checkpoints.send(checkpoint, moved=self._moved)
        self._checkpoints.forget_old()
        return checkpoint is None

    def _send(self, name: str, state: tuple[int, int]) -> None:
        began_s = time.monotonic()
        try:
            if name in _LINES:
                with (self._path / name).open("rb") as file:
                    data = file.read(state[0])
                self._remote.write(name, data[: data.rfind(b"\n") + 1])  # whole lines
            else:
                self._remote.send(self._path / name, name, moved=self._moved)
        except FileNotFoundError:
            return
        took_s = time.monotonic() - began_s
        self._due_s[name] = time.monotonic() + max(_SEND_EVERY_S, took_s / _SHARE_OF_TIME)
        self._sent[name] = state
        self._moved()

    def _take_orders(self) -> None:
        """Requests go where the run looks for them; each is taken away first, so that who gave it knows."""
        stop = f"{CONTROL}/{folder.STOP_REQUEST}"
        for name in sorted(self._remote.sizes(CONTROL)):
            if name == stop:
                (self._path / folder.STOP_REQUEST).touch()
                self._remote.remove(name)
            elif name.endswith(SUFFIX) and (data := self._remote.read(name)) is not None:
                self._remote.remove(name)
                local = self._path / name
                local.parent.mkdir(exist_ok=True)
                unfinished = local.with_suffix(".tmp")
                unfinished.write_bytes(data)
                unfinished.replace(local)

    def _give_way(self) -> None:
        reason = f"another process has begun to write at {self._remote.url}: this one stops, and sends nothing more"
        self._say({"kind": "warning", "reason": reason})
        (self._path / folder.STOP_REQUEST).touch()
        with self._changed:
            self._lost = True
            self._changed.notify_all()

    def _out_of_reach(self, why: str) -> None:
        if self._trouble is None:
            reason = f"{why}; training goes on, and what has changed is sent once {self._remote.url} is in reach"
            self._say({"kind": "storage_out_of_reach", "reason": reason})
        self._trouble = why

    def _in_reach(self) -> None:
        if self._trouble is not None:
            self._say({"kind": "storage_in_reach", "reason": f"{self._remote.url} is in reach again, and up to date"})
        self._trouble = None

    def _moved(self) -> None:
        with self._changed:
            self._moved_s = time.monotonic()

    def _names(self) -> list[str]:
        """The files that belong at the URL, without the checkpoints."""
        found = []
        for file in sorted(self._path.rglob("*")):
            name = file.relative_to(self._path).as_posix()
            top = name.partition("/")[0]
            hidden = any(part.startswith(".") for part in name.split("/"))
            if top not in _STAYS and not hidden and file.suffix not in _UNFINISHED and file.is_file():
                found.append(name)
        return found

    def _state(self, name: str) -> tuple[int, int]:
        with suppress(FileNotFoundError):
            found = (self._path / name).stat()
            return found.st_size, found.st_mtime_ns
        return 0, 0


def _size(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_size
    return None
