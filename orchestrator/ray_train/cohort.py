"""Newcomers on their way: started in a thread, while the others train and Ray Train's control loop goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol, final

from ray.train.v2._internal.execution.worker_group.worker import Worker as RayWorker

from orchestrator.ray_train.asking import dead, standings
from orchestrator.ray_train.slots import Slots


class StartsBeside(Protocol):
    """The group that newcomers are for."""

    def start_beside(self, slots: Slots) -> list[RayWorker]: ...

    def get_worker_group_context(self) -> Any: ...


@final
class Cohort:
    """``workers`` are there once they were started; ``problem`` says why they will not be."""

    def __init__(self, group: StartsBeside, number: int, *, timeout_s: float) -> None:
        self.workers: list[RayWorker] = []
        self.problem: str | None = None
        self._group = group
        self._timeout_s = timeout_s
        self._started = False
        context = group.get_worker_group_context()
        self._slots = Slots.asked(
            number, resources=context.resources_per_worker, strategy=context.placement_strategy
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="groundswell-newcomers", daemon=True)
        self._thread.start()

    def is_ready(self) -> bool:
        """Whether all have warmed up."""
        if not self._started:
            return False
        found = standings(self.workers)
        if any(one is None for one in found.values()) and dead(self.workers):
            self.problem = "one of them died"
        return all(one is not None and one.ready for one in found.values())

    def is_over(self, *, trains: Sequence[RayWorker]) -> bool:
        """Whether all are among those who train now; not while they are being started."""
        if self._started:
            self.workers = [worker for worker in self.workers if worker not in trains]
        return self._started and not self.workers

    def give_back(self) -> None:
        """What was reserved for those that were never started."""
        if not self._started:
            self._slots.shutdown()

    def _run(self) -> None:
        try:
            if not self._slots.wait(self._timeout_s):
                self._slots.shutdown()
                self.problem = f"their resources were not there within {self._timeout_s:.0f} s"
                return
            self.workers = self._group.start_beside(self._slots)
            self._started = True
        except Exception as error:  # the control loop hears of it at its next look
            self.problem = f"{type(error).__name__}: {error}"
