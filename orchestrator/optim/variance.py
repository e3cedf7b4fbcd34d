"""Variance reduced gradient descent: how far is each element of a gradient to be believed, by how its parts differ?

Jiang et al. 2023, arXiv:2309.13681. Of k parts with gradients g_d and mean g, element by element::

    variance = mean of g_d^2 - g^2
    r = g^2 / variance, divided by its mean over the layer, held within [ratio_floor, 1]

and r g is taken in the place of g: elements on which the parts agree less than is usual in their layer move less, down
to ``ratio_floor`` of the way. A layer is a parameter tensor. Parts of different sizes count by their samples.

What the formula leaves open is settled thus. The gradient is known to the precision of its type, so a variance is taken
to be at least 8 of its epsilons of the mean square; parts that agree exactly then have the same r everywhere, which is
1 after the division. One part alone is that case: r is 1, and the optimizer the plain one. An element that is zero in
every part says nothing: its r is 1, and it is left out of the layer's mean.

r depends on how many parts there are: without any signal, before the division, its expectation is 1 / (k - 3) for k
parts of Gaussian gradients, and its spread falls with k as well. A batch that grows at equal parts has more of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.optim.layers import check_fraction, computing
from orchestrator.optim.parts import PartsOptimizer


class VarianceReducing(PartsOptimizer):
    """What the VR optimizers ask of the parts: their squares, element by element."""

    per_element = True
    degree = 2

    def of_part(self, gradient: Tensor) -> Tensor:
        return gradient.double().square()


def signal_to_noise(gradient: Tensor, mean_square: Tensor) -> Tensor:
    """g^2 / variance of each element, float64; 0 where ``mean_square``, the parts' average of g_d^2, is 0."""
    square = gradient.double().square()
    resolution = 8 * torch.finfo(gradient.dtype).eps
    noise = torch.maximum(mean_square - square, resolution * mean_square)
    return torch.where(noise > 0, square / torch.where(noise > 0, noise, 1.0), 0.0)


def belief(gradient: Tensor, mean_square: Tensor, *, floor: float) -> Tensor:
    """r, between ``floor`` and 1, in the precision that the update is computed in; of the gradient's shape."""
    ratio = signal_to_noise(gradient, mean_square)
    heard = mean_square > 0
    mean = ratio.sum() / heard.sum().clamp(min=1)  # where nothing is heard the ratio is 0
    scaled = ratio / torch.where(mean > 0, mean, 1.0)
    return torch.where(heard, scaled.clamp(floor, 1.0), 1.0).to(computing(gradient).dtype)


def averaged_belief(state: dict[str, Any], parameter: Tensor, belief: Tensor, *, beta: float) -> Tensor:
    """The bias-corrected average of ``belief`` over the steps; called before Adam's moments count the step."""
    if beta == 0:
        return belief
    # What is kept is the average of r - 1, which bias correction makes the average of r less 1. So a state of zeros
    # means that nothing was ever doubted, as it must for a step with no gradient at all.
    if "exp_avg_ratio_less_one" not in state:
        state["exp_avg_ratio_less_one"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    kept = computing(state["exp_avg_ratio_less_one"]).lerp_(belief - 1, 1 - beta)
    state["exp_avg_ratio_less_one"].copy_(kept)
    steps = 1 + (state["step"].double() if "step" in state else 0)
    return 1 + kept / (1 - beta**steps)


def check_ratio_settings(group: Mapping[str, Any], *, optimizer: str) -> None:
    floor = group["ratio_floor"]
    if not 0.0 < floor <= 1.0:
        raise ValueError(f"{optimizer}: ratio_floor is {floor} and must be above 0 and at most 1; 0.1 is usual")
    if "ratio_beta" in group:
        check_fraction(group["ratio_beta"], key="ratio_beta", optimizer=optimizer)
