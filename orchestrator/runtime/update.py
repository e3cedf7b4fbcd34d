"""How are the weights updated? Learning rates, AMP scaling and clipping around the user's own optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn


@final
class WeightUpdate:
    """The learning rates found in ``optimizer`` are the base that ``apply`` multiplies.

    ``parameters`` are the model's; ``trained`` those of them that the optimizer updates.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        *,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
        device: torch.device,
    ) -> None:
        self.scaler = scaler
        if scaler is not None:
            scaler.scale(torch.zeros((), device=device))  # makes its scale, also on a rank that has no loss to scale
        self.trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._max_grad_norm = max_grad_norm
        self._base_lrs = [float(group["lr"]) for group in optimizer.param_groups]

    @property
    def base_lr(self) -> float:
        """Of the first parameter group, which stands for all where one number is shown."""
        return self._base_lrs[0]

    @property
    def loss_scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def apply(self, lr_factor: float) -> None:
        for group, base in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * lr_factor)
            else:
                group["lr"] = base * lr_factor
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self._max_grad_norm)
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients, also those of parameters that the optimizer does not know: they would pile up."""
        self._optimizer.zero_grad(set_to_none=True)
        for parameter in self._parameters:
            parameter.grad = None
