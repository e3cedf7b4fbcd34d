"""Squared norms of every micro-batch's gradient, read while autograd produces it: one pass, one host sync a step.

A hook on a parameter sees each micro-gradient before it is added to ``.grad`` and before DDP averages it, so
accumulation needs no copies and no differences. What the hook sees is the gradient of the *scaled* loss; the scale is
known and divided out, so neither sample weights nor an AMP scaler reach the numbers. Clipping and weight decay come
later, in or just before the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import final

import torch
from torch import Tensor, nn

# A float32 sum of so many is good to 1e-6; what is longer is summed in rows, and the rows in float64. Most of
# a model's tensors are no longer than this, and their norms are taken together.
_LONGEST = 16384
_EXACT_ENOUGH = (torch.float32, torch.float64)


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= _LONGEST and tensor.dtype in _EXACT_ENOUGH


def _norm(gradient: Tensor) -> Tensor:
    """|gradient| in at least float32, 0-D, on the gradient's device."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    dtype = gradient.dtype if gradient.dtype in _EXACT_ENOUGH else torch.float32
    if gradient.device.type != "cpu":  # its sums are trees
        return torch.linalg.vector_norm(gradient, dtype=dtype)
    row = gradient[0].numel() if gradient.dim() > 1 and len(gradient) else 0
    if not 16 <= row <= _LONGEST:
        return torch.linalg.vector_norm(gradient, dtype=torch.float64)
    rows = torch.linalg.vector_norm(gradient.reshape(-1, row), dim=1, dtype=dtype)
    return torch.linalg.vector_norm(rows, dtype=torch.float64)


def _norms(small: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """``others``, which are norms, and the norms of ``small``, which are gradients; 0-D."""
    if any(gradient.is_sparse for gradient in small):
        return others + [_norm(gradient) for gradient in small]
    return others + list(torch._foreach_norm(small)) if small else others


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One step as one rank sees it. ``mean_grad_sq`` is read from ``.grad``: after the all-reduce, all see the same."""

    weighted_sq_sum: float  # sum of b_i |g_i|^2 over this rank's micro-batches
    mean_grad_sq: float  # |mean gradient|^2
    losses: tuple[float, ...]  # of this rank's micro-batches, in order


@final
class GradMeter:
    """Reads one step's sums: ``begin_step`` | (backward | ``end_micro_batch``)* | ``read``.

    Parameters without a gradient count as zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._small_parameters = [p for p in self._parameters if _is_small(p)]
        self._large_parameters = [p for p in self._parameters if not _is_small(p)]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._small: list[Tensor] = []  # gradients of the micro-batch at hand, let go at its end
        self._norms: list[Tensor] = []  # of larger ones, which must not be kept
        self._micro_batches: list[tuple[int, float, Tensor, list[Tensor]]] = []  # size, loss scale, loss, norms

    def begin_step(self, *, measure: bool) -> None:
        """Forget the last step. Hooks are attached only while steps are measured."""
        self._micro_batches = []
        self._small.clear()
        self._norms = []
        if measure and not self._handles:
            # Appending a small gradient is all that its hook does: a norm apiece would cost more than the norms.
            self._handles = [p.register_hook(self._small.append) for p in self._small_parameters]
            self._handles += [p.register_hook(self._see) for p in self._large_parameters]
        elif not measure and self._handles:
            self.close()

    def end_micro_batch(self, *, size: int, loss: Tensor, loss_scale: float) -> None:
        """Take in what the hooks saw of ``size`` samples whose mean ``loss`` was times ``loss_scale`` in backward."""
        self._micro_batches.append((size, loss_scale, loss, _norms(self._small, self._norms)))
        self._small.clear()
        self._norms = []

    def read(self, *, grad_scale: float = 1.0) -> Reading:
        """The step's one host synchronisation. ``grad_scale`` is what ``.grad`` is multiplied by (an AMP scaler)."""
        large = [_norm(p.grad) for p in self._large_parameters if p.grad is not None]
        mean = _norms([p.grad for p in self._small_parameters if p.grad is not None], large)
        losses = [loss for _, _, loss, _ in self._micro_batches]
        parts = [*losses, *chain(*(norms for *_, norms in self._micro_batches)), *mean]
        numbers = iter(torch.stack(parts).tolist() if parts else [])
        return Reading(
            losses=tuple(islice(numbers, len(losses))),
            weighted_sq_sum=sum(
                size * _sum_of_squares(islice(numbers, len(norms))) / scale**2
                for size, scale, _, norms in self._micro_batches
            ),
            mean_grad_sq=_sum_of_squares(numbers) / grad_scale**2,
        )

    def is_finite(self) -> bool:
        """Whether every entry of ``.grad`` is; a norm may overflow where they are."""
        gradients = (p.grad for p in self._parameters if p.grad is not None)
        return all(bool(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all()) for g in gradients)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see(self, gradient: Tensor) -> None:
        self._norms.append(_norm(gradient))


def _sum_of_squares(numbers: Iterable[float]) -> float:
    return sum(number * number for number in numbers)  # infinite where ** would raise
