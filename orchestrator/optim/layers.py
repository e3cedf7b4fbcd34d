"""What the layer-wise optimizers share: the step, Adam's moments, norms and their ratio, settings that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class LayerWiseOptimizer(torch.optim.Optimizer):
    """Moves one parameter tensor after the other, each by its own gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given.

        Nothing waits for the device. Gradients are left as they are.
        """
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter, gradient in moving(group, optimizer=type(self).__name__):
                self._move(parameter, gradient, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


def loss_of(closure: Callable[[], float] | None) -> Any:
    """The closure's loss, computed with gradients; ``None`` without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def adam_moments(
    state: dict[str, Any], parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Takes ``gradient`` into Adam's averages in ``state``; the bias-corrected mean, and sqrt of the square + eps."""
    beta1, beta2 = group["betas"]
    if "step" not in state:
        # Counted on the host, so that reading it waits for nothing; torch.optim's Adam does so too.
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    state["step"] += 1
    steps = state["step"].double()  # in float32, 1 - 0.999 would be wrong in its fifth digit
    m = computing(state["exp_avg"]).mul_(beta1).add_(gradient, alpha=1 - beta1)
    v = computing(state["exp_avg_sq"]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    # m and v are the state itself in float32 and float64, and copies of it in less.
    state["exp_avg"].copy_(m)
    state["exp_avg_sq"].copy_(v)
    return m / (1 - beta1**steps), (v / (1 - beta2**steps)).sqrt_().add_(group["eps"])


def check_adam_settings(group: Mapping[str, Any], *, optimizer: str) -> None:
    check_not_negative(group["lr"], key="lr", optimizer=optimizer)
    check_betas(group["betas"], optimizer=optimizer)
    check_positive(group["eps"], key="eps", usual=1e-6, optimizer=optimizer)
    check_not_negative(group["weight_decay"], key="weight_decay", optimizer=optimizer)


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
