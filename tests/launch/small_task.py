"""A task that is quick to load and as slow, or as broken, as a test wants; ``tests.launch.small_task:make``."""

from __future__ import annotations

import os
import time
from typing import Any

from torch import Tensor, nn

from tests import support


class SmallTask:
    """``loss`` sleeps from call ``sleep_from`` on, and fails in the calls ``bug_at`` and ``nan_at``.

    Where a file ``sleep_while`` is named, it sleeps for as long as that is there.
    """

    def __init__(
        self,
        *,
        size: int,
        sleep_s: float,
        sleep_from: int,
        sleep_while: str | None,
        bug_at: int | None,
        nan_at: int | None,
    ) -> None:
        self.train_set = support.blobs(size)
        self.eval_set = support.blobs(32, seed=3)
        self._sleep_s, self._sleep_from = sleep_s, sleep_from
        self._sleep_while = sleep_while
        self._bug_at, self._nan_at = bug_at, nan_at
        self._calls = 0

    def model(self) -> nn.Module:
        return support.mlp()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self._calls += 1
        if self._calls >= self._sleep_from and (self._sleep_while is None or os.path.exists(self._sleep_while)):
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
    sleep_while: str | None = None,
    bug_at: int | None = None,
    nan_at: int | None = None,
) -> SmallTask:
    return SmallTask(
        size=size, sleep_s=sleep_s, sleep_from=sleep_from, sleep_while=sleep_while, bug_at=bug_at, nan_at=nan_at
    )
