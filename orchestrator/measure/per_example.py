"""Squared norms of every single sample's gradient, in the one backward pass that training needs anyway.

A step of N samples then has N parts of one sample each: the limit of the comparison of micro-batches, with the least
variance (Goodfellow 2015, arXiv:1510.01799), and possible on one worker without accumulation. For a loss that is the
mean over n samples, n times a sample's part of the gradient is its gradient, whatever weights and AMP multiply.

The unit of independence is the sample. In a loss that is a mean over the tokens of samples of unequal lengths, a
sample's part is weighted by its tokens; the weights' own variance is then counted as noise, and the noise scale comes
out larger by about CV^2 samples, the squared coefficient of variation of the token counts. A loss that compares
samples, such as a contrastive one, has no gradients of single samples: its parts are taken as if they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import final

import torch
from torch import Tensor, nn

from orchestrator.errors import MeasureError
from orchestrator.measure.completeness import Completeness
from orchestrator.measure.coverage import Layer, cover, joined_names, refuse_mixing
from orchestrator.measure.example_norms import ExampleGradients, squared_norms
from orchestrator.measure.layers import has_samples
from orchestrator.measure.meter import Reading
from orchestrator.measure.norms import MeanGradient, sum_of_squares, widened
from orchestrator.measure.taps import Taps

_OTHERWISE = (
    "give it inputs of [samples, ...] (what is alike for all samples, such as positions: expanded to all), or write "
    "measure.leave_out: [{path}], or measure.estimator: micro_batch"
)


@final
class PerExampleMeter:
    """The ``Meter`` that compares samples; ``leave_out`` are paths of modules whose parameters are not measured.

    Of the others only those of ``kinds`` are.

    Raises ``MeasureError`` for a model that it cannot read: here, or at the first micro-batch, when the layers are
    found not to account for the gradient, or a layer's first dimension not to be that of the samples. (A dimension of
    another meaning is seen by its length: one that happens to have the length of the micro-batch is not.)
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        *,
        leave_out: Sequence[str] = (),
        kinds: tuple[type[nn.Module], ...] = (nn.Module,),
    ) -> None:
        self._coverage = cover(model, parameters, leave_out=leave_out, kinds=kinds)
        owners = Counter(id(p) for layer in self._coverage.layers for p in layer.parameters.values())
        shared = {i for i, count in owners.items() if count > 1}
        self._alone = {id(layer): joined_names(layer, shared=shared) for layer in self._coverage.layers}
        self._taps = Taps(self._coverage.layers, self._see)
        self._mean = MeanGradient(self._coverage.measured)
        self._rest = MeanGradient(self._coverage.left_out)
        self._completeness = Completeness(self._coverage)
        self._sums: list[Tensor] = []  # of squared norms over the samples, 0-D, of the micro-batch at hand
        self._held: dict[int, list[ExampleGradients]] = {}  # of parameters that are used more than once in it
        self._first_dimensions: dict[int, Layer] = {}
        self._micro_batches: list[tuple[int, float, Tensor, list[Tensor]]] = []  # size, loss scale, loss, sums

    def begin_step(self, *, measure: bool) -> None:
        self._micro_batches = []
        self._forget_micro_batch()
        if measure:
            refuse_mixing(self._coverage.batch_norms)
            self._taps.attach()
            self._completeness.begin_step()
        else:
            self.close()

    def end_micro_batch(self, *, size: int, loss: Tensor, loss_scale: float) -> None:
        if self._taps.attached:
            self._refuse_other_dimensions(size)
        with torch.no_grad():
            self._sums += [squared_norms(uses).sum() for uses in self._held.values()]
        self._micro_batches.append((size, loss_scale, loss, self._sums))
        self._forget_micro_batch()

    def read(self, *, grad_scale: float = 1.0) -> Reading:
        mean, rest, proof = self._mean.norms(), self._rest.norms(), self._completeness.differences()
        losses = [loss for _, _, loss, _ in self._micro_batches]
        parts = [*losses, *chain(*(sums for *_, sums in self._micro_batches)), *proof, *mean, *rest]
        numbers = iter(torch.stack(parts).tolist() if parts else [])
        found_losses = tuple(islice(numbers, len(losses)))
        terms = tuple(
            # b_i = 1, and a sample's gradient is size times its part of the mean
            (size / scale) ** 2 * sum(islice(numbers, len(sums)))
            for size, scale, _, sums in self._micro_batches
        )
        self._completeness.judge(list(islice(numbers, len(proof))))
        mean_sq = sum_of_squares(islice(numbers, len(mean)))
        return Reading(
            losses=found_losses,
            weighted_sq_sum=sum(terms),
            mean_grad_sq=mean_sq / grad_scale**2,
            left_out_grad_sq=sum_of_squares(numbers) / grad_scale**2,
            weighted_sq_terms=terms,
        )

    def is_finite(self) -> bool:
        return self._mean.is_finite() and self._rest.is_finite()

    def close(self) -> None:
        self._taps.detach()
        self._completeness.close()

    def _forget_micro_batch(self) -> None:
        self._sums = []
        self._held = {}
        self._first_dimensions = {}
        self._taps.calls.clear()

    def _see(self, layer: Layer, inputs: Tensor, deltas: Tensor) -> None:
        """In the backward pass."""
        if not has_samples(layer.module, deltas):
            raise MeasureError(
                f"{layer.path} ({type(layer.module).__name__}) is called without a dimension for the samples: its "
                f"output has the shape {list(deltas.shape)}; {_OTHERWISE.format(path=layer.path)}"
            )
        self._first_dimensions.setdefault(len(deltas), layer)
        alone = all(self._taps.calls[id(p)] == 1 for p in layer.parameters.values())
        names = self._alone[id(layer)] if alone else tuple(layer.parameters)
        if inputs.is_floating_point():
            inputs = widened(inputs)
        with torch.no_grad(), torch.autocast(deltas.device.type, enabled=False):
            if self._completeness.open:  # besides, so that the first step of an attempt reads as any other would
                each = layer.rule(layer.module, inputs, widened(deltas), tuple(layer.parameters))
                for name, gradients in each.items():
                    self._completeness.account(layer.parameters[name], gradients)
            for name, gradients in layer.rule(layer.module, inputs, widened(deltas), names).items():
                if alone:
                    self._sums.append(gradients.squared_norms().sum())
                else:
                    self._held.setdefault(id(layer.parameters[name]), []).append(gradients)

    def _refuse_other_dimensions(self, size: int) -> None:
        other = {first: layer for first, layer in self._first_dimensions.items() if first != size}
        for first, layer in other.items():
            raise MeasureError(
                f"{layer.path} ({type(layer.module).__name__}) has an output whose first dimension is {first}, in a "
                f"micro-batch of {size} samples: the samples must lie along the first dimension, so that each one's "
                f"gradient can be told; {_OTHERWISE.format(path=layer.path)}"
            )
