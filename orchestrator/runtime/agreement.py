"""What do the members of a new group tell each other, so that all of them go on from one point with one state?

Every rank stands at some point of the run: in a step, behind it, or about to begin the next. A rank that was lost may
leave the others at points that differ by one: some have taken the step, others had to discard it. The one that got
furthest is right, since what it has taken held every rank's part; it gives its state to those that are behind, and to
those that are new. So a step is lost only if nobody had taken it, and then all do it again with the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from orchestrator.core.ramp import InForce
from orchestrator.errors import CheckpointError
from orchestrator.ports import Membership, View
from orchestrator.runtime.announcement import Announcement
from orchestrator.runtime.boundary import Boundary
from orchestrator.runtime.course import Course
from orchestrator.runtime.live_state import LiveState
from orchestrator.runtime.paid_time import process_age_s
from orchestrator.runtime.points import steps_at
from orchestrator.runtime.progress import FinishedStep, Resumed
from orchestrator.runtime.replica import Replica
from orchestrator.runtime.succession import LiveMemory, Regroup, Succession
from orchestrator.runtime.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """How this rank came to go on in another group."""

    point: int | None  # of the run, where it paused; ``None``: it joins
    workers: int  # of the group before; 0: it was in none
    began_s: float
    lost: str | None = None  # what broke the group before, if something did
    in_part: Sequence[FinishedStep] = field(default_factory=list)  # steps that are known in part only


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standing:
    """Where one member of a new group stands."""

    joins: bool
    point: int  # of the run
    told: int  # steps of which it knows what all ranks measured
    writes: bool  # the run's folder
    age_s: float  # of its process
    dataset_size: int
    carried: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What the rank that got furthest gives to those behind."""

    step: int
    samples_seen: int
    last_batch: int
    in_force: InForce | None
    memory: LiveMemory
    asked: Announcement
    in_part: Sequence[FinishedStep]


@final
class Agreement:
    """All members of a group make the same calls."""

    def __init__(
        self,
        membership: Membership,
        *,
        worker: Worker,
        replica: Replica,
        state: LiveState,
        course: Course,
        boundary: Boundary,
        succession: Succession,
        dataset_size: int,
    ) -> None:
        self._membership = membership
        self._worker = worker
        self._replica = replica
        self._live_state = state
        self._course = course
        self._boundary = boundary
        self._succession = succession
        self._dataset_size = dataset_size
        # The point and state that were reached in a group that broke at once.
        self._got: tuple[int, _Given] | None = None

    def begin(self) -> None:
        """A group is to be formed, or several until one stands."""
        self._got = None

    def reach(self, view: View, pause: Pause) -> int:
        """Collective in the group of ``view``. The point of the run from which all go on.

        Raises ``CheckpointError`` where the members' data sets differ.
        """
        collective = self._worker.collective
        own = self._standing(pause)
        standings: list[_Standing] = collective.share(collective.gather(own))
        self._check(standings)
        stay = [rank for rank, one in enumerate(standings) if not one.joins]
        source = max(stay, key=lambda rank: (standings[rank].point, standings[rank].told, -rank))
        furthest = standings[source]
        behind = own.joins or steps_at(own.point) < steps_at(furthest.point)
        takes_over = not standings[0].writes
        since = 0 if takes_over else min(standings[rank].told for rank in stay)
        given: _Given = collective.share(
            self._give(pause, since=since) if collective.rank == source else None, source=source
        )
        self._live_state.spread(source=source, behind=behind)
        if behind or own.told < furthest.told:
            self._succession.remember(given.memory, joins=own.joins)
        carried = max((one.carried for one in standings), key=lambda one: tuple(one.values()))
        self._got = furthest.point, given
        self._membership.received(view, carried)
        self._replica.wrap(alike=True)
        change = Regroup(
            before=pause.workers or len(stay),
            takes_over=takes_over,
            known=given.memory.recent,
            newcomers_s=sum(one.age_s for one in standings if one.joins),
            lost=None if pause.lost is None else view.lost or pause.lost,
            began_s=pause.began_s,
            now=self._worker.now,
        )
        welcome = self._succession.regrouped(change, given.in_part)
        self._course.begin(
            Resumed(
                step=given.step,
                samples_seen=given.samples_seen,
                now=welcome.now,
                pending=welcome.pending,
                in_force=given.in_force,  # also of a round of branches whose end not all had heard of
                last_batch=given.last_batch,
            )
        )
        self._boundary.go_on_in_another_group(given.asked)
        self._membership.formed(view, carried)
        return furthest.point

    def _standing(self, pause: Pause) -> _Standing:
        point = -1 if pause.point is None else pause.point
        return _Standing(
            joins=pause.point is None and self._got is None,
            point=point if self._got is None else self._got[0],
            told=self._succession.told.step,
            writes=self._succession.writes,
            age_s=process_age_s(),
            dataset_size=self._dataset_size,
            carried=self._membership.carry(),
        )

    def _give(self, pause: Pause, *, since: int) -> _Given:
        memory = self._succession.memory(since=since)
        if self._got is not None:  # the course goes by it only once a group stands
            return replace(self._got[1], memory=memory)
        state = self._course.state
        return _Given(
            step=state.step,
            samples_seen=state.samples_seen,
            last_batch=state.last_batch,
            in_force=state.in_force,
            memory=memory,
            asked=self._boundary.asked,
            in_part=pause.in_part,
        )

    def _check(self, standings: Sequence[_Standing]) -> None:
        sizes = {one.dataset_size for one in standings}
        if len(sizes) > 1:
            raise CheckpointError(
                f"the data set of a worker that joins has another length ({', '.join(map(str, sorted(sizes)))} "
                "samples): each worker must see the same data, all of it"
            )
