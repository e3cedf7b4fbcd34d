"""VR-SGD: SGD that doubts the elements of the gradient on which the parts of a batch disagree."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from orchestrator.optim.layers import check_fraction, check_not_negative, computing
from orchestrator.optim.variance import VarianceReducing, belief, check_ratio_settings


@final
class VRSGD(VarianceReducing):
    """Variance reduced SGD (Jiang et al. 2023, arXiv:2309.13681), with the r of ``orchestrator.optim.variance``.

    Per parameter w with mean gradient g::

        v <- momentum v + r g + weight_decay w,  v = 0 at first
        w <- w - lr v

    as ``torch.optim.SGD`` moves with r g for its gradient: every parameter is decayed, those of one dimension too. The
    decay is certain, and r is not applied to it. The parts come through ``take_parts``.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        momentum: float = 0.0,
        ratio_floor: float = 0.1,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "ratio_floor": ratio_floor, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_not_negative(group["lr"], key="lr", optimizer="VRSGD")
            check_fraction(group["momentum"], key="momentum", optimizer="VRSGD")
            check_not_negative(group["weight_decay"], key="weight_decay", optimizer="VRSGD")
            check_ratio_settings(group, optimizer="VRSGD")

    def _move(self, parameter: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]) -> None:
        w, g = computing(parameter), computing(gradient)
        move = belief(gradient, average, floor=group["ratio_floor"]).mul_(g).add_(w, alpha=group["weight_decay"])
        if group["momentum"] != 0:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            move.add_(computing(state["momentum_buffer"]), alpha=group["momentum"])
            state["momentum_buffer"].copy_(move)
        parameter.copy_(w - move * group["lr"])
