"""Where do the lines of an attempt go? Into the run's folder, to those that follow the run, and to its URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

from orchestrator.config import RunConfig
from orchestrator.ports import Tracker
from orchestrator.runtime import tracking
from orchestrator.runtime.at_url import mirror_of
from orchestrator.runtime.folder import RunWriter
from orchestrator.runtime.mirror import Mirror
from orchestrator.runtime.scalars import ScalarBoard
from orchestrator.runtime.trackers import Note, Trackers, dropped


@final
class Outlets:
    """Rank zero's, from the beginning of an attempt to its end: it holds the folder's lock.

    What the outlets have to say about themselves are notes, which become lines as well.
    """

    def __init__(
        self, config: RunConfig, folder: Path, *, trackers: tuple[Tracker, ...], now: Callable[[], float]
    ) -> None:
        """``trackers`` follow the run besides those of the config."""
        self.folder = folder
        self._config = config
        self._now = now
        self._writer = RunWriter(folder, now=now)
        self._trackers = Trackers(trackers)
        self._mirror: Mirror | None = None  # where the run is kept at a URL
        try:
            self._mirror = mirror_of(config, folder, say=self._trackers.say)
        except BaseException:
            self._writer.close()
            raise

    def follow(self) -> None:
        """Let TensorBoard and the services of the config follow the run from here on."""
        try:
            self._trackers.add(ScalarBoard(self.folder / "tensorboard", now=self._now))
        except OSError as error:
            self._trackers.say(dropped(ScalarBoard.name, error))
        tracking.follow(self._trackers, self._config, self.folder, now=self._now)

    def append(self, name: str, *rows: Mapping[str, Any]) -> None:
        """A line for each row, to the run's file ``name``. Raises ``StorageError`` as ``RunWriter`` does."""
        self._writer.append(name, *rows)
        self._trackers.take(name, rows)

    def notes(self) -> Iterator[Note]:
        """What was said since the last call; written down one by one, for that may be cause for more."""
        yield from self.trackers_notes()
        for reason in self._writer.notes():
            yield {"kind": "warning", "reason": reason}

    def trackers_notes(self) -> Iterator[Note]:
        """Those of the trackers, and of the way to the URL."""
        yield from self._trackers.notes()

    def trouble(self, patience_s: float) -> str | None:
        """Why no more lines should be kept: they have waited for too long, or are too many."""
        writer = self._writer
        if not (writer.outage.lasted_s > patience_s or writer.is_full):
            return None
        return f"{writer.outage.why}, for {writer.outage.lasted_s:.0f} s, and {writer.waiting} lines wait"

    def sent(self) -> str | None:
        """Wait until all of the run is at its URL, where it has one; why it is not, or ``None``."""
        return None if self._mirror is None else self._mirror.wait()

    def end_following(self) -> None:
        """The trackers get nothing more; what they say at their end is among the notes."""
        self._trackers.close()

    def close(self) -> None:
        """Raises ``StorageError`` where lines could not be written to the end."""
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None
        self._writer.close()
