"""Ray Train's worker group, whose workers may come and go while the others train.

Ray Train knows the workers that ``get_workers`` gives: it polls them, takes in what they report and ends them. This
keeps that list, and all that goes by it, the same as the group that the workers have formed: newcomers are started and
warm up beside it, and stand in the list once they train; those that are gone, or asked to go, are taken out of it.

These are internals of Ray Train (the 2.60 line); ``seam`` names those that are relied upon here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, TypeVar, final

import ray
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.checkpoint.report_handler import ReportCallbackHandler
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import Worker as RayWorker
from ray.util.placement_group import PlacementGroup
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from orchestrator.ports import View
from orchestrator.ray_train.asking import ANSWER_S, dead, heard, standings, tell_all
from orchestrator.ray_train.cohort import Cohort
from orchestrator.ray_train.door import Standing, tell
from orchestrator.ray_train.places import member_of, obituary, places_of, who_stays
from orchestrator.ray_train.reports import Reports, handed_on
from orchestrator.ray_train.slots import Slots

logger = logging.getLogger(__name__)
T = TypeVar("T")

_SOON_S = 0.25
_LOOKS = 10  # after those who are to end, before they are ended
_GONE = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)


@final
class LiveWorkerGroup(WorkerGroup):
    """``follow`` tells it what to do about workers that are gone; until then Ray Train does what it always does."""

    _worker_group_context: Any
    _worker_health_check_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slots: Slots | None = None
        self._slot_of: dict[str, Any] = {}  # by member
        self._store: TCPStore | None = None
        self._workers_by_member: dict[str, RayWorker] = {}
        self._view: View | None = None  # the newest that was told
        self._installed = -1  # the generation that ``get_workers`` shows
        self._cohort: Cohort | None = None
        self._leaving: list[tuple[RayWorker, int]] = []  # and how often each was looked after
        self._fewest: int | None = None
        self._hang_timeout_s: float | None = None
        self._being_taken: set[str] = set()  # nodes that will go
        self.notes: list[Mapping[str, Any]] = []  # what happened, for the run's events
        self.alarm = threading.Event()  # something is wrong: look at once
        self.lost = 0  # workers
        self._reports: Reports[_TrainingReport] = Reports()

    def follow(self, *, fewest: int, hang_timeout_s: float | None) -> None:
        """Go on with those that are left, when workers are lost and at least ``fewest`` are."""
        self._fewest, self._hang_timeout_s = fewest, hang_timeout_s
        if hang_timeout_s is not None:  # a process that stands still does not answer Ray's polls either
            self._worker_health_check_timeout_s = min(self._worker_health_check_timeout_s, hang_timeout_s)

    # Beginning, with the names and the order that Ray Train's own start uses

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Slots:
        self._slots = Slots.asked(
            worker_group_context.num_workers,
            resources=worker_group_context.resources_per_worker,
            strategy=worker_group_context.placement_strategy,
            selectors=worker_group_context.label_selector,
        )
        return self._slots

    def _create_workers(self, num_workers: int, placement_group: Any, *args: Any, **kwargs: Any) -> list[RayWorker]:
        """One in each slot; ``placement_group`` is the first of them."""
        assert self._slots is not None, "the slots were made first"
        return self._create_in(self._slots.groups, first_rank=0, world_size=num_workers)

    def _create_in(self, groups: Sequence[PlacementGroup], *, first_rank: int, world_size: int) -> list[RayWorker]:
        resources = self._worker_group_context.resources_per_worker
        create = super()._create_workers
        with ThreadPoolExecutor(len(groups)) as pool:
            created = list(pool.map(lambda group: create(1, group, resources)[0], groups))
        for worker, group in zip(created, groups, strict=True):
            self._slot_of[member_of(worker)] = group
            self._workers_by_member[member_of(worker)] = worker
        started = WorkerGroup._assign_worker_ranks(created, starting_world_rank=first_rank, world_size=world_size)
        return list(started)

    def open(self) -> None:
        """Tell the first workers that they are the first group, before they train."""
        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        view = self._view_of(self.get_workers(), host=host)
        self._view, self._installed = view, view.generation
        ray.get([worker.execute_async(tell, view) for worker in self.get_workers()])
        for worker in self.get_workers():
            self._reports.begin(member_of(worker), since=self._callback(CheckpointManager)._current_report_index)

    # Coming and going

    @property
    def is_changing(self) -> bool:
        """Whether a view was told that is not in force yet."""
        return self._view is not None and self._view.generation > self._installed

    @property
    def recruits(self) -> bool:
        """Whether newcomers are on their way."""
        return self._cohort is not None

    @property
    def newcomers(self) -> int:
        """How many have warmed up and may be taken in."""
        cohort = self._cohort
        return len(cohort.workers) if cohort is not None and cohort.is_ready() else 0

    @property
    def preempted(self) -> int:
        """How many workers are on nodes that will be taken away."""
        return sum(worker.metadata.node_id in self._being_taken for worker in self.get_workers())

    @property
    def looks_every_s(self) -> float | None:
        """How soon to look again, where that is sooner than usual: something is wrong, or a change is under way."""
        if self.alarm.is_set():
            return 0.0
        return _SOON_S if self.is_changing or self.recruits else None

    def recruit(self, number: int) -> None:
        """Start so many newcomers beside the group; returns at once."""
        self._cohort = Cohort(self, number, timeout_s=self._worker_group_start_timeout_s)

    def dismiss(self, why: str) -> None:
        """End the newcomers that were not taken in."""
        self._drop_cohort(why)

    def start_beside(self, slots: Slots) -> list[RayWorker]:
        """Start workers in ``slots`` and let them warm up. Called from the cohort's thread."""
        assert self._slots is not None, "the group was started"
        self._slots.add(slots)
        now = len(self.get_workers())
        workers = self._create_in(slots.groups, first_rank=now, world_size=now + len(slots.groups))
        self._init_train_context(workers, self.get_worker_group_state().sync_actor)
        # Ray's report handler would forget what it has of the others.
        callbacks = [cb for cb in self._replica_group_callbacks if not isinstance(cb, ReportCallbackHandler)]
        beside = ReplicaGroup(workers, self._worker_group_context.resources_per_worker, callbacks)
        beside.start_training(self._worker_group_context)
        return workers

    def view_with(self, number: int) -> View:
        """Of a group of ``number``: those who stay, none from a node that will go, and newcomers where more are wanted.

        Newcomers are told of it; the others hear of it from rank zero, at the boundary where they agree.
        """
        stay = [worker for worker in self.get_workers() if worker.metadata.node_id not in self._being_taken]
        stay = [stay[i] for i in who_stays([worker.metadata.node_id for worker in stay], number)]
        come: list[RayWorker] = []
        if self._cohort is not None:
            come = self._cohort.workers[: number - len(stay)]
        view = self._view_of([*stay, *come])
        self._view = view
        tell_all(come, view)
        return view

    def member(self, name: str) -> RayWorker:
        return self._workers_by_member[name]

    def look(self) -> None:
        """After every poll: take into force what the workers have done, and see to what goes wrong."""
        if self._cohort is not None and self._cohort.problem is not None:
            self._drop_cohort(self._cohort.problem)
        self._install_formed()
        self._give_up_on_dead_newcomers()
        self._end_leaving()
        self._watch()

    def _install_formed(self) -> None:
        view = self._view
        if view is None or not self.is_changing:
            return
        formed = [one for one in self._heard(view) if one.generation >= view.generation]
        if len(formed) == len(view.members):
            self._install(view, reports=formed[0].reports)
        elif self._zero_has_left(view):
            # The next rank zero needs the controller before the group stands, and is met once it is installed here.
            self._install(view, reports=0)

    def _zero_has_left(self, view: View) -> bool:
        """Whether rank zero goes in ``view``, and has handed over; nobody comes then."""
        zero = self.get_workers()[0]
        stays = member_of(zero) in view.members
        one = None if stays else standings([zero])[member_of(zero)]
        return one is not None and one.left

    def _install(self, view: View, *, reports: int) -> None:
        """``view`` is in force: make its members the workers that Ray Train knows."""
        before = self.get_workers()
        workers = [self._workers_by_member[member] for member in view.members]
        world_size = len(workers)
        for rank, (worker, place) in enumerate(zip(workers, view.places, strict=True)):
            worker.distributed_context = replace(
                worker.distributed_context, world_rank=rank, world_size=world_size, **asdict(place)
            )
        polls = {id(before[rank]): poll for rank, poll in self._world_rank_to_ongoing_poll.items()}
        self._callback(ReportCallbackHandler)._training_report_queues = [deque() for _ in workers]
        for worker in workers:
            if worker not in before:
                self._reports.begin(member_of(worker), since=reports)
        self._worker_group_state = replace(self.get_worker_group_state(), workers=workers)
        self._worker_group_context = replace(self._worker_group_context, num_workers=world_size)
        self._world_rank_to_ongoing_poll.clear()
        self._world_rank_to_ongoing_poll.update(
            {rank: polls[id(worker)] for rank, worker in enumerate(workers) if id(worker) in polls}
        )
        resources = self._worker_group_context.resources_per_worker
        self._replica_groups = [
            ReplicaGroup([worker], resources, self._replica_group_callbacks) for worker in workers
        ]  # fmt: skip
        self._worker_rank_to_replica_group_rank = {rank: rank for rank in range(world_size)}
        for callback in self._callbacks:
            if isinstance(callback, PreemptionCallback):  # it watches the nodes of the workers that it was given
                callback.after_worker_group_start(self)
        self._installed = view.generation
        self._leaving += [(worker, 0) for worker in before if worker not in workers]
        if self._cohort is not None and self._cohort.is_over(trains=workers):
            self._cohort = None
        logger.info("%d workers train now, and %d did before", world_size, len(before))

    # What goes wrong

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> list[WorkerStatus]:
        """Without those that the others go on without, and with the reports that all have made."""
        self._install_if_begun()  # those who have just joined may be the ones that are gone
        results: list[WorkerStatus] = super()._poll_workers_and_collect_errors(timeout)
        if self.is_changing and all(isinstance(result.error, _GONE) for result in results) and self._is_handed_over():
            results = super()._poll_workers_and_collect_errors(timeout)
        self.alarm.clear()
        if self._fewest is not None:
            results = self._without_notices(self._without_the_gone(results, fewest=self._fewest))
        return handed_on(
            self._reports,
            [member_of(worker) for worker in self.get_workers()],
            results,
            handler=self._callback(ReportCallbackHandler),
            manager=self._callback(CheckpointManager),
        )

    def _without_the_gone(self, results: list[WorkerStatus], *, fewest: int) -> list[WorkerStatus]:
        gone = {rank for rank, result in enumerate(results) if isinstance(result.error, _GONE)}
        left = [result for rank, result in enumerate(results) if rank not in gone]
        if not gone or len(left) < fewest or not all(result.error is None and result.running for result in left):
            return results
        workers = self.get_workers()
        self._go_on_without([workers[rank] for rank in sorted(gone)])
        return left

    def _go_on_without(self, gone: Sequence[RayWorker]) -> None:
        """Tell those that are left that they are the group now."""
        for worker in gone:
            self._end(worker)
        self.lost += len(gone)
        left = [worker for worker in self.get_workers() if worker not in gone]
        self._view = replace(self._view_of(left), lost=obituary(gone))
        self._install(self._view, reports=0)
        self._release_reports()
        self._leaving = [(worker, looks) for worker, looks in self._leaving if worker not in gone]
        tell_all([*left, *([] if self._cohort is None else self._cohort.workers)], self._view)

    def _release_reports(self) -> None:
        """Those who wait in a report for one that will not come go on without it."""
        self.get_worker_group_state().sync_actor.reset.remote()

    def _give_up_on_dead_newcomers(self) -> None:
        """Those who wait for one that died before it joined go on as they were."""
        if self._cohort is None or not self.is_changing or not (gone := dead(self._cohort.workers)):
            return
        self._view = replace(self._view_of(self.get_workers()), lost=obituary(gone))
        tell_all(self.get_workers(), self._view)
        self._drop_cohort(obituary(gone))

    def _install_if_begun(self) -> None:
        """A view is in force once one of its members has all that the others know, though not all have formed it."""
        view = self._view
        if view is not None and self.is_changing:
            begun = [one for one in self._heard(view) if one.received >= view.generation]
            if begun:
                self._install(view, reports=begun[0].reports)

    def _is_handed_over(self) -> bool:
        """Nobody is left of those who trained: whether newcomers got all that they knew before; it is then in force."""
        end_s = time.monotonic() + ANSWER_S
        while self.is_changing and time.monotonic() < end_s:
            self._install_if_begun()
            time.sleep(_SOON_S / 5)
        return not self.is_changing

    def _heard(self, view: View) -> list[Standing]:
        """What the members of ``view`` say who answer."""
        return heard([self._workers_by_member[member] for member in view.members])

    def _without_notices(self, results: list[WorkerStatus]) -> list[WorkerStatus]:
        """Ray Train would start all workers again because a node goes; where others are left, they go on instead."""
        infos = [result.preemption_info for result in results if result.preemption_info is not None]
        if not infos:
            return results
        taken = {node for info in infos for node in info.preempted_node_to_ranks}
        stay = [worker for worker in self.get_workers() if worker.metadata.node_id not in taken]
        if self._fewest is None or len(stay) < self._fewest:
            return results
        self._being_taken |= taken
        return [replace(result, preemption_info=None) for result in results]

    def _watch(self) -> None:
        """Find workers that hang, and keep the others waiting; and a group that is broken though nobody is gone."""
        if self._fewest is None or self._hang_timeout_s is None:
            return
        found = standings(self.get_workers())
        known = [one for one in found.values() if one is not None]
        if self._view is not None and self._view.lost and any(one.generation < self._installed for one in known):
            self._release_reports()  # also those who came to wait only after it was known
        if len(known) == len(found) and all(one.broken >= self._installed for one in known):
            self._form_again()
            return
        hanging = [
            worker
            for worker in self.get_workers()
            if (one := found[member_of(worker)]) is not None and one.hangs(longest_s=self._hang_timeout_s)
        ]
        for worker in hanging if any(one.waits for one in known) else ():
            logger.warning("worker %s has done nothing for %g s: it is ended", worker, self._hang_timeout_s)
            self._end(worker)  # the next poll finds it gone

    def _form_again(self) -> None:
        """All found their group broken, and nobody is gone: an exchange failed on its way."""
        lost = "an exchange between the workers failed, and all are there"
        self._view = replace(self._view_of(self.get_workers()), lost=lost)
        self._install(self._view, reports=0)
        tell_all(self.get_workers(), self._view)

    # Ending

    def _end_leaving(self) -> None:
        still = []
        for worker, looks in self._leaving:
            status = standings([worker])[member_of(worker)]
            if (status is not None and status.left) or looks >= _LOOKS:
                self._end(worker)
            else:
                still.append((worker, looks + 1))
        self._leaving = still

    def _drop_cohort(self, why: str) -> None:
        assert self._cohort is not None
        self.notes.append({"kind": "workers_failed", "reason": f"newcomers did not come to train: {why}"})
        for worker in self._cohort.workers:
            self._end(worker)
        self._cohort.give_back()
        self._cohort = None

    def _end(self, worker: RayWorker) -> None:
        ray.kill(worker.actor)
        slot = self._slot_of.pop(member_of(worker), None)
        if slot is not None and self._slots is not None:
            self._slots.give_back(slot)

    def _clear_state(self) -> None:
        if self._cohort is not None:
            self._drop_cohort("the group ends")
        for worker, _ in self._leaving:
            self._end(worker)
        self._leaving = []
        super()._clear_state()

    def _callback(self, kind: type[T]) -> T:
        return next(callback for callback in self._callbacks if isinstance(callback, kind))

    def _view_of(self, workers: Sequence[RayWorker], *, host: str | None = None) -> View:
        assert self._store is not None
        before = self._view
        if host is None:
            assert before is not None, "the first view is told by open()"
            host = before.store[0]
        return View(
            generation=0 if before is None else before.generation + 1,
            members=tuple(map(member_of, workers)),
            places=places_of(workers),
            store=(host, self._store.port),
        )
