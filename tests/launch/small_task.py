"""A task that is quick to load and as slow, or as broken, as a test wants; ``tests.launch.small_task:make``."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn

from tests import support


class SmallTask:
    """``loss`` sleeps from call ``sleep_from`` on, and fails in the calls ``bug_at`` and ``nan_at``."""

    def __init__(self, *, size: int, sleep_s: float, sleep_from: int, bug_at: int | None, nan_at: int | None) -> None:
        self.train_set = support.blobs(size)
        self.eval_set = support.blobs(32, seed=3)
        self._sleep_s, self._sleep_from = sleep_s, sleep_from
        self._bug_at, self._nan_at = bug_at, nan_at
        self._calls = 0

    def model(self) -> nn.Module:
        return support.mlp()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self._calls += 1
        if self._calls >= self._sleep_from:
            time.sleep(self._sleep_s)
        if self._calls == self._bug_at:
            raise KeyError("a bug in the user's task")
        loss = support.cross_entropy(model, batch)
        return loss * float("nan") if self._calls == self._nan_at else loss

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        return {"loss": float(support.cross_entropy(model, batch))}


def make(
    *,
    size: int = 256,
    sleep_s: float = 0.0,
    sleep_from: int = 0,
    bug_at: int | None = None,
    nan_at: int | None = None,
) -> SmallTask:
    return SmallTask(size=size, sleep_s=sleep_s, sleep_from=sleep_from, bug_at=bug_at, nan_at=nan_at)
