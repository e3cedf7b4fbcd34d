"""Ray Train's watch over notices that nodes are given, in the controller's own process.

Ray starts it as an actor on any node, where it keeps that one busy: an autoscaler would never take it back, used or
not. It is also started anew whenever the workers change, which would take a second of the processor each time, just
when training waits for as little as possible.
"""

from __future__ import annotations

from typing import Any, final

from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.preemption import PreemptionWatcher


@final
class PreemptionWatch(PreemptionCallback):
    _watcher: PreemptionWatcher | None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._stop_watcher()
        ranks: dict[str, list[int]] = {}
        actors = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            actors[rank] = worker.actor
            ranks.setdefault(worker.metadata.node_id, []).append(rank)
        self._watcher = PreemptionWatcher(
            node_to_ranks=ranks, worker_actors_by_rank=actors, poll_interval_s=self._poll_interval_s
        )

    def _stop_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()  # its thread ends at its next look
            self._watcher = None
