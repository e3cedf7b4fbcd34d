"""A run's folder: what is written while training, one line at a time, and how it is read again.

Rank zero is the only writer while it lives. Lines carry the attempt that wrote them; after a recovery the lines beyond
the checkpoint stay, and a reader keeps the highest attempt of each step. Unknown is ``null``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

from orchestrator.errors import RunFolderError, StorageError
from orchestrator.runtime.patient_file import Outage, PatientFile

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
EVENTS = "events.jsonl"
GROUPS = "groups.jsonl"
LEDGER = "ledger.jsonl"
CONFIG = "config.yaml"
STOP_REQUEST = "stop.request"
LOCK = ".lock"
LAUNCHER_LOCK = ".launcher.lock"

MOST_WAITING_BYTES = 64 << 20  # a few hundred thousand steps
_TAIL_BYTES = 1 << 16
PATIENCE_S = 10.0  # for an attempt that has just ended to let go


@final
class RunWriter:
    """Appends to the run's files. What the storage refuses waits in memory, once it has taken a first line.

    Holds the folder's lock until it is closed, or its process ends; raises ``RunFolderError`` if another one does.
    """

    def __init__(
        self, folder: Path, *, patience_s: float = PATIENCE_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = folder
        self.outage = Outage(now)
        self._files: dict[str, PatientFile] = {}
        self._began = False
        self._notes: list[str] = []
        self._lock = take_lock(folder, patience_s=patience_s)
        self.attempt = next_attempt(folder)

    def append(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Add a line for each row, at once, so that a reader or a crash sees whole lines but for the last.

        Raises ``StorageError`` where not even the first line of all can be written.
        """
        file = self._files.setdefault(name, PatientFile(self.folder / name))
        lines = (json.dumps({"attempt": self.attempt} | {k: _known(v) for k, v in row.items()}) for row in rows)
        waited = self.waiting
        try:
            file.append((line + "\n").encode() for line in lines)
            for other in self._files.values() if waited else ():
                other.append(())
        except OSError as error:
            why = f"cannot write {self.folder / name}: {error}"
            if not self._began:
                raise StorageError(f"{why}; make room or mend the storage, then resume the run") from error
            if self.outage.failed(why):
                self._notes.append(f"{why}; lines are kept in memory, and training goes on")
                logger.warning("%s", self._notes[-1])
            return
        self._began = True
        if self.outage.over():
            self._notes.append(f"the storage takes lines again; {waited} that waited are written")
            logger.warning("%s", self._notes[-1])

    @property
    def waiting(self) -> int:
        """How many lines wait for the storage."""
        return sum(file.waiting for file in self._files.values())

    @property
    def is_full(self) -> bool:
        """Whether as much waits as should be kept."""
        return sum(file.waiting_bytes for file in self._files.values()) > MOST_WAITING_BYTES

    def notes(self) -> list[str]:
        """What became of the storage since the last call, for the run's events."""
        said, self._notes = self._notes, []
        return said

    def close(self) -> None:
        """Raises ``StorageError`` that says what is missing, where lines could not be written to the end."""
        lost = []
        for name, file in self._files.items():
            try:
                file.append(())
            except OSError as error:
                lost.append(f"{file.waiting} lines of {self.folder / name} ({error})")
            file.close()
        self._files = {}
        self._lock.release()
        if lost:
            raise StorageError(
                f"could not be written: {'; '.join(lost)}; make room or mend the storage, then resume the run: it "
                "trains again what its newest checkpoint has not"
            )


@contextmanager
def launching(folder: Path) -> Iterator[None]:
    """Be the only command that trains the run in ``folder``, which is made where it is not there.

    The writer's lock is free while workers are started anew, and another command would take the run over then. Raises
    ``RunFolderError`` at once if another one trains it.
    """
    make(folder)
    lock = take_lock(folder, patience_s=0, name=LAUNCHER_LOCK)
    try:
        yield
    finally:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LAUNCHER_LOCK]:  # nothing was begun, and nothing stays
                (folder / LAUNCHER_LOCK).unlink()
                folder.rmdir()
        lock.release()


