"""A run as lines of JSON on standard output, for programs that follow it where its folder is out of their reach.

Each line is an object that begins with ``groundswell``: ``event``, ``metrics`` and ``eval`` are rows as the run's files
hold them, ``told`` has a ``line`` of text. ``at_s`` is the time since the command began, in seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from launch.live import say
from launch.progress import Progress
from launch.sources import News, Row, Source

_BEGINNING = '{"groundswell": "'
_REFRESH_S = 0.25
_METRICS_EVERY_S, _METRICS_AT_MOST_EVERY_S = 1.0, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One line, read back."""

    at_s: float
    news: News


def read_line(line: str) -> Said | None:
    """The row that a line holds; ``None`` for whatever else a process prints."""
    if not line.startswith(_BEGINNING):
        return None
    try:
        row = json.loads(line)
        kind, at_s = row.pop("groundswell"), float(row.pop("at_s"))
    except (ValueError, TypeError, KeyError, AttributeError):  # torn by another process that wrote between
        return None
    if kind == "told":
        return Said(at_s=at_s, news=News(lines=str(row.get("line", "")).split("\n")))
    rows: dict[str, list[Row]] = {"event": [], "metrics": [], "eval": []}
    if kind not in rows:
        return None
    rows[kind].append(row)
    return Said(at_s=at_s, news=News(events=rows["event"], metrics=rows["metrics"], evals=rows["eval"]))


@final
class JsonRows:
    """A source whose rows are also printed; of metrics the newest, once a second and in long runs once in ten."""

    def __init__(self, source: Source, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._source, self._clock = source, clock
        self._began_s = clock()
        self._newest: Row | None = None  # of the metrics, until it is printed
        self._last_s = float("-inf")

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def behind(self) -> bool:
        return self._source.behind

    def read(self) -> News:
        news = self._source.read()
        for row in news.events:
            self._print("event", row)
        if news.metrics:
            self._newest = news.metrics[-1]
        every_s = min(_METRICS_AT_MOST_EVERY_S, max(_METRICS_EVERY_S, self._at_s / 600))
        if self._at_s - self._last_s >= every_s:
            self.print_newest()
        for row in news.evals:
            self._print("eval", row)
        return news

    def tell(self, line: str) -> None:
        self._print("told", {"line": line})

    def print_newest(self) -> None:
        """Print the newest metrics now, if they were not printed yet."""
        if self._newest is not None:
            self._last_s = self._at_s
            self._print("metrics", self._newest)
            self._newest = None

    @property
    def _at_s(self) -> float:
        return self._clock() - self._began_s

    def _print(self, kind: str, row: dict[str, Any]) -> None:
        say(json.dumps({"groundswell": kind, "at_s": round(self._at_s, 3), **row}))


def show_json(progress: Progress, rows: JsonRows, *, going: Callable[[], bool], tick: Callable[[], None]) -> None:
    """Print the rows of a run until ``going`` says no; ``tick`` is called between two looks, and may end it."""
    while True:
        on = going()
        progress.update()
        if not on:
            rows.print_newest()
        tick()
        if not on:
            return
        time.sleep(_REFRESH_S)
