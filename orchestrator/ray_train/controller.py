"""Ray Train's controller with a worker group that changes while it trains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import ray.train.v2.api.data_parallel_trainer as seat
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.controller import TrainController

from orchestrator.ray_train.live_group import LiveWorkerGroup
from orchestrator.ray_train.policy import AdaptiveScalingPolicy
from orchestrator.ray_train.preemption import PreemptionWatch

_LOOK_EVERY_S = 0.02


class Controller(TrainController):
    """Ray Train's, without the two processes that it starts for every worker group, and again where that changes.

    One hands out shards of Ray data sets, which are none here; the other watches for notices, which this process does.
    """

    _worker_group_callbacks_to_propagate: list[Any]

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._worker_group_callbacks_to_propagate = [
            PreemptionWatch() if isinstance(callback, PreemptionCallback) else callback
            for callback in self._worker_group_callbacks_to_propagate
            if not (isinstance(callback, DatasetsCallback) and not callback._datasets)
        ]


@final
class LiveController(Controller):
    worker_group_cls = LiveWorkerGroup
    _latest_poll_time: float

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> None:
        super()._start_worker_group(num_workers, resources_per_worker)
        assert isinstance(self._scaling_policy, AdaptiveScalingPolicy)
        assert isinstance(self._worker_group, LiveWorkerGroup)
        self._scaling_policy.attach(self._worker_group)

    async def _poll_workers(self) -> Any:
        """At the usual interval, or as soon as something is wrong."""
        group = self._worker_group
        assert isinstance(group, LiveWorkerGroup)
        while True:
            soon_s = group.looks_every_s
            usual_s = self._health_check_interval_s
            if time.monotonic() >= self._latest_poll_time + (usual_s if soon_s is None else min(soon_s, usual_s)):
                break
            await asyncio.sleep(_LOOK_EVERY_S)
        self._latest_poll_time = float("-inf")
        return await super()._poll_workers()


@final
class _Backend(_TorchBackend):
    """Workers form their process groups themselves, the first like all later ones."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if isinstance(worker_group, LiveWorkerGroup):
            worker_group.open()


@final
@dataclass
class LiveTorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


@contextmanager
def in_the_seat(controller: type[Controller]) -> Iterator[None]:
    """Ray Train names its controller's class within a function; meanwhile that name means ours."""
    usual = seat.TrainController
    seat.TrainController = controller
    try:
        yield
    finally:
        seat.TrainController = usual
