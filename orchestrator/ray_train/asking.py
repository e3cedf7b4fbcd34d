"""What workers say when they are asked beside their training, and what they are told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import ray
from ray.train.v2._internal.execution.worker_group.worker import Worker as RayWorker

from orchestrator.ports import View
from orchestrator.ray_train.door import Standing, standing, tell
from orchestrator.ray_train.places import member_of

ANSWER_S = 2.0  # for a worker's actor, which runs beside its training


def standings(workers: Sequence[RayWorker]) -> dict[str, Standing | None]:
    """What each worker's door says, by member; ``None`` of one that does not answer."""
    asked = {member_of(worker): worker.execute_async(standing) for worker in workers}
    there, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
    heard = set(there)
    found: dict[str, Standing | None] = {}
    for member, reference in asked.items():
        try:
            found[member] = ray.get(reference) if reference in heard else None
        except ray.exceptions.RayError:
            found[member] = None
    return found


def heard(workers: Sequence[RayWorker]) -> list[Standing]:
    """What those say who answer."""
    return [one for one in standings(workers).values() if one is not None]


def dead(workers: Sequence[RayWorker]) -> list[RayWorker]:
    """Those that Ray knows to be; one that imports or compiles may not answer for a while, and is not."""
    asked = {worker.execute_async(standing): worker for worker in workers}
    there, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    found = []
    for reference in there:
        try:
            ray.get(reference)
        except ray.exceptions.RayActorError:
            found.append(asked[reference])
    return found


def tell_all(workers: Iterable[RayWorker], view: View) -> None:
    """Without waiting for them to hear it."""
    for worker in workers:
        worker.execute_async(tell, view)
