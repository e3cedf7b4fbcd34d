"""The frozen values that cross a border between rooms: what was measured, decided, planned and done.

Nothing here computes a policy. Every type is a value: it is compared, saved, sent and replayed as one.
Counts are in samples unless the name says otherwise; an unknown number is ``None``, never zero or NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NoReturn


def assert_never(value: NoReturn) -> NoReturn:
    """Make a forgotten case a type error (``typing.assert_never`` needs Python 3.11)."""
    raise AssertionError(f"unhandled case: {value!r}")


class Verdict(str, Enum):
    """What a noise estimate is worth."""

    MEASURED = "measured"
    TOO_NOISY = "too noisy"
    TOO_FEW_MICRO_BATCHES = "too few micro-batches"


@dataclass(frozen=True, slots=True, kw_only=True)
class GradSample:
    """One optimizer step's reading of the gradient moments, before any averaging.

    ``grad_sq`` estimates |G|^2 and ``trace_cov`` estimates tr(Sigma), both without bias, so either may be
    noise and ``grad_sq`` may be negative. Both are ``None`` when the step was not measured, had fewer than
    two parts to compare, or was not finite.
    """

    step: int
    samples_seen: int  # after this step
    batch: int  # samples in this step
    micro_batches: int  # independent parts compared, across all ranks: micro-batches, or single samples
    loss: float  # mean over the samples of the step
    lr: float
    grad_sq: float | None = None
    trace_cov: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseStats:
    """The averaged noise scale B_simple = tr(Sigma) / |G|^2 in samples, with its interval and verdict.

    ``high`` is ``None`` when the interval has no upper end; ``low`` may still be known then. ``noise_scale``
    is the ratio of the two averages, and ``None`` when the averaged |G|^2 is not positive or nothing has
    been measured.
    """

    verdict: Verdict
    noise_scale: float | None = None
    low: float | None = None
    high: float | None = None
    grad_sq: float | None = None
    trace_cov: float | None = None

    @property
    def bounded(self) -> bool:
        """Whether a policy may act on the number: it is measured, and its interval has two ends."""
        return self.verdict is Verdict.MEASURED and self.high is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A target batch and the sentence that explains it."""

    target_batch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How one global batch is cut into micro-batches and shared out among the ranks.

    The micro-batch list follows from ``(batch, micro_batch)`` alone: full micro-batches, then at most one
    smaller. Rank r takes a contiguous run of it; runs differ by at most one, the longer ones first, so a
    rank may take none.
    """

    generation: int
    world_size: int
    batch: int
    micro_batch: int

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.batch < 1 or not 1 <= self.micro_batch <= self.batch:
            raise ValueError(
                f"a plan needs world_size >= 1 and 1 <= micro_batch <= batch, got world_size={self.world_size}, "
                f"micro_batch={self.micro_batch}, batch={self.batch}"
            )

    @property
    def num_micro_batches(self) -> int:
        return -(-self.batch // self.micro_batch)

    @property
    def accum_steps(self) -> int:
        """The longest run: how many micro-batches the busiest rank sums before the optimizer steps."""
        return -(-self.num_micro_batches // self.world_size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The micro-batch list."""
        full, rest = divmod(self.batch, self.micro_batch)
        return (self.micro_batch,) * full + ((rest,) if rest else ())

    def run(self, rank: int) -> range:
        """Indices into the micro-batch list that ``rank`` takes."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the plan's world of {self.world_size}")
        each, extra = divmod(self.num_micro_batches, self.world_size)
        first = rank * each + min(rank, extra)
        return range(first, first + each + (rank < extra))

    def spans(self, rank: int) -> tuple[tuple[int, int], ...]:
        """``(offset from the step's first position, size)`` of each micro-batch ``rank`` takes, in order."""
        return tuple(
            (i * self.micro_batch, min(self.micro_batch, self.batch - i * self.micro_batch)) for i in self.run(rank)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What training is set to: the batch, and the noise scale the learning-rate rule was given with it.

    ``fresh`` says whether that noise scale was measured at this decision; else it is that of an earlier one, however
    old, which does for a rate that goes on and not for what is restated once, at the jump.
    """

    batch: int
    noise_scale: float | None = None
    fresh: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GradMeasured:
    """A step was done. ``step_time_s`` is the only reading of a clock that reaches the core."""

    sample: GradSample
    step_time_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersChanged:
    """Training runs at ``world_size`` now; ``resize_cost_s`` is the measured pause, if there was one."""

    world_size: int
    resize_cost_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRejected:
    """A micro-batch did not fit in memory; at most ``max_micro_batch`` samples may be tried from now on."""

    max_micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """A worker will be taken away soon."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Branched:
    """Branches were trained from the state before ``step``, at multiples of ``batch``, and given up again.

    ``losses`` holds (multiple, mean loss over the branch's second half); ``None`` for one that diverged.
    """

    step: int
    batch: int
    losses: tuple[tuple[int, float | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the one who operates the run has ordered, standing until it is taken back.

    ``held``: neither the target batch nor the workers asked for change. ``max_batch`` [samples] and ``max_workers`` are
    ceilings beside those of the config; ``None``: no such order.
    """

    held: bool = False
    max_batch: int | None = None
    max_workers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordered:
    """``orders`` stand from now on, in the place of those before."""

    orders: Orders


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """``worker_hours`` were used by all attempts of the run so far.

    ``reserve_worker_hours`` is what passes, and has to be left, until a stop that is asked for when this is told the
    next time has saved a checkpoint and ended the workers.
    """

    worker_hours: float
    reserve_worker_hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersMissing:
    """``present`` workers are there, and more that were asked for did not come for so long that they are given up."""

    present: int


Event = GradMeasured | WorkersChanged | PlanRejected | Preempted | Branched | Ordered | Spent | WorkersMissing


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyPlan:
    """Train with ``plan`` from step ``effective_step`` on."""

    plan: BatchPlan
    target: Target
    lr_factor: float
    effective_step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestWorkers:
    """Ask the cluster for ``num_workers``; training goes on as it is until they are there."""

    num_workers: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Go on. A decision to hold names the target it holds; ``None``: nothing was to be decided at this step.

    ``wish`` is the target batch that ``advise`` mode would have chosen, where that differs. ``workers`` is what a
    decision to hold asks for besides: the batch stays, and more workers may still be worth it.
    """

    reason: str
    target_batch: int | None = None
    wish: int | None = None
    workers: RequestWorkers | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCheckpoint:
    """Save now, at the next step boundary."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Training is complete, or must end here; with a checkpoint."""

    reason: str


def decided_batch(action: ApplyPlan | Keep) -> int | None:
    """The target that ``action`` decided for, or ``None`` when nothing was to be decided."""
    return action.target.batch if isinstance(action, ApplyPlan) else action.target_batch


Action = Keep | ApplyPlan | RequestWorkers | SaveCheckpoint | Stop
