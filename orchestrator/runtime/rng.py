"""Randomness that belongs to the samples: the same whichever rank computes them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orchestrator.core.cursor import mix

_COMPUTE = 0x636F6D70757465  # keeps this stream of seeds apart from the one that samples are read with


@contextmanager
def seeded(seed: int, position: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded from (seed, first position) inside, and as they were found after."""
    value = mix(seed ^ _COMPUTE, position)
    found = torch.default_generator.get_state()
    found_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
    try:
        yield
    finally:
        torch.default_generator.set_state(found)
        if found_device is not None:
            torch.cuda.set_rng_state(found_device, device)


def save_rng() -> str:
    """The CPU generator's state as text."""
    return base64.b64encode(torch.default_generator.get_state().numpy().tobytes()).decode("ascii")


def restore_rng(text: str) -> None:
    data = bytearray(base64.b64decode(text))
    torch.default_generator.set_state(torch.frombuffer(data, dtype=torch.uint8))
