"""Squared norms of every micro-batch's gradient, read while autograd produces it: one pass, no host sync.

A hook on a parameter sees each micro-gradient before it is added to ``.grad`` and before DDP averages it, so
accumulation needs no copies and no differences. What the hook sees is the gradient of the *scaled* loss; the scale is
known and divided out, so neither sample weights nor an AMP scaler reach the numbers. Clipping and weight decay come
later, in or just before the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

# Rows this long are summed in float32 and the rows in float64: as fast as one float32 norm, and good to 1e-7.
_ROW = 4096


def squared_norms(gradient: Tensor) -> Tensor:
    """Norms whose squares add up to |gradient|^2: a 1-D tensor in at least float32, on the gradient's device."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    dtype = gradient.dtype if gradient.dtype in (torch.float32, torch.float64) else torch.float32
    rows, rest = divmod(gradient.numel(), _ROW)
    if rows == 0 or rest or not gradient.is_contiguous():
        if rows and gradient.is_contiguous():
            flat = gradient.view(-1)
            head = torch.linalg.vector_norm(flat[: rows * _ROW].view(rows, _ROW), dim=1, dtype=dtype)
            return torch.cat([head, torch.linalg.vector_norm(flat[rows * _ROW :], dtype=dtype).view(1)])
        return torch.linalg.vector_norm(gradient, dtype=dtype).view(1)
    return torch.linalg.vector_norm(gradient.view(rows, _ROW), dim=1, dtype=dtype)


def total_square(norms: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of the norms, a float64 scalar on ``device``."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat(norms).double().square_().sum()


@final
class GradMeter:
    """Reads one step's sums: ``sum_i b_i |g_i|^2`` over this rank's micro-batches, and a share of |mean gradient|^2.

    ``begin_step`` | (``watch`` | backward)* | ``mean_grad_sq_share``. Parameters without a gradient count as zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, device: torch.device) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._device = device
        self._norms: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._weighted = torch.zeros((), dtype=torch.float64, device=device)

    def begin_step(self, *, measure: bool) -> None:
        """Forget the last step. Hooks are attached only while steps are measured."""
        self._norms = []
        self._weighted = torch.zeros((), dtype=torch.float64, device=self._device)
        if measure and not self._handles:
            self._handles = [p.register_hook(self._see) for p in self._parameters]
        elif not measure and self._handles:
            self.close()

    def end_micro_batch(self, *, size: int, loss_scale: float) -> None:
        """Take in what the hooks saw of a micro-batch of ``size`` samples whose mean loss was times ``loss_scale``."""
        self._weighted += total_square(self._norms, self._device) * (size / loss_scale**2)
        self._norms = []

    @property
    def weighted_sq_sum(self) -> Tensor:
        """``sum_i b_i |g_i|^2`` over this rank's micro-batches, a float64 scalar on the device."""
        return self._weighted

    def mean_grad_sq_share(self, *, rank: int, world_size: int, grad_scale: float = 1.0) -> Tensor:
        """This rank's share of |mean gradient|^2; the shares of all ranks add up to it.

        After the all-reduce every rank holds the same gradient, so each reads only a part of it. ``grad_scale`` is
        what ``.grad`` is still multiplied by (an AMP scaler).
        """
        norms = []
        for i, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            n = gradient.numel()
            if n >= world_size * _ROW and gradient.layout is torch.strided and gradient.is_contiguous():
                norms.append(squared_norms(gradient.view(-1)[n * rank // world_size : n * (rank + 1) // world_size]))
            elif i % world_size == rank:
                norms.append(squared_norms(gradient))
        return total_square(norms, self._device) / grad_scale**2

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see(self, gradient: Tensor) -> None:
        self._norms.append(squared_norms(gradient))