def take_lock(folder: Path, *, patience_s: float, name: str = LOCK) -> FileLock:
    """The folder's lock, to be released; not held where the storage knows none.

    Raises ``RunFolderError`` if another process holds it for longer than ``patience_s``.
    """
    lock = FileLock(folder / name, timeout=patience_s, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunFolderError(
            f"{folder} is being written by another process, and a run has one writer: wait for that run to end, "
            "or stop it first"
        ) from None
    except (OSError, NotImplementedError):
        pass
    return lock


def exists(folder: Path) -> bool:
    """Whether a run was begun there; one that was refused before it began leaves a config, and is none."""
    return (folder / EVENTS).exists()


def is_written(folder: Path) -> bool | None:
    """Whether a process writes the run in ``folder``; ``None`` where the storage knows no locks, which would say so."""
    if not folder.exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0, thread_local=False):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return None


def quiet_s(folder: Path) -> float:
    """How long ago a line was written, by the time of day; infinite where none was."""
    times = [path.stat().st_mtime for path in (folder / EVENTS, folder / METRICS) if path.exists()]
    return time.time() - max(times, default=-math.inf)


def check(folder: Path, *, resume: bool) -> None:
    """Refuse to write over a run, or to resume what is not there. Raises ``RunFolderError``."""
    if exists(folder) and not resume:
        raise RunFolderError(
            f"{folder} already holds a run; pass --resume to go on with it, or choose another run.name or --run-dir"
        )
    missing = next((name for name in (CONFIG, EVENTS) if not (folder / name).exists()), None)
    if resume and missing is not None:
        raise RunFolderError(f"{folder} holds no run to resume (no {missing}); leave --resume out to begin one")


def make(folder: Path) -> None:
    """Make the folder of a run, where it is not there. Raises ``RunFolderError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"cannot make the run's folder {folder}: {error}; choose another with --run-dir"
        ) from error


def next_attempt(folder: Path) -> int:
    """One more than the highest attempt that wrote an event, which is the one that wrote the last."""
    last = last_row(folder / EVENTS)
    return 1 if last is None else 1 + int(last["attempt"])


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a file, in the order written; a torn last line is left out. Nothing if there is no file.

    Raises ``RunFolderError`` for a broken line that is not the last.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        torn: str | None = None
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise RunFolderError(f"{path}: {torn}; the file was changed by something else than a run")
            try:
                row = _row(line)
            except ValueError as error:
                torn = f"line {number} is not JSON of a run ({error})"
                continue
            yield row


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file, read from its end, for a run's may be long. ``None`` where there is none.

    Raises ``RunFolderError`` as ``rows`` does, for what it reads.
    """
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        lines: list[bytes] = []
        for tail in (_TAIL_BYTES, size):
            file.seek(max(0, size - tail))
            lines = file.read().splitlines()
            if len(lines) > 2:  # the first may begin before, and the last be torn
                break
    for line in reversed(lines[-2:]):
        try:
            return _row(line)
        except ValueError as error:
            broken = f"a line near its end is not JSON of a run ({error})"
    if len(lines) < 2:
        return None
    raise RunFolderError(f"{path}: {broken}; the file was changed by something else than a run")


def recent_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines at the end of a file, some hundreds of them at most, in the order written."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = file.read().splitlines()
    found = []
    for line in lines:
        with suppress(ValueError):  # the first may begin before, and the last be torn
            found.append(_row(line))
    return found


def surviving(path: Path) -> list[dict[str, Any]]:
    """The lines of the history that counts: of each step the highest attempt's, in order of steps.

    A step that a later attempt went back behind without reaching it again is not part of that history.
    """
    kept: dict[int, dict[str, Any]] = {}
    attempt = 0
    for row in rows(path):
        step = int(row["step"])
        if row["attempt"] > attempt:
            # A new attempt begins here: what earlier ones did from this step on was undone.
            attempt = row["attempt"]
            kept = {s: r for s, r in kept.items() if s < step}
        kept[step] = row
    return [kept[step] for step in sorted(kept)]


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, dict) or "attempt" not in row:
        raise ValueError("a run's lines are objects with an attempt")
    return row


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
