"""Proves from a run's ledger that the surviving history used every stream position, and every sample, once.

The ledger holds what each rank took from its loader, not what the plan told it to take.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.core.cursor import Stream
from orchestrator.errors import RunFolderError
from orchestrator.runtime import folder


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerReport:
    """``violation`` is the first that was found, or ``None``."""

    steps: int
    samples: int
    violation: str | None

    @property
    def text(self) -> str:
        if self.violation is not None:
            return f"VIOLATION: {self.violation}"
        return f"exactly once: {self.samples} positions in {self.steps} steps, none missing, none twice"


def verify(run: Path) -> LedgerReport:
    """Check the ledger of the run in folder ``run``. Raises ``RunFolderError`` when there is none to check."""
    if not (run / folder.LEDGER).exists():
        raise RunFolderError(f"{run} has no {folder.LEDGER}; run with ledger: true to keep one")
    started = next((row for row in folder.rows(run / folder.EVENTS) if row["kind"] in ("started", "resumed")), None)
    if started is None:
        raise RunFolderError(f"{run / folder.EVENTS} does not say how the run started; it is not a whole run")
    rows = folder.surviving(run / folder.LEDGER)
    size, seed = started["dataset_size"], started["seed"]
    position = 0
    for number, row in enumerate(rows):
        if row["step"] != number:
            why = f"step {number} is missing: the ledger goes on with step {row['step']}"
            return LedgerReport(steps=number, samples=position, violation=why)
        why_not, position = _step(row, position)
        if why_not is not None:
            return LedgerReport(steps=number, samples=position, violation=f"step {number}: {why_not}")
    violation = _not_kept(run, position) or _epochs(position, size=size, seed=seed)
    return LedgerReport(steps=len(rows), samples=position, violation=violation)


def _not_kept(run: Path, position: int) -> str | None:
    """Whether training went on beyond the ledger's end, or one attempt wrote a step twice."""
    # The ledger's line is written first, so that a crash between the two leaves it the longer one.
    steps = folder.surviving(run / folder.METRICS)
    if steps and steps[-1]["samples_seen"] > position:
        return f"the ledger ends at position {position}, and training went on to {steps[-1]['samples_seen']}"
    written: set[tuple[int, int]] = set()
    for row in folder.rows(run / folder.LEDGER):
        key = (row["attempt"], row["step"])
        if key in written:
            return f"step {row['step']} was written twice by attempt {row['attempt']}"
        written.add(key)
    return None


def _step(row: dict[str, Any], position: int) -> tuple[str | None, int]:
    """The first violation within one step that should begin at ``position``, and where the next should begin."""
    spans = sorted((first, size, rank) for rank, taken in enumerate(row["ranks"]) for first, size in taken)
    for first, size, rank in spans:
        if first > position:
            return f"positions {position} to {first - 1} were used by no rank", position
        if first < position:
            return f"position {first}, used before, was used again by rank {rank}", position
        position += size
    if position != row["samples_seen"]:
        return f"it says {row['samples_seen']} samples were seen, and {position} were used", position
    return None, position


def _epochs(position: int, *, size: int, seed: int) -> str | None:
    """Whether the positions of each epoch are each sample once."""
    stream = Stream(size=size, seed=seed)
    for epoch in range(-(-position // size)):
        last = min(position, (epoch + 1) * size)
        indices = stream.indices(np.arange(epoch * size, last))
        times = np.bincount(indices, minlength=size)
        if times.max() > 1:
            return f"epoch {epoch}: sample {int(times.argmax())} stands at {int(times.max())} positions"
    return None
