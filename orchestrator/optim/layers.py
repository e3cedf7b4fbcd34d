"""What the layer-wise optimizers share: which layers move, norms and their ratio, and settings that are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def moving(group: Mapping[str, Any], *, optimizer: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter of ``group`` that has a gradient, with its gradient.

    Raises ``ValueError`` for gradients that are sparse and parameters that are complex.
    """
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout != torch.strided:
            raise ValueError(
                f"{optimizer} found a sparse gradient, of a parameter of shape {tuple(parameter.shape)}, and takes the "
                "norm of whole layers: build the embedding with sparse=False, or give it torch.optim.SparseAdam"
            )
        if parameter.is_complex():
            raise ValueError(
                f"{optimizer} found a complex parameter of shape {tuple(parameter.shape)} and is defined for real "
                "ones: keep its real and imaginary parts as a real parameter (torch.view_as_real)"
            )
        yield parameter, gradient


def computing(tensor: Tensor) -> Tensor:
    """``tensor`` in the precision to compute in: a copy in float32 of less than that, else the tensor itself."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def adapts(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the parameter gets decay and a trust ratio: biases and gains, of one dimension or none, do if asked."""
    return parameter.dim() > 1 or group["adapt_one_dimensional"]


def norm(tensor: Tensor) -> Tensor:
    """The 2-norm over the whole tensor, 0-D, float64: squares of small gradients would vanish in less."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def ratio(weight: Tensor, update: Tensor, *, factor: float = 1.0) -> Tensor:
    """``factor * weight / update`` for two norms, and 1 where either is zero. It stays on the device."""
    usable = (weight > 0) & (update > 0)
    return torch.where(usable, factor * weight / torch.where(usable, update, 1.0), 1.0)


def check_fraction(value: float, *, key: str, optimizer: str) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{optimizer}: {key} is {value} and must be at least 0 and below 1; 0.9 is usual")


def check_betas(betas: Any, *, optimizer: str) -> None:
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise ValueError(f"{optimizer}: betas is {betas!r} and must be two fractions; write (0.9, 0.999)")
    for number, beta in enumerate(betas):
        check_fraction(beta, key=f"betas[{number}]", optimizer=optimizer)


def check_not_negative(value: Any, *, key: str, optimizer: str) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{optimizer}: {key} is {value} and must be finite and not negative; write 0 for none")


def check_positive(value: float, *, key: str, usual: float, optimizer: str) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{optimizer}: {key} is {value} and must be finite and above 0; {usual:g} is usual")
