"""What is done in the place of DDP where a step must give the same bits on any layout? (``train.reproducible``)"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import final

from torch import Tensor, nn

from orchestrator.errors import SessionError
from orchestrator.measure.meter import Reading
from orchestrator.ports import Collective
from orchestrator.runtime.first_statistics import FirstStatistics, share_tensors
from orchestrator.runtime.pairwise_gradients import PairwiseGradients
from orchestrator.types import BatchPlan


@final
class ReproducibleStep:
    """``begin`` | (``begin_micro_batch`` | forward and backward | ``end_micro_batch``)* | ``finish``.

    Collective where it is made: all ranks begin with rank zero's weights and buffers. ``totals`` are tensors that a
    micro-batch adds to besides ``.grad``. Raises ``SessionError`` for a model that cannot keep the promise, and on all
    ranks where their models differ.
    """

    def __init__(self, model: nn.Module, *, totals: list[Tensor], collective: Collective) -> None:
        for name, module in model.named_modules():
            _refuse(name or type(module).__name__, module)
        state = [*model.parameters(), *model.buffers()]
        _check_same(state, collective)
        share_tensors(state, collective)
        self._gradients = PairwiseGradients(model.parameters(), totals=totals, collective=collective)
        self._statistics = FirstStatistics(model.buffers(), collective=collective)

    def begin(self, plan: BatchPlan) -> None:
        self._gradients.begin_step(plan)
        self._statistics.begin_step()

    def begin_micro_batch(self) -> None:
        self._statistics.begin_micro_batch()

    def end_micro_batch(self) -> None:
        self._gradients.end_micro_batch()

    def summable(self, reading: Reading) -> Reading:
        """``reading`` with sums to which the other ranks' are added without rounding, in whatever order."""
        part = reading.part
        if part is not None and part.weighted_sq_terms:
            part = replace(part, weighted_sq_sum=sum(map(summable, part.weighted_sq_terms)))
        if reading.weighted_sq_terms:
            reading = replace(reading, weighted_sq_sum=sum(map(summable, reading.weighted_sq_terms)))
        return replace(reading, part=part)

    def finish(self, *, spoil: bool) -> None:
        """Collective. With ``spoil`` on any rank the gradient is NaN on all: the step is not whole."""
        self._gradients.finish(spoil=spoil)
        self._statistics.finish()


def summable(term: float) -> float:
    """``term`` to 28 binary digits, of which float32 gradients hold 24: float64 adds such terms without rounding.

    Their sum is then the same in any order and grouping: of n terms that lie within 2^25 / n of one another.
    """
    if not term < 2.0**1000:  # nor is there a number that infinity, NaN or the largest float could be rounded to
        return term
    mantissa, exponent = math.frexp(term)
    return math.ldexp(round(math.ldexp(mantissa, 28)), exponent - 28)


def _refuse(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.SyncBatchNorm):
        raise SessionError(
            f"{name} is a SyncBatchNorm, whose output depends on what other ranks compute at the same time, and "
            "train.reproducible is true: use BatchNorm, GroupNorm or LayerNorm, or write train.reproducible: false"
        )
    if getattr(module, "sparse", False) is True:
        raise SessionError(
            f"{name} gives sparse gradients, and train.reproducible adds up dense ones only: build it with "
            "sparse=False, or write train.reproducible: false"
        )


def _check_same(tensors: list[Tensor], collective: Collective) -> None:
    of_ranks = [0.0] * collective.world_size
    of_ranks[collective.rank] = float(zlib.crc32(repr([(tuple(t.shape), t.dtype) for t in tensors]).encode()))
    if len(set(collective.sum(of_ranks))) > 1:
        raise SessionError(
            "the ranks' models differ in the shapes or types of their parameters and buffers: build the same model on "
            "each rank, whatever its rank, device or time"
        )
