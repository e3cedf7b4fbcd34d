"""Where the rows of a run come from: the files of its folder, read on while they grow, or whatever else has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

from orchestrator.runtime import folder

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What was read on: rows as the run's files hold them, and lines of text that are none."""

    events: Sequence[Row] = ()
    metrics: Sequence[Row] = ()
    evals: Sequence[Row] = ()
    lines: Sequence[str] = ()


class Source(Protocol):
    """Rows of one run, each given once, in the order they were written."""

    @property
    def name(self) -> str:
        """The run's."""

    @property
    def behind(self) -> bool:
        """Whether there is more to read at once, so that nobody need wait before reading on."""

    def read(self) -> News:
        """What is new; does not wait for it."""


@final
class FolderRows:
    """The rows that are added to a run's folder from now on."""

    behind = False

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._events, self._metrics, self._evals = (
            Tail(path / name) for name in (folder.EVENTS, folder.METRICS, folder.EVALS)
        )

    def read(self) -> News:
        return News(events=self._events.read(), metrics=self._metrics.read(), evals=self._evals.read())


@final
class Tail:
    """The lines that are added to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0

    def read(self) -> list[Row]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        found, size = rows_in(data)
        self._offset += size
        return found


def rows_in(data: bytes) -> tuple[list[Row], int]:
    """The whole lines in ``data``, and how many bytes they take."""
    whole = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:whole].splitlines() if line.strip()], whole
