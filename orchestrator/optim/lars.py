"""LARS: momentum SGD in which every layer's step is a fixed share of the layer's own norm."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, final

import torch
from torch import Tensor

from orchestrator.optim.layers import (
    LayerWiseOptimizer,
    adapts,
    check_fraction,
    check_not_negative,
    check_positive,
    computing,
    norm,
    ratio,
)


@final
class LARS(LayerWiseOptimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888).

    Per layer, which is a parameter tensor w with gradient g::

        q = trust |w| / (|g| + weight_decay |w|)
        v <- momentum v + lr q (g + weight_decay w),  v = 0 at first
        w <- w - v

    ``trust`` is the share of |w| that a step moves at lr 1. Where |w| or the denominator is zero, q is 1.

    Parameters of one dimension or none (biases, gains of normalisation) get neither decay nor trust: for them q is 1
    and the step is that of SGD at the full ``lr``. ``adapt_one_dimensional=True`` treats them like all others.

    The learning rate is part of v, as in the paper: after a change of lr the momentum goes on at the rate at which it
    was gathered. ``torch.optim.SGD`` multiplies by lr outside of its buffer, so the two differ when lr changes.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 0.0,
        adapt_one_dimensional: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "trust": trust,
            "weight_decay": weight_decay,
            "adapt_one_dimensional": adapt_one_dimensional,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_lars_settings(group, optimizer="LARS")

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        move_by_trust(parameter, gradient, norm(gradient), group, state=self.state)


def move_by_trust(
    parameter: Tensor,
    gradient: Tensor,
    gradient_norm: Tensor,
    group: Mapping[str, Any],
    *,
    state: MutableMapping[Tensor, dict[str, Any]],
) -> None:
    """The step above, with ``gradient_norm`` (0-D) for the |g| in q."""
    w, g = computing(parameter), computing(gradient)
    rate = group["lr"]
    if adapts(parameter, group):
        decay = group["weight_decay"]
        weight_norm = norm(w)
        rate = rate * ratio(weight_norm, gradient_norm + decay * weight_norm, factor=group["trust"])
        g = g.add(w, alpha=decay)
    move = g * rate
    if group["momentum"] != 0:
        own = state[parameter]
        if not own:
            # Zeros, not the gradient: v is in units of the weights, and the gradient has not been scaled to them.
            own["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        kept = computing(own["momentum_buffer"])
        move = move.add_(kept, alpha=group["momentum"])
        own["momentum_buffer"].copy_(move)
    parameter.copy_(w - move)


def check_lars_settings(group: Mapping[str, Any], *, optimizer: str) -> None:
    check_not_negative(group["lr"], key="lr", optimizer=optimizer)
    check_fraction(group["momentum"], key="momentum", optimizer=optimizer)
    check_positive(group["trust"], key="trust", usual=0.001, optimizer=optimizer)
    check_not_negative(group["weight_decay"], key="weight_decay", optimizer=optimizer)
