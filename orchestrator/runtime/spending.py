"""What have the attempts of a run used so far, in worker-hours? Read from its folder.

One rule: each worker of an attempt costs from the start of its process until the attempt's last sign of life, and a
moment more, in which the process ends. How long that was the events of the attempt say (``paid_s``, see ``paid_time``),
and where it died without a word, its steps: never less than what it trained. An attempt that died before its first
event left no sign of life, and is not counted.
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
    """Seconds for each worker: until training began, and until the last sign of life."""

    began_s: float
    lasted_s: float
    workers: int


def attempts(run: Path) -> list[Attempt]:
    """Those that came to train, in order."""
    found: dict[int, Attempt] = {}
    for row in folder.rows(run / folder.EVENTS):
        number, paid_s = row["attempt"], row.get("paid_s", 0.0)
        if row["kind"] in ("started", "resumed"):
            found[number] = Attempt(began_s=paid_s, lasted_s=paid_s, workers=row["world_size"])
        elif number in found:
            found[number] = replace(found[number], lasted_s=max(found[number].lasted_s, paid_s))
    trained_s: dict[int, float] = {}
    for row in folder.rows(run / folder.METRICS):
        if (attempt := found.get(row["attempt"])) is None:
            continue
        # As for ``paid_s``: as if all of it had been for the workers that the attempt began with.
        share = row.get("world_size", attempt.workers) / attempt.workers
        trained_s[row["attempt"]] = trained_s.get(row["attempt"], 0.0) + share * (row["step_time_s"] or 0.0)
    return [
        replace(attempt, lasted_s=max(attempt.lasted_s, attempt.began_s + trained_s.get(number, 0.0)))
        for number, attempt in found.items()
    ]


def worker_hours_of(ended: Sequence[Attempt]) -> float:
    return sum((attempt.lasted_s + ENDING_S) * attempt.workers for attempt in ended) / S_PER_HOUR


def longest_save_s(run: Path) -> float | None:
    """The longest that a checkpoint of the run took; ``None`` before the first."""
    took = [row["duration_s"] for row in folder.rows(run / folder.EVENTS) if row["kind"] == "checkpoint"]
    return max(took, default=None)


def longest_pause_s(run: Path) -> float:
    """The longest that training paused for an evaluation, as far as the events ``budget`` say; 0 before the first."""
    rows = (row for row in folder.rows(run / folder.EVENTS) if row["kind"] == "budget")
    return max((row.get("longest_pause_s", 0.0) for row in rows), default=0.0)


def save_s(longest_s: float | None) -> float:
    """What to keep for a checkpoint: half as long again as the longest."""
    return SAVING_S if longest_s is None else 1.5 * longest_s


def end_s(longest_save: float | None) -> float:
    """What to keep for an attempt's end: a checkpoint, and the processes' end."""
    return save_s(longest_save) + ENDING_S


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
    least_s = last.began_s + end_s(longest_save_s(run))
    spent = Spent(worker_hours=worker_hours_of(before), reserve_worker_hours=least_s * last.workers / S_PER_HOUR)
    stop = budget.used_up(limit, spent)
    return None if stop is None else stop.reason
