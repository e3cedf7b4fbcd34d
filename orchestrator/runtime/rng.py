"""Randomness that belongs to the samples: the same whichever rank computes them."""

from __future__ import annotations

import base64
from typing import final

import torch
from torch import Tensor

from orchestrator.core.cursor import mix

_COMPUTE = 0x636F6D70757465  # keeps this stream of seeds apart from the one that samples are read with


@final
class SampleRandomness:
    """Torch's generators: seeded from (seed, first position) while a micro-batch is computed, else the caller's own.

    What the caller's loop draws between micro-batches goes on as if nothing had been seeded. Not a context manager
    around a ``yield``: an iterator that is left behind half-way is ended by the garbage collector at any later time,
    and would then put an old state into the generators under whatever is drawing from them.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed ^ _COMPUTE
        self._device = device
        self._found: tuple[Tensor, Tensor | None] | None = None

    def begin(self, position: int) -> None:
        on_device = self._device.type == "cuda"
        if self._found is None:
            found_on_device = torch.cuda.get_rng_state(self._device) if on_device else None
            self._found = torch.default_generator.get_state(), found_on_device
        value = mix(self._seed, position)
        torch.default_generator.manual_seed(value)
        if on_device:
            torch.cuda.manual_seed(value)

    def end(self) -> None:
        """The generators as ``begin`` found them; nothing if they already are."""
        if self._found is not None:
            (found, found_on_device), self._found = self._found, None
            torch.default_generator.set_state(found)
            if found_on_device is not None:
                torch.cuda.set_rng_state(found_on_device, self._device)


def save_rng() -> str:
    """The CPU generator's state as text."""
    return base64.b64encode(torch.default_generator.get_state().numpy().tobytes()).decode("ascii")


def restore_rng(text: str) -> None:
    data = bytearray(base64.b64decode(text))
    torch.default_generator.set_state(torch.frombuffer(data, dtype=torch.uint8))
