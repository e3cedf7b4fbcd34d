"""What happened in a run: what is there to show of it, and which two sentences sum it up?

Everything comes from the run's folder, and only the history that counts is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import load_config
from orchestrator.errors import RunFolderError
from orchestrator.report.curves import Floats
from orchestrator.runtime import folder
from orchestrator.types import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What the picture shows of a run. Arrays have one entry a step, NaN where unknown; counts are in samples."""

    task: str
    ceiling: int  # batch.max
    confidence: float  # of the noise scale's interval, a fraction
    seen: Floats  # samples seen after the step
    batch: Floats
    workers: Floats
    lr: Floats
    loss: Floats
    noise: Floats
    low: Floats
    high: Floats  # NaN beside a known ``low``: the interval has no upper end
    measured: NDArray[np.bool_]
    changes: tuple[tuple[int, int], ...]  # where a decision changed the batch: (samples seen, new batch)
    metric: str | None  # None: nothing was evaluated yet
    evaluated_at: Floats
    evaluated: Floats


def read(run: Path) -> Story:
    """The surviving history of the run in the folder ``run``.

    Raises ``RunFolderError`` for a folder that holds no run, or a run without a step; ``ConfigError`` for a config
    that was made unreadable.
    """
    if not (run / folder.CONFIG).is_file():
        raise RunFolderError(f"{run} holds no run (no {folder.CONFIG}); give the folder of a run, such as runs/digits")
    rows = folder.surviving(run / folder.METRICS)
    if not rows:
        raise RunFolderError(f"the run in {run} has not finished a step yet; there is something to draw once it has")
    config = load_config(run / folder.CONFIG)
    events = list(folder.rows(run / folder.EVENTS))
    batch = _column(rows, "global_batch")
    total = max((int(event["total_samples"]) for event in events if "total_samples" in event), default=None)
    if total is not None and len(rows) > 1 and rows[-1]["samples_seen"] >= total:
        # The last step takes what is left of the data, which nobody decided.
        batch[-1] = max(batch[-2:])
    metric, evals = _evaluations(run, rows)
    return Story(
        task=config.task.name,
        ceiling=int(config.batch.max or config.batch.initial),
        confidence=config.controller.confidence,
        seen=_column(rows, "samples_seen"),
        batch=batch,
        workers=_column(rows, "world_size"),
        lr=_column(rows, "lr"),
        loss=_column(rows, "loss"),
        noise=_column(rows, "noise_scale"),
        low=_column(rows, "noise_low"),
        high=_column(rows, "noise_high"),
        measured=np.array([row["verdict"] == Verdict.MEASURED.value for row in rows]),
        changes=_changes(events, rows),
        metric=metric,
        evaluated_at=_column(evals, "samples_seen"),
        evaluated=_column(evals, metric or ""),
    )


def title(story: Story) -> tuple[str, str]:
    """Two sentences: what was trained and how its batch and workers changed; how long, and how well it ended."""
    # An import path may be long; the factory's name alone then says enough.
    task = story.task if len(story.task) <= 32 else story.task.rpartition(":")[2]
    first, last = int(story.batch[0]), int(story.batch[-1])
    verb = "stayed at" if first == last else f"{'grew' if last > first else 'shrank'} from {first:,} to"
    fewest, most = int(story.workers.min()), int(story.workers.max())
    workers = f"{fewest} to {most} workers" if most > fewest else workers_text(most)
    known = story.evaluated[np.isfinite(story.evaluated)]
    result = f"; held-out {metric_text(story.metric)} {known[-1]:.4g}" if story.metric and len(known) else ""
    return f"{task}: the batch {verb} {last:,} on {workers}", f"{int(story.seen[-1]):,} samples seen{result}"


def workers_text(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def metric_text(name: str) -> str:
    return name.replace("_", " ")


def _column(rows: Sequence[dict[str, Any]], name: str) -> Floats:
    return np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)


def _evaluations(run: Path, rows: Sequence[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
    """The metric to show, the first that is not the loss, and the evaluations of steps that count."""
    attempts = {row["step"]: row["attempt"] for row in rows}
    # A later attempt may evaluate a step that it resumed from; an earlier one's was undone if the step was redone.
    evals = [
        row for row in folder.surviving(run / folder.EVALS)
        if row["step"] in attempts and row["attempt"] >= attempts[row["step"]]
    ]  # fmt: skip
    names = [name for row in evals[-1:] for name in row if name not in ("attempt", "step", "samples_seen")]
    return next((name for name in names if name != "loss"), names[0] if names else None), evals


def _changes(events: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> tuple[tuple[int, int], ...]:
    steps = {row["step"]: row for row in rows}
    found = []
    for event in events:
        decided, taken = steps.get(event["step"]), steps.get(event.get("effective_step"))
        if event["kind"] == "decision" and decided and taken and decided["attempt"] == event["attempt"]:
            found.append((int(taken["samples_seen"] - taken["global_batch"]), int(event["target_batch"])))
    return tuple(found)
