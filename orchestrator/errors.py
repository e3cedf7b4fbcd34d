"""Exception families: each says what was seen, which rule it breaks and what to do, and survives pickling.

A subclass takes its message (or, for ``ConfigError``, its problems) as positional arguments and keeps no other state,
so that ``args`` alone rebuilds it in another process.
"""

from __future__ import annotations

from dataclasses import dataclass


class GroundswellError(Exception):
    """Anything this project refuses or gives up on, for one ``except`` clause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with a config: where it was read, what was seen, the rule it breaks, and what to write."""

    source: str | None  # a file's path, or the ``--set`` argument; None for a config built in Python
    line: int | None = None  # counted from 1
    key: str | None = None  # dotted path
    value: str | None = None  # as YAML writes it; None when the key is absent
    rule: str
    fix: str | None = None

    def __str__(self) -> str:
        where = self.source or "config"
        if self.line is not None:
            where += f", line {self.line}"
        shown = "" if self.value is None else f" {self.value}"
        lines = [f"{where}: {self.key}:{shown}" if self.key else where, f"  {self.rule}"]
        if self.fix:
            lines.append(f"  {self.fix}")
        return "\n".join(lines)


class ConfigError(GroundswellError, ValueError):
    """A config that must not start; ``problems`` are all that were found, one paragraph each."""

    def __init__(self, *problems: Problem | str) -> None:
        super().__init__(*problems)

    @property
    def problems(self) -> tuple[Problem | str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n\n".join(str(problem) for problem in self.args)


class CheckpointError(GroundswellError):
    """A checkpoint that is missing, broken or of another run."""


class TaskError(GroundswellError):
    """A task that cannot be trained: its factory, model, data or loss breaks the ``Task`` protocol."""


class NonFiniteError(GroundswellError):
    """A loss or a gradient that is not a number, beyond what may be skipped."""


class StorageError(GroundswellError):
    """A folder or an object store that cannot be read or written, or is full."""


class RunFolderError(GroundswellError):
    """A run's folder that exists already, is incomplete, or belongs to another run."""


class SessionError(GroundswellError):
    """A loop that does not follow the session's calls, or a step that cannot be taken at all."""


class MeasureError(GroundswellError):
    """A model whose gradients the chosen estimator cannot read."""
