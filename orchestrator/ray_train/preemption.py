"""Ray Train's watch over notices that nodes are given, on the controller's node.

Ray starts it on any node, where it keeps that one busy: an autoscaler would never take it back, used or not.
"""

from __future__ import annotations

from typing import Any, final

import ray
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.preemption import PreemptionWatcher


@final
class PinnedPreemptionCallback(PreemptionCallback):
    def after_worker_group_start(self, worker_group: Any) -> None:
        self._stop_watcher()
        ranks: dict[str, list[int]] = {}
        actors = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            actors[rank] = worker.actor
            ranks.setdefault(worker.metadata.node_id, []).append(rank)
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        pinned = ray.remote(PreemptionWatcher).options(num_cpus=0, max_restarts=-1, label_selector=here)
        self._watcher = pinned.remote(
            node_to_ranks=ranks, worker_actors_by_rank=actors, poll_interval_s=self._poll_interval_s
        )
