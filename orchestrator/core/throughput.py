"""What a plan costs in time, from the step times measured so far.

A step is taken to last its longest run of micro-batches; what synchronising adds is inside the measured time of a
micro-batch. The readings are the only place where a clock enters the core, and they influence nothing but how many
workers are asked for.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

_WINDOW = 32
_ENOUGH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """The newest times per micro-batch [s], oldest first; the median is used, so that a pause does not count."""

    per_micro_batch_s: tuple[float, ...] = ()


def absorb(times: StepTimes, step_time_s: float, *, accum_steps: int) -> StepTimes:
    return replace(times, per_micro_batch_s=(*times.per_micro_batch_s, step_time_s / accum_steps)[-_WINDOW:])


def micro_batch_time_s(times: StepTimes) -> float | None:
    """Median time of one micro-batch [s], or ``None`` before enough steps were timed."""
    if len(times.per_micro_batch_s) < _ENOUGH:
        return None
    return statistics.median(times.per_micro_batch_s)


def predicted_saving_s(
    times: StepTimes, *, remaining_samples: int, batch: int, accum_now: int, accum_then: int
) -> float | None:
    """Time [s] that fewer accumulation steps would save over the samples that are left; ``None`` if unknown."""
    each = micro_batch_time_s(times)
    if each is None:
        return None
    return max(0, remaining_samples) / batch * (accum_now - accum_then) * each
