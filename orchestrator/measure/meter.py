"""What does the session ask of whatever reads the gradients, and what does it get?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from orchestrator.config.batch_size import MeasureSection
from orchestrator.types import BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReading:
    """The same two sums as a ``Reading``'s, of some of the parameters that are measured."""

    weighted_sq_sum: float
    mean_grad_sq: float
    weighted_sq_terms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One step as one rank sees it. The mean gradients are read from ``.grad``: after the all-reduce, all see the same.

    The first two are of the parameters that are measured; ``left_out_grad_sq`` is of those that are trained besides.
    """

    weighted_sq_sum: float  # sum of b_i |g_i|^2 over this rank's parts of b_i samples: micro-batches, or single samples
    mean_grad_sq: float  # |mean gradient|^2
    losses: tuple[float, ...]  # of this rank's micro-batches, in order
    left_out_grad_sq: float = 0.0  # |mean gradient|^2
    weighted_sq_terms: tuple[float, ...] = ()  # of the first, by micro-batch, in order; empty where it is not known
    part: PartReading | None = None  # while a part is read besides, to find out what it tells of the whole

    @property
    def grad_is_finite(self) -> bool:
        """Whether the squared norm of the whole mean gradient is; an entry that is not shows on all ranks alike."""
        return math.isfinite(self.mean_grad_sq + self.left_out_grad_sq)


class Meter(Protocol):
    """Reads one step's sums: ``begin_step`` | (backward | ``end_micro_batch``)* | ``read``.

    The gradient is the same, to the last bit, as if nothing were measured.
    """

    def begin_step(self, *, measure: bool) -> None:
        """Forget the last step. Hooks are attached only while steps are measured."""
        ...

    def end_micro_batch(self, *, size: int, loss: Tensor, loss_scale: float) -> None:
        """Take in what the hooks saw of ``size`` samples whose mean ``loss`` was times ``loss_scale`` in backward."""
        ...

    def read(self, *, grad_scale: float = 1.0) -> Reading:
        """The step's one host synchronisation. ``grad_scale`` is what ``.grad`` is multiplied by (an AMP scaler)."""
        ...

    def is_finite(self) -> bool:
        """Whether every entry of ``.grad`` of all trained parameters is; a norm may overflow where they are."""
        ...

    def close(self) -> None:
        """Leave no hook behind."""
        ...


@runtime_checkable
class CalibratedMeter(Meter, Protocol):
    """A ``Meter`` that reads a part besides the whole until it is told which of them to go on with."""

    def go_on_with(self, which: Literal["whole", "part"]) -> None:
        """From the next step on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """A way to measure: ``build(model, trained parameters, measure section)`` makes a rank's meter.

    ``compares`` says what the parts of a step are, the g_i of a ``Reading``: its micro-batches or its samples. With
    ``halves`` every micro-batch is computed in two, which makes another micro-batch list.
    """

    build: Callable[[nn.Module, Sequence[nn.Parameter], MeasureSection], Meter]
    compares: Literal["micro_batches", "samples"] = "micro_batches"
    halves: bool = False

    @property
    def cuts(self) -> bool:
        """Whether a batch that fits into one micro-batch must be cut to be measured."""
        return self.compares == "micro_batches"

    def parts(self, plan: BatchPlan) -> int:
        """How many independent parts a step of ``plan`` has, over all ranks; two or more can be compared."""
        return plan.batch if self.compares == "samples" else plan.num_micro_batches
