"""VR-Adam and VR-LAMB: their moments are of a gradient that is doubted where the parts of a batch disagree."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from orchestrator.optim.lamb import move_by_own_norm
from orchestrator.optim.layers import adam_moments, check_adam_settings, computing
from orchestrator.optim.variance import VarianceReducing, averaged_belief, belief, check_ratio_settings


@final
class VRAdam(VarianceReducing):
    """Variance reduced Adam (Jiang et al. 2023, arXiv:2309.13681), with the r of ``orchestrator.optim.variance``.

    Per parameter w with mean gradient g, at its step t = 1, 2, ...::

        p <- ratio_beta p + (1 - ratio_beta) r,      h = p / (1 - ratio_beta^t) g
        m <- beta1 m + (1 - beta1) h,                v <- beta2 v + (1 - beta2) h^2
        w <- w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) - lr weight_decay w

    That r is averaged is the paper's; how p is corrected is taken from Adam's own averages. The decay is that of
    AdamW, apart from the gradient, so that r is not applied to it; every parameter is decayed, those of one dimension
    too. The parts come through ``take_parts``.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ratio_floor: float = 0.1,
        ratio_beta: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "ratio_floor": ratio_floor,
            "ratio_beta": ratio_beta,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_adam_settings(group, optimizer="VRAdam")
            check_ratio_settings(group, optimizer="VRAdam")

    def _move(self, parameter: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]) -> None:
        w, state = computing(parameter), self.state[parameter]
        mean, scale = adam_moments(state, parameter, _believed(state, parameter, gradient, average, group), group)
        update = mean.div_(scale).add_(w, alpha=group["weight_decay"])
        parameter.copy_(w - update * group["lr"])


@final
class VRLAMB(VarianceReducing):
    """Variance reduced LAMB (Jiang et al. 2023, arXiv:2309.13681): ``LAMB`` with the h of ``VRAdam`` for its gradient.

    Parameters of one dimension or none get neither decay nor the ratio of norms, as in ``LAMB``; r is applied to all.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        ratio_floor: float = 0.1,
        ratio_beta: float = 0.9,
        weight_decay: float = 0.01,
        adapt_one_dimensional: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "ratio_floor": ratio_floor,
            "ratio_beta": ratio_beta,
            "weight_decay": weight_decay,
            "adapt_one_dimensional": adapt_one_dimensional,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_adam_settings(group, optimizer="VRLAMB")
            check_ratio_settings(group, optimizer="VRLAMB")

    def _move(self, parameter: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        move_by_own_norm(parameter, _believed(state, parameter, gradient, average, group), group, state=state)


def _believed(
    state: dict[str, Any], parameter: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]
) -> Tensor:
    """h."""
    ratio = belief(gradient, average, floor=group["ratio_floor"])
    return averaged_belief(state, parameter, ratio, beta=group["ratio_beta"]) * computing(gradient)
