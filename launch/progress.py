"""What has come of a run, read while it trains: the newest numbers, and what is worth telling.

What is kept in ``events.jsonl`` is more than anybody reads while it happens: a decision to keep the batch, a plan or a
checkpoint is not told; a growth, a resize, a fault, a warning and an evaluation are.
"""

from __future__ import annotations

import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, final

from launch.sources import Source

_RATE_OVER_S = 30.0  # speed and time left look back this far, so that they follow a resize
_FAULT_WIDTH = 120
_NOT_METRICS = ("attempt", "step", "samples_seen")


@final
class Progress:
    """What has come of a run since this was made: the newest numbers, and what is worth telling."""

    def __init__(self, source: Source, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._source, self._clock = source, clock
        self.name = source.name
        self.began_s = clock()
        self.start: dict[str, Any] | None = None  # the newest event that training began with
        self.now: dict[str, Any] | None = None  # the newest line of metrics
        self.evaluation: dict[str, Any] | None = None
        self.ended: dict[str, Any] | None = None  # the event that training ended with
        self.checkpoint: dict[str, Any] | None = None  # the event of the newest one
        self.told: list[str] = []
        self.heard: list[str] = []  # lines of the newest update that are not of this project, such as a task's prints
        self._untold: list[str] = []
        self._batch: int | None = None
        self._wish: int | None = None
        self._reached: deque[tuple[float, int]] = deque()

    def tell(self, line: str) -> None:
        """Add a line that no row holds."""
        self.told.append(line)
        self._untold.append(line)

    def update(self) -> list[str]:
        """Read on; returns the lines that are new."""
        news = self._source.read()
        for event in news.events:
            line = self._take(event)
            if line is not None:
                self.tell(line)
        if news.metrics:
            self.now = news.metrics[-1]
            now_s = self._clock()
            self._reached.append((now_s, int(self.now["samples_seen"])))
            while len(self._reached) > 2 and self._reached[1][0] < now_s - _RATE_OVER_S:
                self._reached.popleft()
        for row in news.evals:
            self.evaluation = row
            self.tell(f"held out at {row['samples_seen']:,} samples: {metrics_text(row)}")
        self.heard = list(news.lines)
        untold, self._untold = self._untold, []
        return [*self.heard, *untold]

    @property
    def behind(self) -> bool:
        """Whether there is more to read at once."""
        return self._source.behind

    @property
    def saved_samples(self) -> int | None:
        """The samples seen of an end without loss: one that the run said, or a checkpoint of its last step."""
        if self.ended is not None:
            return int(self.ended["samples_seen"])
        if self.checkpoint is None or self.now is None:
            return None
        saved = int(self.checkpoint["samples_seen"])
        return saved if saved >= int(self.now["samples_seen"]) else None

    @property
    def total_samples(self) -> int | None:
        return None if self.start is None else int(self.start["total_samples"])

    @property
    def samples_per_s(self) -> float | None:
        """Over the last half minute, with all that training waits for."""
        if len(self._reached) < 2:
            return None
        (first_s, first), (last_s, last) = self._reached[0], self._reached[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    @property
    def time_left_s(self) -> float | None:
        if self.now is None or self.total_samples is None:
            return None
        left = self.total_samples - int(self.now["samples_seen"])
        if left <= 0:
            return 0.0
        return left / self.samples_per_s if self.samples_per_s else None

    @property
    def quiet_s(self) -> float:
        """How long no step has been heard of."""
        return self._clock() - (self._reached[-1][0] if self._reached else self.began_s)

    @property
    def running_s(self) -> float:
        return self._clock() - self.began_s

    def _take(self, event: dict[str, Any]) -> str | None:
        kind, reason = event["kind"], event["reason"]
        at = "" if event["samples_seen"] is None else f" at {event['samples_seen']:,} samples"
        if kind in ("started", "resumed"):
            self.start, self._batch = event, event["global_batch"]
            self._reached.clear()
            workers, total = counted(event["world_size"], "worker"), event["total_samples"]
            epochs = f"{total:,} samples, {total / event['dataset_size']:,.4g} epochs of {event['dataset_size']:,}"
            where = f"batch {self._batch} on {workers} ({event['device']})"
            return f"started: {epochs}; {where}" if kind == "started" else f"resumed{at} of {total:,}; {where}"
        if kind == "decision":
            return self._take_decision(event, at)
        if kind in ("finished", "stopped"):
            self.ended = event
            return None
        if kind == "checkpoint":
            self.checkpoint = event
            return None
        if kind == "plan":
            self._batch = event["global_batch"]  # also one that was decided before a resize, and takes effect after
            return None
        if kind in ("outcome", "advice"):  # the advice is the end's to tell
            return None
        if kind == "resize":
            return f"workers {event['from_workers']} -> {event['to_workers']}{at}: {reason}"
        if kind == "workers_wanted":
            # Only Ray brings them; elsewhere the wish is noted, and that is all.
            return f"{counted(event['num_workers'], 'worker')} wanted: {reason}" if self._runtime == "ray" else None
        if kind == "control":
            return self._take_control(event, at)
        if kind == "fault":
            reason = textwrap.shorten(reason, _FAULT_WIDTH, placeholder=" ...")  # the end of the run says it in full
        return f"{kind.replace('_', ' ')}{at}: {reason}"

    def _take_decision(self, event: dict[str, Any], at: str) -> str | None:
        before, target, wish = self._batch, event["target_batch"], event.get("wished_batch")
        if "effective_step" in event:  # else the batch is kept, though one decided before may be on its way
            self._batch = target
            return f"batch {before} -> {target}{at}: {event['reason']}"
        news = wish is not None and wish != self._wish
        self._wish = wish
        return f"batch {before} stays, {wish} is advised{at}: {event['reason']}" if news else None

    def _take_control(self, event: dict[str, Any], at: str) -> str | None:
        if event["request"] is None and not (event["held"] or event["max_batch"] or event["max_workers"]):
            return None  # an attempt begins, and no orders stand
        asked = "" if event["order"] is None else f" {event['order']}"
        return f"control{asked}{'' if event['accepted'] else ' refused'}{at}: {event['reason']}"

    @property
    def _runtime(self) -> str | None:
        return None if self.start is None else str(self.start["runtime"])


def metrics_text(row: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in row.items() if name not in _NOT_METRICS}
    return ", ".join(f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in shown.items())


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
