"""LANS: LAMB with every layer's gradient brought to length one, and a step of Nesterov's kind."""

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
class LANS(torch.optim.Optimizer):
    """Block-normalised LAMB with Nesterov's momentum (Zheng et al. 2020, arXiv:2006.13484), with phi the identity.

    Per layer, which is a parameter tensor w with gradient g, at its step t = 1, 2, ...::

        n = g / |g|
        m <- beta1 m + (1 - beta1) n,      v <- beta2 v + (1 - beta2) n^2
        s = sqrt(v / (1 - beta2^t)) + eps
        r = (m / (1 - beta1^t)) / s + weight_decay w,      c = n / s + weight_decay w
        w <- w - lr |w| (beta1 r / |r| + (1 - beta1) c / |c|)

    so that a step moves the layer by at most lr |w|, and by that much when r and c point alike. A gradient of zero
    stays zero; where |w|, |r| or |c| is zero the ratio that holds it is 1.

    Parameters of one dimension or none (biases, gains of normalisation) get neither decay nor the ratios, and their
    gradient is brought to length one all the same. ``adapt_one_dimensional=True`` treats them like all others.

    Since n has length one, its elements in a layer of a million are near 1e-3: that is what ``eps`` is added to.
    Clipping the gradient by its norm changes nothing here.
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
            check_not_negative(group["lr"], key="lr", optimizer="LANS")
            check_betas(group["betas"], optimizer="LANS")
            check_positive(group["eps"], key="eps", usual=1e-6, optimizer="LANS")
            check_not_negative(group["weight_decay"], key="weight_decay", optimizer="LANS")

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
            for parameter, gradient in moving(group, optimizer="LANS"):
                self._move(parameter, gradient, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        w, g = computing(parameter), computing(gradient)
        length = norm(g)
        g = g / torch.where(length > 0, length, 1.0)
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
        scale = (v / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        averaged = (m / (1 - beta1**steps)).div_(scale)
        current = g.div_(scale)
        if adapts(parameter, group):
            averaged.add_(w, alpha=group["weight_decay"])
            current.add_(w, alpha=group["weight_decay"])
            weight_norm = norm(w)
            averaged.mul_(ratio(weight_norm, norm(averaged)))
            current.mul_(ratio(weight_norm, norm(current)))
        update = averaged.mul_(beta1).add_(current, alpha=1 - beta1)
        parameter.copy_(w - update.mul_(group["lr"]))
