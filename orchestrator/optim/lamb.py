"""LAMB: Adam in which every layer's step is a fixed share of the layer's own norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from orchestrator.optim.layers import (
    adapts,
    check_betas,
    check_not_negative,
    check_positive,
    computing,
    moving,
    norm,
    ratio,
)


@final
class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962), with phi the identity.

    Per layer, which is a parameter tensor w with gradient g, at its step t = 1, 2, ...::

        m <- beta1 m + (1 - beta1) g,      v <- beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        w <- w - lr |w| / |u| u

    so that a step moves the layer by lr |w|, whatever the gradient's size. Where |w| or |u| is zero the ratio is 1.

    Parameters of one dimension or none (biases, gains of normalisation) get neither decay nor the ratio: their step is
    Adam's. ``adapt_one_dimensional=True`` treats them like all others.

    The gradient is not normalised over the model first, as some implementations do: ``train.max_grad_norm`` clips. The
    ratio has no ceiling; the paper leaves phi open.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt_one_dimensional: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adapt_one_dimensional": adapt_one_dimensional,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_not_negative(group["lr"], key="lr", optimizer="LAMB")
            check_betas(group["betas"], optimizer="LAMB")
            check_positive(group["eps"], key="eps", usual=1e-6, optimizer="LAMB")
            check_not_negative(group["weight_decay"], key="weight_decay", optimizer="LAMB")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given.

        Nothing waits for the device. Gradients are left as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter, gradient in moving(group, optimizer="LAMB"):
                self._move(parameter, gradient, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        w, g = computing(parameter), computing(gradient)
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        if not state:
            # Counted on the host, so that reading it waits for nothing; torch.optim's Adam does so too.
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        steps = state["step"].double()  # in float32, 1 - 0.999 would be wrong in its fifth digit
        m = computing(state["exp_avg"]).mul_(beta1).add_(g, alpha=1 - beta1)
        v = computing(state["exp_avg_sq"]).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        # m and v are the state itself in float32 and float64, and copies of it in less.
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        update = (m / (1 - beta1**steps)).div_((v / (1 - beta2**steps)).sqrt_().add_(group["eps"]))
        rate = group["lr"]
        if adapts(parameter, group):
            update.add_(w, alpha=group["weight_decay"])
            rate = rate * ratio(norm(w), norm(update))
        parameter.copy_(w - update.mul_(rate))
