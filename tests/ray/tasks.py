"""Tasks for tests: slow enough to be interrupted, and telling which processes train them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support import blobs, mlp


class SlowToSave(nn.Module):
    """A layer without weights whose state takes ``seconds`` to collect on every rank but the first."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def get_extra_state(self) -> Tensor:
        if dist.is_initialized() and dist.get_rank() > 0:
            time.sleep(self.seconds)
        return torch.zeros(1)

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return x


class Slow:
    """Classifies blobs, taking ``step_s`` for each micro-batch; writes its process ids into ``pids``."""

    def __init__(self, *, size: int, step_s: float, pids: str, slow_save_s: float) -> None:
        self.train_set, self.eval_set = blobs(size), blobs(64, seed=9)
        self.step_s, self.pids, self.slow_save_s = step_s, Path(pids), slow_save_s
        self.rank = -1

    def model(self) -> nn.Module:
        return nn.Sequential(mlp(), SlowToSave(self.slow_save_s))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(self.step_s)
        if dist.is_initialized() and dist.get_rank() != self.rank:  # a rehearsal has none
            self.rank = dist.get_rank()
            (self.pids / str(self.rank)).write_text(str(os.getpid()))
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        inputs, labels = batch
        return {"accuracy": (model(inputs).argmax(1) == labels).float().mean()}


def slow(size: int = 400, step_s: float = 0.02, pids: str = ".", slow_save_s: float = 0.0) -> Slow:
    return Slow(size=size, step_s=step_s, pids=pids, slow_save_s=slow_save_s)
