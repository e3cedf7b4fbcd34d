"""A placement group for each worker, so that Ray gets back what a worker had when it goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, final

import ray
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group


@final
class Slots(PlacementGroupHandle):
    """What Ray Train holds in the place of the one placement group of all its workers."""

    def __init__(self, groups: Sequence[PlacementGroup]) -> None:
        self.groups = list(groups)
        self._changing = threading.Lock()  # newcomers are started in a thread of their own

    @staticmethod
    def asked(
        number: int, *, resources: dict[str, float], strategy: str, selectors: list[dict[str, str]] | None = None
    ) -> Slots:
        """So many, each with these ``resources``; they are there once ``wait`` says so."""
        return Slots(
            [
                placement_group(
                    [resources], strategy=strategy, bundle_label_selector=selectors[i : i + 1] if selectors else None
                )
                for i in range(number)
            ]
        )

    @property
    def placement_group(self) -> PlacementGroup:
        """The first, for those who take it for the one of all."""
        return self.groups[0]

    def ready(self) -> Any:
        return self.groups[0].ready()

    def wait(self, timeout_seconds: float = 30) -> bool:
        end_s = time.monotonic() + timeout_seconds
        waiting = [group.ready() for group in self.groups]
        there, _ = ray.wait(waiting, num_returns=len(waiting), timeout=max(0.0, end_s - time.monotonic()))
        return len(there) == len(waiting)

    def add(self, more: Slots) -> None:
        with self._changing:
            self.groups += more.groups

    def give_back(self, group: PlacementGroup) -> None:
        """One whose worker has gone."""
        with self._changing:
            self.groups = [one for one in self.groups if one.id != group.id]
        remove_placement_group(group)

    def shutdown(self) -> None:
        with self._changing:
            groups, self.groups = self.groups, []
        for group in groups:
            remove_placement_group(group)
