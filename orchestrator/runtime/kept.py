"""All that training changes, kept as it was and put back: weights, buffers, the optimizer, AMP's scale, generators."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor, nn

from orchestrator.runtime.samples import keep_generators


@final
class Kept:
    """On the device where it lives, once; putting it back takes no more memory, and can be done again."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        device: torch.device,
    ) -> None:
        self._tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
        self._optimizer = optimizer
        self._state = {p: {key: _copied(value) for key, value in kept.items()} for p, kept in optimizer.state.items()}
        self._groups = [
            {key: _copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        self._scaler, self._scaler_state = scaler, {} if scaler is None else copy.deepcopy(scaler.state_dict())
        # What the user's own loop draws from.
        self._put_back_generators = keep_generators()
        self._device = device if device.type == "cuda" else None
        self._device_generator: Any = None if self._device is None else torch.cuda.get_rng_state(self._device)

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, kept in self._tensors:
            tensor.copy_(kept)
        for parameter in [p for p in self._optimizer.state if p not in self._state]:
            del self._optimizer.state[parameter]
        for parameter, state in self._state.items():
            _put(self._optimizer.state[parameter], state)
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            _put(group, settings, besides=("params",))
        if self._scaler is not None:
            self._scaler.load_state_dict(self._scaler_state)
        self._put_back_generators()
        if self._device is not None:
            torch.cuda.set_rng_state(self._device_generator, self._device)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _put(present: dict[str, Any], kept: dict[str, Any], *, besides: tuple[str, ...] = ()) -> None:
    """``kept`` into ``present``, in place where there is a tensor to put it into."""
    for key in [key for key in present if key not in kept and key not in besides]:
        del present[key]
    for key, value in kept.items():
        there = present.get(key)
        if isinstance(value, Tensor) and isinstance(there, Tensor) and there.shape == value.shape:
            there.copy_(value)
        else:
            present[key] = _copied(value)
