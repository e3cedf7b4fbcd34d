"""Squared norms of every micro-batch's gradient, read while autograd produces it: one pass, one host sync a step.

A hook on a parameter sees each micro-gradient before it is added to ``.grad`` and before DDP averages it, so
accumulation needs no copies and no differences. What the hook sees is the gradient of the *scaled* loss; the scale is
known and divided out, so neither sample weights nor an AMP scaler reach the numbers. Clipping and weight decay come
later, in or just before the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import final

import torch
from torch import Tensor, nn

from orchestrator.measure.meter import Reading
from orchestrator.measure.norms import MeanGradient, is_small, norm, norms, sum_of_squares
from orchestrator.measure.sharded import Attach, ShardedMeanGradient


@final
class GradMeter:
    """The ``Meter`` that compares micro-batches. Parameters without a gradient count as zero.

    ``attach`` and ``mean`` are for parameters that are sharded (``measure.sharded``): how a hook comes to see whole
    micro-gradients, and the norm of the mean gradient.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        attach: Attach = nn.Parameter.register_hook,
        mean: MeanGradient | ShardedMeanGradient | None = None,
    ) -> None:
        trained = [p for p in parameters if p.requires_grad]
        self._attach = attach
        self._mean = MeanGradient(trained) if mean is None else mean
        self._small_parameters = [p for p in trained if is_small(p)]
        self._large_parameters = [p for p in trained if not is_small(p)]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._small: list[Tensor] = []  # gradients of the micro-batch at hand, let go at its end
        self._norms: list[Tensor] = []  # of larger ones, which must not be kept
        self._micro_batches: list[tuple[int, float, Tensor, list[Tensor]]] = []  # size, loss scale, loss, norms

    def begin_step(self, *, measure: bool) -> None:
        self._micro_batches = []
        self._small.clear()
        self._norms = []
        if measure and not self._handles:
            # Appending a small gradient is all that its hook does: a norm apiece would cost more than the norms.
            self._handles = [self._attach(p, self._small.append) for p in self._small_parameters]
            self._handles += [self._attach(p, self._see) for p in self._large_parameters]
        elif not measure and self._handles:
            self.close()

    def end_micro_batch(self, *, size: int, loss: Tensor, loss_scale: float) -> None:
        self._micro_batches.append((size, loss_scale, loss, norms(self._small, self._norms)))
        self._small.clear()
        self._norms = []

    def read(self, *, grad_scale: float = 1.0) -> Reading:
        mean = self._mean.norms()
        losses = [loss for _, _, loss, _ in self._micro_batches]
        parts = [*losses, *chain(*(seen for *_, seen in self._micro_batches)), *mean]
        numbers = iter(torch.stack(parts).tolist() if parts else [])
        found_losses = tuple(islice(numbers, len(losses)))
        terms = tuple(
            size * sum_of_squares(islice(numbers, len(seen))) / scale**2 for size, scale, _, seen in self._micro_batches
        )
        return Reading(
            losses=found_losses,
            weighted_sq_sum=sum(terms),
            mean_grad_sq=self._mean.over_ranks(sum_of_squares(numbers)) / grad_scale**2,
            weighted_sq_terms=terms,
        )

    def is_finite(self) -> bool:
        return self._mean.is_finite()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see(self, gradient: Tensor) -> None:
        self._norms.append(norm(gradient))
