"""How far a run is, as plain values that its parts hand to each other and to other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.types import BatchPlan, GradMeasured


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Before which step, at how many samples: the first step that the controller has not heard of."""

    step: int
    samples_seen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStep:
    """A step as all ranks together made it; ``spans`` is what this rank took of it: (first position, size).

    ``lr`` is what the optimizer stepped with; the controller is told that of schedule and rule, which differs where the
    momentum follows the batch, and is what noise goes with.
    """

    measured: GradMeasured
    lr: float
    plan: BatchPlan
    spans: Sequence[tuple[int, int]]
    decides: bool
