"""How are the weights updated? Settings that follow the batch, AMP, clipping and its parts around the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.core.companions import Companions, Jump, StepScale
from orchestrator.errors import ConfigError, SessionError
from orchestrator.measure.parts import PartMeter
from orchestrator.optim import PartsOptimizer
from orchestrator.ports import Collective


@final
class WeightUpdate:
    """The settings found in ``optimizer``'s groups are the base that ``apply`` computes a step's from.

    ``parameters`` are the model's; ``trained`` those of them that the optimizer updates. An optimizer that takes the
    parts of a batch is given them; for any other nothing is collected. Raises ``ConfigError`` when a group lacks a
    setting that ``companions`` move.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        *,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
        device: torch.device,
        collective: Collective,
        base_batch: int,
        companions: Companions,
    ) -> None:
        self.scaler = scaler
        if scaler is not None:
            scaler.scale(torch.zeros((), device=device))  # makes its scale, also on a rank that has no loss to scale
        self.trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._max_grad_norm = max_grad_norm
        self._collective = collective
        self._parts: PartMeter | None = None
        if isinstance(optimizer, PartsOptimizer):
            self._parts = PartMeter(
                self.trained, of_part=optimizer.of_part, shape_of=optimizer.shape_of, degree=optimizer.degree
            )
        self._base_batch = base_batch
        self._companions = companions
        self._base = [_settings(group, companions, number) for number, group in enumerate(optimizer.param_groups)]
        self.lr = self.base_lr  # of the first parameter group, as last applied

    @property
    def base_lr(self) -> float:
        """Of the first parameter group, which stands for all where one number is shown."""
        lr: float = self._base[0]["lr"]
        return lr

    @property
    def loss_scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    @property
    def part_totals(self) -> list[Tensor]:
        """What the parts of a batch add to besides ``.grad``; empty for most optimizers."""
        return [] if self._parts is None else [self._parts.totals]

    def begin_step(self) -> None:
        if self._parts is not None:
            self._parts.begin_step()

    def part(self, *, share: float, loss_scale: float) -> AbstractContextManager[None]:
        """Around a micro-batch's backward pass; its ``share`` of the step's samples, and what its loss is times."""
        return nullcontext() if self._parts is None else self._parts.part(share=share, loss_scale=loss_scale)

    def apply(self, scale: StepScale) -> None:
        """Collective with an optimizer that takes the parts of a batch."""
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            settings = self._companions.settings(base, scale)
            if group is self._optimizer.param_groups[0]:
                self.lr = settings["lr"]
            for key, value in settings.items():
                if isinstance(group[key], Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        clipped: float | Tensor = 1.0
        if self._max_grad_norm is not None:
            clipped = _clip(self.trained, self._max_grad_norm)
        if isinstance(self._optimizer, PartsOptimizer) and self._parts is not None:
            self._collective.sum_tensor(self._parts.totals)
            self._optimizer.take_parts(self._parts.averages, grad_scale=clipped)
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()
        self.discard()

    def close(self) -> None:
        if self._parts is not None:
            self._parts.close()

    @torch.no_grad()
    def carry_over(self, jump: Jump) -> None:
        """Restate the optimizer's state for the new batch; to be called once, before the first step that has it."""
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            factors = self._companions.state_factors(base, jump, base_batch=self._base_batch)
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                for key in factors.keys() & state.keys():
                    if state[key] is not None:  # SGD's buffer before its first step
                        state[key] *= factors[key]
            if self._companions.moves_betas:
                # With the count, which is one of steps of these betas: the step to come is read before ``apply``.
                group["betas"] = self._companions.betas(base, jump.new_batch / self._base_batch)

    def discard(self) -> None:
        """Forget the gradients, also those of parameters that the optimizer does not know: they would pile up."""
        self._optimizer.zero_grad(set_to_none=True)
        for parameter in self._parameters:
            parameter.grad = None


def check_parts(config: RunConfig, optimizer: torch.optim.Optimizer) -> None:
    """Raises ``SessionError`` where only one of config and optimizer is about the parts of a batch."""
    part_samples, takes_parts = config.optimizer.part_samples, isinstance(optimizer, PartsOptimizer)
    if takes_parts and part_samples is None:
        raise SessionError(
            f"{type(optimizer).__name__} is told how the parts of a batch differ, and the config does not say how "
            "large a part is: write optimizer.part_samples, at most batch.micro_batch, with the optimizer's name in "
            "optimizer.name"
        )
    if part_samples is not None and not takes_parts:
        raise SessionError(
            f"optimizer.part_samples is {part_samples}, and {type(optimizer).__name__} does not ask for the parts of a "
            "batch: remove it, or derive the optimizer from orchestrator.optim.PartsOptimizer"
        )


def _clip(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale their gradients together, sparse ones too, to a norm of at most ``max_norm``; what they are times now."""
    sparse = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
    for parameter in sparse:
        assert parameter.grad is not None
        parameter.grad = parameter.grad.coalesce()  # a row used twice is held in two parts, and their sum counts
    if not sparse:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        return (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as the line before does
    gradients = [p.grad for p in parameters if p.grad is not None]
    values = [gradient.values() if gradient.is_sparse else gradient for gradient in gradients]
    factor = (max_norm / (nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for gradient in values:
        gradient.mul_(factor.to(gradient.device))
    return factor


def _settings(group: dict[str, Any], companions: Companions, number: int) -> dict[str, Any]:
    """The group's settings as they are now, as plain numbers."""
    missing = list(companions.missing(group))
    if missing:
        raise ConfigError(
            f"lr_rule asks that {', '.join(missing)} follow the batch, and parameter group {number} of the optimizer "
            "has no such setting: pass the optimizer that optimizer.name names, or take it out of lr_rule"
        )
    settings: dict[str, Any] = {
        key: float(group[key]) for key in ("lr", "momentum", "eps", "weight_decay") if key in group
    }
    if "betas" in group:
        settings["betas"] = tuple(map(float, group["betas"]))
    return settings
