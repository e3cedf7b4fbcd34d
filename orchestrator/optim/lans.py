"""LANS: LAMB with every layer's gradient brought to length one, and a step of Nesterov's kind."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from orchestrator.optim.layers import (
    LayerWiseOptimizer,
    adam_moments,
    adapts,
    check_adam_settings,
    computing,
    norm,
    ratio,
)


@final
class LANS(LayerWiseOptimizer):
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
            check_adam_settings(group, optimizer="LANS")

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        w, g = computing(parameter), computing(gradient)
        length = norm(g)
        g = g / torch.where(length > 0, length, 1.0)
        beta1 = group["betas"][0]
        mean, scale = adam_moments(self.state[parameter], parameter, g, group)
        averaged = mean.div_(scale)
        current = g.div_(scale)
        if adapts(parameter, group):
            averaged.add_(w, alpha=group["weight_decay"])
            current.add_(w, alpha=group["weight_decay"])
            weight_norm = norm(w)
            averaged.mul_(ratio(weight_norm, norm(averaged)))
            current.mul_(ratio(weight_norm, norm(current)))
        update = averaged.mul_(beta1).add_(current, alpha=1 - beta1)
        parameter.copy_(w - update.mul_(group["lr"]))
