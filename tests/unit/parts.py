"""Training by hand with explicit gradients of parts, as an oracle for what a session does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from orchestrator.config import RunConfig
from orchestrator.core.cursor import Stream
from orchestrator.optim import OPTIMIZERS, PartsOptimizer
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp

PARTS = tuple(name for name, kind in OPTIMIZERS.items() if issubclass(kind, PartsOptimizer))
BATCH, PART, STEPS = 30, 8, 6  # parts of 8, 8, 8 and 6
LR = {"clars": 20.0, "vr_sgd": 0.5, "vr_adam": 0.02, "vr_lamb": 0.02}


def data() -> TensorDataset:
    inputs, labels = blobs(120).tensors
    return TensorDataset(inputs.double(), labels)


def settings(path: Path | str, name: str, **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "train": {"samples": STEPS * BATCH},
        "batch": {"initial": BATCH, "micro_batch": 16, "max": BATCH},  # larger than a part: it must not matter
        "optimizer": {"name": name, "lr": LR[name], "momentum": None, "part_samples": PART},
    }
    return config(path, **{key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}})


def optimizer_of(given: RunConfig, parameters: Iterable[nn.Parameter]) -> PartsOptimizer:
    made = OPTIMIZERS[given.optimizer.name](list(parameters), **given.optimizer.settings())
    assert isinstance(made, PartsOptimizer)
    return made


def by_session(given: RunConfig, *, resume: bool = False, spoiled_step: int | None = None, **more: Any) -> list[Tensor]:
    """The weights after a run in float64; the loss of ``spoiled_step`` is infinite."""
    model = mlp().double()
    optimizer = optimizer_of(given, model.parameters())
    with Session(given, model=model, optimizer=optimizer, dataset=data(), resume=resume, **more) as session:
        for step in session:
            for samples in step:
                factor = float("inf") if session.step_number == spoiled_step else 1.0
                session.backward(cross_entropy(session.model, samples) * factor)
            session.step()
    return [p.detach().clone() for p in model.parameters()]


def by_hand(
    given: RunConfig,
    *,
    sizes: tuple[int, ...] = (8, 8, 8, 6),
    clip: Callable[[list[Tensor]], float] = lambda gradients: 1.0,
    without_step: int | None = None,
) -> list[Tensor]:
    """The same from gradients of every part by itself, which are kept and averaged in the open."""
    model = mlp().double()
    parameters = list(model.parameters())
    optimizer = optimizer_of(given, parameters)
    inputs, labels = data().tensors
    order = torch.as_tensor(Stream(size=len(inputs), seed=0).indices(np.arange(STEPS * sum(sizes))))
    for number, step in enumerate(order.split(sum(sizes))):
        if number == without_step:
            continue
        parts = []
        for part in step.split(list(sizes)):
            loss = cross_entropy(model, (inputs[part], labels[part]))
            parts.append(torch.autograd.grad(loss, parameters))
        shares = [size / sum(sizes) for size in sizes]
        means = [sum(share * g for share, g in zip(shares, own, strict=True)) for own in zip(*parts, strict=True)]
        factor = clip(means)
        averages = {}
        for p, mean, own in zip(parameters, means, zip(*parts, strict=True), strict=True):
            p.grad = mean * factor
            # Of the clipped gradients: what the parts would have been, had they been clipped alike.
            averages[p] = sum(share * optimizer.of_part(g * factor) for share, g in zip(shares, own, strict=True))
        optimizer.take_parts(averages)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def furthest(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))
