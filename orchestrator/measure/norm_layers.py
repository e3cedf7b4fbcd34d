"""Squared norms of every sample's gradient in the normalisation layers alone, which cost next to nothing.

Their noise scale follows that of the whole model, with a factor of the model's own (Gray et al. 2024,
arXiv:2411.00999). So the whole is read besides, as ``per_example`` does, until the factor is known
(``core.calibration``); from then on only the layers that normalise are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, final

from torch import Tensor, nn

from orchestrator.errors import MeasureError
from orchestrator.measure.coverage import cover
from orchestrator.measure.layers import NORMALISATION
from orchestrator.measure.meter import PartReading, Reading
from orchestrator.measure.per_example import PerExampleMeter


@final
class NormLayersMeter:
    """The ``CalibratedMeter`` whose part are the parameters of ``NORMALISATION`` layers outside ``leave_out``.

    Raises ``MeasureError`` for a model that trains none there, and where ``PerExampleMeter`` does.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], *, leave_out: Sequence[str] = ()) -> None:
        parameters = list(parameters)
        read = cover(model, parameters, leave_out=leave_out).layers
        if not any(isinstance(layer.module, NORMALISATION) for layer in read):
            kinds = ", ".join(kind.__name__ for kind in NORMALISATION)
            raise MeasureError(
                f"measure.estimator: norm_layers reads the parameters of {kinds}, and the model trains none of "
                "these outside measure.leave_out: write measure.estimator: per_example"
            )
        self._whole = PerExampleMeter(model, parameters, leave_out=leave_out)
        self._part = PerExampleMeter(model, parameters, leave_out=leave_out, kinds=NORMALISATION)
        self._reads: Literal["both", "whole", "part"] = "both"
        self._measured = False

    def go_on_with(self, which: Literal["whole", "part"]) -> None:
        self._reads = which

    def begin_step(self, *, measure: bool) -> None:
        self._measured = measure
        self._whole.begin_step(measure=measure and self._reads != "part")
        self._part.begin_step(measure=measure and self._reads != "whole")

    def end_micro_batch(self, *, size: int, loss: Tensor, loss_scale: float) -> None:
        self._whole.end_micro_batch(size=size, loss=loss, loss_scale=loss_scale)
        self._part.end_micro_batch(size=size, loss=loss, loss_scale=loss_scale)

    def read(self, *, grad_scale: float = 1.0) -> Reading:
        """One host synchronisation, and a second one in a step that both are measured in."""
        if self._reads == "part":
            return self._part.read(grad_scale=grad_scale)
        reading = self._whole.read(grad_scale=grad_scale)
        if self._reads == "whole" or not self._measured:
            return reading
        part = self._part.read(grad_scale=grad_scale)
        sums = PartReading(
            weighted_sq_sum=part.weighted_sq_sum,
            mean_grad_sq=part.mean_grad_sq,
            weighted_sq_terms=part.weighted_sq_terms,
        )
        return replace(reading, part=sums)

    def is_finite(self) -> bool:
        return self._whole.is_finite()

    def close(self) -> None:
        self._whole.close()
        self._part.close()
