"""Which worker is which, where each runs, and who stays where fewer are wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ray.train.v2._internal.execution.worker_group.worker import Worker as RayWorker

from orchestrator.ports import Place


def member_of(worker: RayWorker) -> str:
    """As the worker's own process calls itself."""
    return str(worker.actor._actor_id.hex())


def obituary(workers: Sequence[RayWorker]) -> str:
    return ", and ".join(
        f"the worker of rank {worker.distributed_context.world_rank} is gone "
        f"(process {worker.metadata.pid} on node {worker.metadata.node_ip})"
        for worker in workers
    )


def who_stays(nodes: Sequence[str], number: int) -> list[int]:
    """Which ``number`` of the workers on these ``nodes``, by their places: so that nodes get empty and can be given
    back, and rank zero, which is the first, stays where it is."""
    crowd = Counter(nodes)
    first = {node: nodes.index(node) for node in crowd}
    kept = sorted(range(len(nodes)), key=lambda i: (first[nodes[i]] != 0, -crowd[nodes[i]], first[nodes[i]], i))
    return sorted(kept[:number])


def places_of(workers: Sequence[RayWorker]) -> tuple[Place, ...]:
    """Where each runs, counted over these workers alone."""
    on = [worker.metadata.node_ip for worker in workers]
    nodes = list(dict.fromkeys(on))
    return tuple(
        Place(local_rank=on[:i].count(node), local_world_size=on.count(node), node_rank=nodes.index(node))
        for i, node in enumerate(on)
    )
