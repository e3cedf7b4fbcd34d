"""Where orders to a run are put, and its answers read: in its folder, or at its URL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from launch.remote_runs import open_url
from orchestrator.errors import RunFolderError
from orchestrator.runtime import folder, remote_lease
from orchestrator.runtime.control_requests import CONTROL, SUFFIX, Order, withdraw_request, write_request
from orchestrator.runtime.remote_store import RemoteFolder


@final
class FolderDesk:
    """That of the run in a folder."""

    look_every_s = 0.1

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path

    def events(self) -> Iterator[dict[str, Any]]:
        return folder.rows(self._path / folder.EVENTS)

    def is_written(self) -> bool | None:
        """Whether a process trains there; ``None`` where the storage does not say."""
        return folder.is_written(self._path)

    def put(self, order: Order, *, caps: Mapping[str, int | None], timeout_s: float) -> str:
        """The request's id."""
        return write_request(self._path, order, caps=caps, timeout_s=timeout_s)

    def withdraw(self, request: str) -> bool:
        """Whether it was there still."""
        return withdraw_request(self._path, request)


@final
class UrlDesk:
    """That of a run at a URL, from which rank zero fetches orders every other second; ``copy`` is an empty folder."""

    look_every_s = 1.0

    def __init__(self, remote: RemoteFolder, copy: Path) -> None:
        self.name, self._remote, self._copy = remote.url, remote, copy
        if not self._fetch_events():
            raise RunFolderError(f"there is no run at {remote.url}; give run.dir and run.name: s3://bucket/runs/digits")

    @classmethod
    @contextmanager
    def at(cls, url: str) -> Iterator[UrlDesk]:
        remote = open_url(url)
        with tempfile.TemporaryDirectory() as copy:
            yield cls(remote, Path(copy))

    def events(self) -> Iterator[dict[str, Any]]:
        self._fetch_events()
        return folder.rows(self._copy / folder.EVENTS)

    def is_written(self) -> bool | None:
        return remote_lease.is_written(self._remote)

    def put(self, order: Order, *, caps: Mapping[str, int | None], timeout_s: float) -> str:
        request = write_request(self._copy, order, caps=caps, timeout_s=timeout_s)
        name = f"{CONTROL}/{request}{SUFFIX}"
        self._remote.write(name, (self._copy / name).read_bytes())
        return request

    def withdraw(self, request: str) -> bool:
        name = f"{CONTROL}/{request}{SUFFIX}"
        if name not in self._remote.sizes(CONTROL):
            return False
        self._remote.remove(name)
        return True

    def _fetch_events(self) -> bool:
        return self._remote.fetch(folder.EVENTS, self._copy / folder.EVENTS)
