"""In which precision is the loss computed? The same whether a model is trained, evaluated or only measured."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from orchestrator.config import RunConfig


def precision(config: RunConfig, device: torch.device) -> Any:
    """The autocast context that ``train.precision`` asks for."""
    if config.train.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
