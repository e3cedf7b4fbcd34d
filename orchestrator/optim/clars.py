"""CLARS: LARS that counts how long the gradients of a batch's parts are, not how long their mean is."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from orchestrator.optim.lars import check_lars_settings, move_by_trust
from orchestrator.optim.layers import norm
from orchestrator.optim.parts import PartsOptimizer


@final
class CLARS(PartsOptimizer):
    """Complete layer-wise adaptive rate scaling (Huo, Gu, Huang 2020, arXiv:2002.01576).

    Per layer, which is a parameter tensor w with mean gradient g and the gradients g_i of the batch's parts, of b_i
    samples each::

        n = sum b_i |g_i| / sum b_i
        q = trust |w| / (n + weight_decay |w|)
        v <- momentum v + lr q (g + weight_decay w),  v = 0 at first
        w <- w - v

    The paper was not at hand when this was written: that the norms are averaged, rather than the gradients, and that
    LARS is kept otherwise, is what is known of it; its parts are single samples, here they are ``part_samples`` long.
    What follows from the form above: n >= |g|, so that a step without momentum is never longer than that of LARS,
    and is that of LARS when the parts agree. Where they cancel (+1 and -1) q stays finite, while that of LARS grows
    without bound; so early steps, whose gradients are mostly noise, are short without a warm-up.

    ``n`` comes through ``take_parts``. Parameters of one dimension or none, ``lr`` and zeros are treated as in LARS.
    """

    per_element = False
    degree = 1

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
            check_lars_settings(group, optimizer="CLARS")

    def of_part(self, gradient: Tensor) -> Tensor:
        return norm(gradient)

    def _move(self, parameter: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]) -> None:
        move_by_trust(parameter, gradient, average, group, state=self.state)
