"""Which launch does a run's folder belong to? By this note a launch goes on with its own run, and no other one does.

Under an elastic torchrun every group of workers begins anew when a node comes or goes, wherever its rank zero is, and
nothing that torch says tells the first group from a later one: its restart count stays as it is when a node joins, and
is counted on each node apart. So rank zero leaves the launch's name in the run's folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from orchestrator.runtime import folder

_NOTE = "launched.by"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One group of workers: the ``launch`` that it is of, and its ``number`` among all that trained in the folder."""

    launch: str
    number: int

    def is_current(self, path: Path) -> bool:
        """Whether no other group took over since; where shared storage shows an older note, none is known of."""
        now = _read(path)
        return now is None or now.number <= self.number


def write_note(path: Path, *, launch: str) -> Group:
    """Rank zero, before a run exists in ``path``: its group is the one that trains there now."""
    before = _read(path)
    group = Group(launch=launch, number=1 if before is None else before.number + 1)
    part = path / f"{_NOTE}.part"
    part.write_text(f"{group.launch}\n{group.number}\n", encoding="utf-8")
    os.replace(part, path / _NOTE)  # whoever reads it meanwhile sees a whole one
    return group


def belongs_to(path: Path, launch: str) -> bool:
    """Whether the run in ``path`` was begun, or last gone on with, by this launch."""
    group = _read(path)
    return group is not None and group.launch == launch


def goes_on(path: Path, *, launch: str, resume: bool, auto_resume: bool) -> bool:
    """Whether to go on with the run in ``path`` rather than begin it.

    Raises ``RunFolderError`` for a run that exists but is neither of this launch nor asked for, and for one that was
    asked for and is not there.
    """
    # In this order: the note is written before a run exists, so a launch that sees the run sees its own note too.
    if folder.exists(path):
        resume = resume or auto_resume or belongs_to(path, launch)
    folder.check(path, resume=resume)
    return resume


def _read(path: Path) -> Group | None:
    try:
        launch, number = (path / _NOTE).read_text(encoding="utf-8").splitlines()
        return Group(launch=launch, number=int(number))
    except (OSError, ValueError):
        return None
