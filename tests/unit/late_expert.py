"""A model with a layer that is never used and one that is first used late in the run, and a loop that trains it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.optim import VRAdam
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp

STEPS = 8
FIRST_USED = 5  # the step from which on the expert is asked
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "vr_adam": lambda p: VRAdam(p, lr=0.01),
}


class LostError(Exception):
    pass


class LateExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.expert, self.unused = mlp(), nn.Linear(20, 4), nn.Linear(3, 3)
        self.asks_expert = False

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.body(inputs)
        return found + self.expert(inputs) if self.asks_expert else found


def trained(rank: int, place: str, name: str, saved_at: int, lost: bool, resume: bool) -> dict[str, list[float]]:
    """All weights, and the optimizer's state of each parameter that has any. ``saved_at`` is the step of a checkpoint,
    after which a run that is ``lost`` takes one step more."""
    parts = {"part_samples": 8} if name.startswith("vr_") else {}
    settings = config(
        place,
        train={"samples": STEPS * 32, "find_unused_parameters": True},
        checkpoint={"every_samples": saved_at * 32},
        optimizer={"name": name, "lr": 0.01, "momentum": 0.9 if "sgd" in name else None, **parts},
    )
    model = LateExpert()
    optimizer = MAKERS[name](model.parameters())
    session = Session(settings, model=model, optimizer=optimizer, dataset=blobs(), resume=resume)
    with contextlib.suppress(LostError), session:
        for step in session:
            if lost and session.step_number == saved_at + 1:  # on all ranks, which a request to stop would not be
                raise LostError
            model.asks_expert = session.step_number >= FIRST_USED
            for batch in step:
                session.backward(cross_entropy(session.model, batch))
            session.step()
    found: dict[str, list[float]] = {}
    for key, parameter in model.named_parameters():
        found[key] = parameter.flatten().tolist()
        for kind, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}.{kind}"] = value.flatten().tolist()
    return found
