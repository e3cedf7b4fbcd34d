"""What have the attempts of a run used so far, in worker-hours? Read from its folder.

A worker costs from its start to its end. An attempt is counted from the time that its first event says its workers
were there to its last event or step, and a moment more, in which its processes end; one that died counts up to its last
sign of life.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.config import RunConfig
from orchestrator.core import budget
from orchestrator.runtime import folder
from orchestrator.types import Spent

S_PER_HOUR = 3600.0
ENDING_S = 5.0  # from the last event until a worker's process is gone; torch and Ray take their time
SAVING_S = 10.0  # for a checkpoint, before one of this run was timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Times in seconds since the epoch."""

    since: float
    until: float
    started: float  # its first event of training
    workers: int


def attempts(run: Path) -> list[Attempt]:
    """Those that came to train, in order."""
    found: dict[int, Attempt] = {}
    for row in folder.rows(run / folder.EVENTS):
        number = row["attempt"]
        if row["kind"] in ("started", "resumed"):
            since, now = row.get("workers_since", row["time"]), row["time"]
            found[number] = Attempt(since=since, until=now, started=now, workers=row["world_size"])
        elif number in found:
            found[number] = replace(found[number], until=max(found[number].until, row["time"]))
    trained_s: dict[int, float] = {}
    for row in folder.rows(run / folder.METRICS):
        trained_s[row["attempt"]] = trained_s.get(row["attempt"], 0.0) + (row["step_time_s"] or 0.0)
    return [
        replace(attempt, until=max(attempt.until, attempt.started + trained_s.get(number, 0.0)))
        for number, attempt in found.items()
    ]


def worker_hours_of(ended: Sequence[Attempt]) -> float:
    return sum((a.until + ENDING_S - a.since) * a.workers for a in ended) / S_PER_HOUR


def longest_save_s(run: Path) -> float | None:
    """The longest that a checkpoint of the run took; ``None`` before the first."""
    took = [row["duration_s"] for row in folder.rows(run / folder.EVENTS) if row["kind"] == "checkpoint"]
    return max(took, default=None)


def end_s(save_s: float | None) -> float:
    """What to keep for an attempt's end: a checkpoint, half as long again as the longest, and the processes' end."""
    return (SAVING_S if save_s is None else 1.5 * save_s) + ENDING_S


def exhausted(config: RunConfig, run: Path) -> str | None:
    """Why there is not to be another attempt: this budget has ended the run, or does not pay a single step.

    What the end of the run kept back and did not need is not enough for an attempt worth its start.
    """
    limit, before = config.budget.limit_worker_hours, attempts(run)
    if limit is None or not before:
        return None
    kinds = ("started", "resumed", "finished", "stopped")
    end = [row for row in folder.rows(run / folder.EVENTS) if row["kind"] in kinds][-1]
    if (end.get("budget_worker_hours") or 0.0) >= limit:
        return str(end["reason"])
    last = before[-1]
    least_s = last.started - last.since + end_s(longest_save_s(run))
    spent = Spent(worker_hours=worker_hours_of(before), reserve_worker_hours=least_s * last.workers / S_PER_HOUR)
    stop = budget.used_up(limit, spent)
    return None if stop is None else stop.reason
