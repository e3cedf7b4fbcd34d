"""An average of the weights that fades by half over a number of samples, kept beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from orchestrator.core.companions import ema_weight
from orchestrator.errors import SessionError


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are known by another one too, and under which they are averaged."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: known for name, p in named if (known := first.setdefault(id(p), name)) != name}


@final
class EmaWeights:
    """Averages the model's parameters, in float32 at least; buffers are not averaged, and stay the model's own.

    Every rank computes it from the weights that all have alike, so it is alike on all.
    """

    def __init__(self, model: nn.Module, *, half_life_samples: int) -> None:
        self._half_life_samples = half_life_samples
        self._parameters = dict(model.named_parameters())
        self._in_use = False
        # bfloat16 would lose what a single step adds.
        self.tensors: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, batch: int, *, samples_seen: int) -> None:
        """Take in the weights after a step of ``batch`` samples, at which ``samples_seen`` were seen in all."""
        weight = ema_weight(batch, samples_seen=samples_seen, half_life_samples=self._half_life_samples)
        for name, average in self.tensors.items():
            average.lerp_(self._parameters[name].to(average.dtype), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again afterwards, bit for bit."""
        if self._in_use:
            raise SessionError("the averaged weights are in the model already: ema_weights() cannot be nested")
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._in_use = True
        try:
            self._copy(self.tensors)
            yield
        finally:
            self._copy(own)
            self._in_use = False

    def check_not_in_place(self) -> None:
        """Raises ``SessionError`` inside ``in_place``, where nothing may train or be saved."""
        if self._in_use:
            raise SessionError(
                "the model has its averaged weights: evaluate within ema_weights(), and train after it has ended"
            )

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
