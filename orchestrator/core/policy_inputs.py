"""What may a policy look at, and how does it say that it keeps the batch?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.core.throughput import StepModel
from orchestrator.types import Decision, NoiseStats

LARGEST = 1 << 62  # [samples] beyond any batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """What a policy may look at. ``credit`` is the noise scale that growth may be founded on (see ``guard``)."""

    stats: NoiseStats
    batch: int  # the present target
    samples_seen: int
    last_change_samples: int | None = None
    credit: float | None = None
    kappa: float | None = None  # critical batch / noise scale, as branches last found it
    lr_fraction: float = 1.0  # the LR schedule's factor for the next step
    peak_lr_fraction: float = 1.0  # its highest at a step so far
    workers: int = 1  # that there are now
    micro_batch: int = 1  # samples; the most that a worker computes at once now
    steps: StepModel | None = None  # for time-dependent policies alone: what a step costs, once that can be told
    took_no_longer: bool = False  # for the same policies: longer steps were timed, and took no longer than shorter ones


Policy = Callable[[PolicyInputs], Decision]


def whole(samples: float) -> int:
    """The nearest count of samples; what is beyond any batch, infinity included, is as good as the largest."""
    return round(min(samples, float(LARGEST)))


def keep(inputs: PolicyInputs, why: str) -> Decision:
    return Decision(target_batch=inputs.batch, reason=f"keep {inputs.batch}: {why}")
