"""Runs that are kept at a URL, as commands see them: rows are read from there, orders and stops are put there."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from launch.sources import FolderRows, News, Row, Source, rows_in
from orchestrator.config import RunConfig
from orchestrator.config.places import is_url, place_of_runs
from orchestrator.errors import RunFolderError, StorageError
from orchestrator.runtime import folder
from orchestrator.runtime.control_requests import CONTROL
from orchestrator.runtime.preparation import run_folder, run_url
from orchestrator.runtime.remote_store import RemoteFolder

_LOOK_EVERY_S = 2.0
_FILES = (folder.CONFIG, folder.EVENTS, folder.METRICS, folder.EVALS, folder.GROUPS, folder.LEDGER)


def open_url(url: str) -> RemoteFolder:
    """The run at ``url``. Raises ``ConfigError`` without the library for it, and ``StorageError`` for what is none."""
    try:
        return RemoteFolder(place_of_runs(url))
    except ValueError as error:
        raise StorageError(f"{url} is no URL that a run can be kept at ({error})") from error


@contextmanager
def at_hand(run: str, *, checkpoint: bool = False) -> Iterator[Path]:
    """The folder of a run that was named by its folder or its URL; of the latter a copy.

    The copy holds the rows, or, with ``checkpoint``, the newest whole checkpoint; the URL may be a checkpoint's own.
    """
    if not is_url(run):
        yield Path(run)
        return
    remote = open_url(run)
    with tempfile.TemporaryDirectory() as copy:
        path = Path(copy) / remote.url.rpartition("/")[2]
        path.mkdir()
        if checkpoint:
            _fetch_checkpoint(remote, path)
        elif sum(remote.fetch(name, path / name) for name in _FILES) == 0:
            raise RunFolderError(f"there is no run at {run}; give run.dir and run.name: s3://bucket/runs/digits")
        yield path


def _fetch_checkpoint(remote: RemoteFolder, path: Path) -> None:
    from orchestrator.runtime.remote_checkpoints import CHECKPOINTS, fetch_newest

    if remote.read("manifest.json") is None:
        fetch_newest(remote, path / CHECKPOINTS)
        return
    for name in remote.sizes():
        remote.fetch(name, path / name)


def rows_of(settings: RunConfig, *, runtime: str) -> Source:
    """The rows of a run from now on: of its folder, or of its URL where another node may write it."""
    url = run_url(settings)
    return FolderRows(run_folder(settings)) if url is None or runtime != "ray" else UrlRows(RemoteFolder(url))


@final
class UrlRows:
    """The rows that are added to a run at a URL from now on; it is asked every other second."""

    behind = False

    def __init__(self, remote: RemoteFolder) -> None:
        self.name = remote.url.rpartition("/")[2]
        self._remote = remote
        self._at = {name: self._size(name) for name in (folder.EVENTS, folder.METRICS, folder.EVALS)}
        self._next_s = 0.0

    def read(self) -> News:
        if time.monotonic() < self._next_s:
            return News()
        self._next_s = time.monotonic() + _LOOK_EVERY_S
        try:
            events, metrics, evals = (self._rows(name) for name in self._at)
        except StorageError:  # the run says so too
            return News()
        return News(events=events, metrics=metrics, evals=evals)

    def look_now(self) -> None:
        """The next ``read`` asks, whenever the last one was."""
        self._next_s = 0.0

    def _size(self, name: str) -> int:
        return len(self._remote.read(name) or b"")

    def _rows(self, name: str) -> list[Row]:
        found, size = rows_in(self._remote.read(name, first=self._at[name]) or b"")
        self._at[name] += size
        return found


@final
class StopAsker:
    """Asks a run to stop where its rank zero looks, again and again: a recovery on the way begins without it."""

    def __init__(self, settings: RunConfig, *, runtime: str) -> None:
        self._local = run_folder(settings) / folder.STOP_REQUEST
        url = run_url(settings) if runtime == "ray" else None
        self._remote = None if url is None else RemoteFolder(url)
        self._next_s = 0.0

    def ask(self) -> None:
        self._local.touch()
        if self._remote is not None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LOOK_EVERY_S
            with suppress(StorageError):
                self._remote.write(f"{CONTROL}/{folder.STOP_REQUEST}", b"")

    def take_back(self) -> None:
        with suppress(NotADirectoryError):  # the run's folder could not be made; the job's error says so
            self._local.unlink(missing_ok=True)
