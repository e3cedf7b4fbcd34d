"""How far a run is, as plain values that its parts hand to each other and to other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.core.ramp import InForce
from orchestrator.types import ApplyPlan, BatchPlan, GradMeasured


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Before which step, at how many samples seen."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where training begins or goes on."""

    step: int
    samples_seen: int
    now: ApplyPlan
    pending: ApplyPlan | None
    in_force: InForce | None  # with the last step of the checkpoint
    stop: str | None = None  # why no step is taken
    last_batch: int = 0  # of the step just taken, where the group changed between that step and the next
