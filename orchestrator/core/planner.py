"""From a wished batch, the workers there are, and the limits, to a plan; and how many workers a batch is worth.

A plan's micro-batch list depends on the batch and the micro-batch alone, never on the number of workers: that is
what lets the same list run on any layout with the same gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.types import BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """How many workers may be used, and how many micro-batches make one more worth asking for."""

    minimum: int
    maximum: int
    micro_batches_each: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(f"workers.min must lie in [1, workers.max={self.maximum}], got {self.minimum}")
        if self.micro_batches_each < 1:
            raise ValueError(f"workers.micro_batches_each must be at least 1, got {self.micro_batches_each}")


def make_plan(batch: int, *, world_size: int, micro_batch: int, generation: int, measurable: bool) -> BatchPlan:
    """The plan for ``batch`` samples in micro-batches of at most ``micro_batch`` (the memory limit of a device).

    ``measurable`` asks for at least two micro-batches across the fleet, without which the noise cannot be read: a
    batch that fits into one is cut in half. It is off when the controller only advises or the batch is fixed, since
    then the user's micro-batch must stay as it is, unless the user asked for halves; and where samples are compared.
    """
    size = min(micro_batch, batch)
    if measurable and batch >= 2:
        size = min(size, -(-batch // 2))
    return BatchPlan(generation=generation, world_size=world_size, batch=batch, micro_batch=size)


def useful_workers(batch: int, *, micro_batch: int, limits: WorkerLimits) -> int:
    """The most workers that still get ``limits.micro_batches_each`` full micro-batches each, within the limits."""
    return max(limits.minimum, min(limits.maximum, batch // micro_batch // limits.micro_batches_each))
