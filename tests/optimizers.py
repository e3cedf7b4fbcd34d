"""One small layer, and steps of it with any of the optimizers of ``orchestrator.optim``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.optim import OPTIMIZERS, PartsOptimizer
from orchestrator.registry import resolve

Array = np.ndarray[Any, np.dtype[np.float64]]
WEIGHTS = np.array([[0.5, -1.0, 2.0], [0.25, 3.0, -0.75]])
GRADIENTS = np.random.default_rng(0).normal(size=(4, 2, 3)) * np.array([1.0, 0.1, 10.0, 1.0])[:, None, None]
SETTINGS: dict[str, dict[str, Any]] = {
    "lars": {"momentum": 0.9, "trust": 0.02, "weight_decay": 0.1},
    "lamb": {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    "lans": {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    "clars": {"momentum": 0.9, "trust": 0.02, "weight_decay": 0.1},
    "vr_sgd": {"momentum": 0.9, "weight_decay": 0.1},
    "vr_adam": {"betas": (0.8, 0.95), "eps": 1e-3, "ratio_beta": 0.7, "weight_decay": 0.1},
    "vr_lamb": {"betas": (0.8, 0.95), "eps": 1e-3, "ratio_beta": 0.7, "weight_decay": 0.1},
}


def layer(values: Any = WEIGHTS, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def make(name: str, parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return named(name)(parameters, **{"lr": 0.1, **SETTINGS.get(name, {}), **settings})


def named(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer's class or factory, built in or ``module:attribute``."""
    found: Callable[..., torch.optim.Optimizer] = resolve(name, OPTIMIZERS, kind="optimizer")
    return found


def parts_of(gradient: Tensor) -> list[Tensor]:
    """Four parts with this mean, which agree less on the later elements."""
    spread = torch.linspace(0.5, 2.5, gradient.numel(), dtype=gradient.dtype).reshape(gradient.shape)
    return [gradient * (1 + sign * spread) for sign in (-1, 1, 0.5, -0.5)]


def moved(w: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: Any, parts: Any = None) -> Tensor:
    """By how much one step moves ``w``; ``parts`` are gradients of equal parts, with ``gradient`` for their mean."""
    before = w.detach().clone()
    w.grad = torch.as_tensor(gradient, dtype=w.dtype)
    if isinstance(optimizer, PartsOptimizer):
        parts = parts_of(w.grad) if parts is None else [torch.as_tensor(part, dtype=w.dtype) for part in parts]
        optimizer.take_parts({w: sum(optimizer.of_part(part) for part in parts) / len(parts)})
    optimizer.step()
    return before - w.detach()
