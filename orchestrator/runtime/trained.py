"""What training changes, and a checkpoint or another rank must therefore be given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    model: nn.Module  # as the user gave it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    ema: Mapping[str, Tensor] | None  # averaged weights by name
