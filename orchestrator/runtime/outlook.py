"""What a change of plan was expected to do to the step time, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from orchestrator.core import throughput
from orchestrator.core.throughput import StepTimes
from orchestrator.types import BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Step times [s] of one plan."""

    generation: int
    predicted_step_time_s: float
    realised_step_time_s: float


@final
class Outlook:
    """Watches step times; rank zero keeps one. The prediction is the one the planner goes by."""

    def __init__(self) -> None:
        self._times = StepTimes()
        self._expected: tuple[BatchPlan, float] | None = None

    def expect(self, plan: BatchPlan) -> float | None:
        """The step time [s] predicted for ``plan``, which is about to begin; ``None`` before enough steps were seen."""
        each = throughput.micro_batch_time_s(self._times)
        self._times = StepTimes()
        self._expected = None if each is None else (plan, each * plan.accum_steps)
        return None if self._expected is None else self._expected[1]

    def saw(self, step_time_s: float, plan: BatchPlan) -> Outcome | None:
        """Take in a step; once enough of the expected plan's were seen, what came of the prediction."""
        self._times = throughput.absorb(self._times, step_time_s, accum_steps=plan.accum_steps)
        each = throughput.micro_batch_time_s(self._times)
        if self._expected is None or each is None:
            return None
        (expected, predicted), self._expected = self._expected, None
        return Outcome(
            generation=expected.generation,
            predicted_step_time_s=predicted,
            realised_step_time_s=each * expected.accum_steps,
        )
