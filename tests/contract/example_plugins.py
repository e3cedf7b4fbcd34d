"""A policy, a rule, an estimator and an optimizer of one's own, each in a few lines; and one of each that breaks a
promise."""

from __future__ import annotations

import math
from typing import Any

import torch

from orchestrator.core.lr_rules import Rule
from orchestrator.core.policies import PolicySettings
from orchestrator.core.policy_inputs import Policy, PolicyInputs, keep
from orchestrator.measure.meter import Estimator
from orchestrator.measure.micro_batch import GradMeter
from orchestrator.types import Decision


def half(settings: PolicySettings) -> Policy:
    """Half of ``kappa`` x the noise scale, and only when that is surely more than the batch."""

    def propose(inputs: PolicyInputs) -> Decision:
        stats = inputs.stats
        if not stats.bounded or stats.low is None or settings.kappa * stats.low / 2 <= inputs.batch:
            return keep(inputs, "it is not surely too small")
        return Decision(target_batch=int(min(settings.kappa * stats.low / 2, 1e18)), reason="half the noise scale")

    return propose


def cube_root(exponent: float | None) -> Rule:
    def factor(ratio: float, *, noise_scale: float | None, base_batch: int) -> float:
        return math.pow(ratio, 1 / 3)

    return factor


def plain() -> Estimator:
    return Estimator(build=lambda model, parameters, settings: GradMeter(parameters))


class SignSGD(torch.optim.Optimizer):
    """Moves every weight by lr, against the sign of its gradient."""

    def __init__(self, params: Any, *, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad.sign())
        return loss


def bold(settings: PolicySettings) -> Policy:
    """Grows on noise alone."""
    return lambda inputs: Decision(target_batch=2 * inputs.batch, reason="more is more")


def beyond(exponent: float | None) -> Rule:
    """Faster than the batch."""
    return lambda ratio, *, noise_scale, base_batch: ratio * ratio


def doubled() -> Estimator:
    """Counts every micro-batch twice."""
    return Estimator(build=lambda model, parameters, settings: _Doubled(parameters))


class _Doubled(GradMeter):  # type: ignore[misc]  # it is final, and this is what comes of it
    def end_micro_batch(self, *, size: int, loss: torch.Tensor, loss_scale: float) -> None:
        super().end_micro_batch(size=2 * size, loss=loss, loss_scale=loss_scale)


class Tidy(SignSGD):
    """Sweeps the gradients up."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.zero_grad()
        return loss
