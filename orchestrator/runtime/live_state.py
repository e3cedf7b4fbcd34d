"""All that training changes, sent from one rank to the others over the network: weights, buffers, optimizer, averages.

Tensors travel in few large messages, those of a kind together; the rest, which is small, as one Python value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

import torch
from torch import Tensor

from orchestrator.ports import Collective
from orchestrator.runtime.trained import Trained

_MESSAGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """Stands for a tensor in what travels as a value."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str  # its type: Adam counts its steps on the host, wherever the weights are


@final
class LiveState:
    def __init__(
        self,
        *,
        trained: Trained,
        device: torch.device,
        collective: Collective,
    ) -> None:
        self._trained = trained
        self._device = device
        self._collective = collective

    @torch.no_grad()
    def spread(self, *, source: int, behind: bool) -> None:
        """Collective. Every rank that is ``behind`` gets the state of the rank ``source``; the others keep theirs."""
        gives = self._collective.rank == source
        tensors: list[Tensor] = []
        outline = self._collective.share(_outlined(self._tree(), tensors) if gives else None, source=source)
        slots = sorted(_slots(outline), key=lambda slot: slot.number)
        received: dict[int, Tensor] = {}
        for together in _messages(slots):
            if gives:
                message = torch.cat([tensors[slot.number].detach().to(self._device).reshape(-1) for slot in together])
            else:
                size = sum(torch.Size(slot.shape).numel() for slot in together)
                message = torch.empty(size, dtype=together[0].dtype, device=self._device)
            self._collective.broadcast(message, source=source)
            if behind:
                parts = message.split([torch.Size(slot.shape).numel() for slot in together])
                for slot, part in zip(together, parts, strict=True):
                    received[slot.number] = part.reshape(slot.shape).to(slot.device)
        if behind:
            self._load(_filled(outline, received))

    def _tree(self) -> dict[str, Any]:
        trained = self._trained
        return {
            "model": trained.model.state_dict(),
            "optimizer": trained.optimizer.state_dict(),
            "scaler": None if trained.scaler is None else trained.scaler.state_dict(),
            "ema": trained.ema,
        }

    def _load(self, tree: Mapping[str, Any]) -> None:
        trained = self._trained
        trained.model.load_state_dict(tree["model"])
        trained.optimizer.load_state_dict(tree["optimizer"])
        if trained.scaler is not None:
            trained.scaler.load_state_dict(tree["scaler"])
        if trained.ema is not None:
            for name, average in trained.ema.items():
                average.copy_(tree["ema"][name])


def _outlined(tree: Any, tensors: list[Tensor]) -> Any:
    """``tree`` with a slot for each tensor, which is put into ``tensors``."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return _Slot(
            number=len(tensors) - 1, shape=tuple(tree.shape), dtype=tree.dtype, device=tree.device.type
        )  # fmt: skip
    if isinstance(tree, Mapping):
        return {key: _outlined(value, tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_outlined(value, tensors) for value in tree)
    return tree


def _slots(outline: Any) -> Iterator[_Slot]:
    if isinstance(outline, _Slot):
        yield outline
    elif isinstance(outline, (dict, list, tuple)):
        for value in outline.values() if isinstance(outline, dict) else outline:
            yield from _slots(value)


def _filled(outline: Any, tensors: Mapping[int, Tensor]) -> Any:
    if isinstance(outline, _Slot):
        return tensors[outline.number]
    if isinstance(outline, dict):
        return {key: _filled(value, tensors) for key, value in outline.items()}
    if isinstance(outline, (list, tuple)):
        return type(outline)(_filled(value, tensors) for value in outline)
    return outline


def _messages(slots: list[_Slot]) -> Iterator[list[_Slot]]:
    """Slots of one dtype, together no larger than a message unless it is one alone."""
    by_dtype = sorted(slots, key=lambda slot: str(slot.dtype))
    for _, alike in groupby(by_dtype, key=lambda slot: slot.dtype):
        together: list[_Slot] = []
        held = 0
        for slot in alike:
            size = torch.Size(slot.shape).numel() * slot.dtype.itemsize
            if together and held + size > _MESSAGE_BYTES:
                yield together
                together, held = [], 0
            together.append(slot)
            held += size
        if together:
            yield together
