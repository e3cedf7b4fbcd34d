"""LAMB: Adam in which every layer's step is a fixed share of the layer's own norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

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
class LAMB(LayerWiseOptimizer):
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
            check_adam_settings(group, optimizer="LAMB")

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        move_by_own_norm(parameter, computing(gradient), group, state=self.state[parameter])


def move_by_own_norm(parameter: Tensor, gradient: Tensor, group: Mapping[str, Any], *, state: dict[str, Any]) -> None:
    """The step above, with ``gradient`` for g, in the precision to compute in."""
    w = computing(parameter)
    mean, scale = adam_moments(state, parameter, gradient, group)
    update = mean.div_(scale)
    rate = group["lr"]
    if adapts(parameter, group):
        update.add_(w, alpha=group["weight_decay"])
        rate = rate * ratio(norm(w), norm(update))
    parameter.copy_(w - update.mul_(rate))
