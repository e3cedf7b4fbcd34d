"""Norms of gradients, summed with care and left on the device: of the mean gradient, and of whatever a hook hands over.

A float32 sum of many numbers loses digits that the estimator needs, since its two results are differences of sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

# A float32 sum of so many is good to 1e-6; what is longer is summed in rows, and the rows in float64. Most of
# a model's tensors are no longer than this, and their norms are taken together.
_LONGEST = 16384
_EXACT_ENOUGH = (torch.float32, torch.float64)


def is_small(tensor: Tensor) -> bool:
    """Whether the norm of ``tensor`` may be taken together with others, by ``norms``."""
    return tensor.numel() <= _LONGEST and tensor.dtype in _EXACT_ENOUGH


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in a dtype that sums of its squares can be taken in: float32 for what has fewer digits."""
    return tensor if tensor.dtype in _EXACT_ENOUGH else tensor.float()


def norm(gradient: Tensor) -> Tensor:
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


def norms(small: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """``others``, which are norms, and the norms of ``small``, which are gradients; 0-D."""
    if any(gradient.is_sparse for gradient in small):
        return others + [norm(gradient) for gradient in small]
    return others + list(torch._foreach_norm(small)) if small else others


def sum_of_squares(numbers: Iterable[float]) -> float:
    return sum(number * number for number in numbers)  # infinite where ** would raise


@final
class MeanGradient:
    """``.grad`` of ``parameters``, as the step's last backward pass and the all-reduce leave it."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._small = [p for p in self._parameters if is_small(p)]
        self._large = [p for p in self._parameters if not is_small(p)]

    def norms(self) -> list[Tensor]:
        """0-D, on the device; a parameter without a gradient counts as zero."""
        large = [norm(p.grad) for p in self._large if p.grad is not None]
        return norms([p.grad for p in self._small if p.grad is not None], large)

    def over_ranks(self, square: float) -> float:
        """The squared norm over all ranks, of what ``norms`` gave here: each rank has the whole."""
        return square

    def is_finite(self) -> bool:
        """Whether every entry is; a norm may overflow where they are. Waits for the device."""
        gradients = (p.grad for p in self._parameters if p.grad is not None)
        return all(bool(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all()) for g in gradients)
