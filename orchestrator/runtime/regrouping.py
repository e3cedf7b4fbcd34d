"""How a group changes while training goes on: at a boundary where all agree, or after a rank was lost.

Every rank stands at some point of the run: in a step, behind it, or about to begin the next. A rank that was lost may
leave the others at points that differ by one: some have taken the step, others had to discard it. The one that got
furthest is right, since what it has taken held every rank's part; it gives its state to those that are behind, and to
those that are new. So a step is lost only if nobody had taken it, and then all do it again with the same samples.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from orchestrator.core.controller import Rules
from orchestrator.core.ramp import InForce
from orchestrator.errors import CheckpointError, GroundswellError
from orchestrator.ports import Membership, View
from orchestrator.runtime.announcement import Announcement
from orchestrator.runtime.boundary import Boundary
from orchestrator.runtime.collective import Apart, ChangingCollective
from orchestrator.runtime.course import Course
from orchestrator.runtime.group import Groups, NotFormedError, lost_peer
from orchestrator.runtime.live_state import LiveState
from orchestrator.runtime.paid_time import process_age_s
from orchestrator.runtime.points import steps_at
from orchestrator.runtime.progress import FinishedStep, Resumed
from orchestrator.runtime.replica import Replica
from orchestrator.runtime.succession import LiveMemory, Regroup, Succession
from orchestrator.runtime.update import WeightUpdate
from orchestrator.runtime.worker import Worker
from orchestrator.types import ApplyPlan, BatchPlan, Target

logger = logging.getLogger(__name__)

_NEW_VIEW_S = 60.0  # for the controller to say who goes on, after a rank was lost
_MEETING_S = 30.0  # for all members of a view to come


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
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
class Regrouping:
    """All members of a group make the same calls."""

    def __init__(
        self,
        membership: Membership,
        groups: Groups,
        *,
        worker: Worker,
        collective: ChangingCollective,
        replica: Replica,
        update: WeightUpdate,
        state: LiveState,
        course: Course,
        boundary: Boundary,
        succession: Succession,
        dataset_size: int,
    ) -> None:
        self._membership = membership
        self._groups = groups
        self._worker = worker
        self._collective = collective
        self._replica = replica
        self._update = update
        self._live_state = state
        self._course = course
        self._boundary = boundary
        self._succession = succession
        self._dataset_size = dataset_size
        self._generation = 0  # of the group that a launcher forms, and of none yet
        self._got: tuple[int, _Given] | None = (
            None  # the point and state that were reached in a group that broke at once
        )
        self.goal = 0  # the point at which the whole group goes on: who stands before it skips what lies between
        self.left = False  # this process is in no group any more

    def join(self) -> None:
        """This process has warmed up: wait to be taken in. Returns without a group if it is never needed."""
        self._membership.ready()
        view = None
        while view is None:
            view = self._membership.wait(newer_than=self._generation, timeout_s=_NEW_VIEW_S)
        self._settle(view, at=None, before=0, began_s=self._worker.now(), lost=None, in_part=[])

    def change(self, view: View, *, point: int) -> None:
        """Go on as ``view``, at a boundary where the whole group has agreed to; not as one that was overtaken."""
        if view.generation <= self._generation:
            return
        began_s, before = self._worker.now(), self._collective.world_size
        why = None
        try:
            self._hand_over(view)
        except Exception as error:
            why = lost_peer(error)
            if why is None:
                raise
        if why is not None:
            self.recover(why, point=point)
            return
        self._settle(view, at=point, before=before, began_s=began_s, lost=None, in_part=[])

    def recover(self, why: str, *, point: int) -> None:
        """A rank is gone, or does not answer: go on with those that are left."""
        began_s, before = self._worker.now(), self._collective.world_size
        logger.warning("a rank is gone, and the others go on: %s", why)
        if self._course.on_branch:
            self._course.take_back()
        in_part = self._boundary.give_up()
        self._membership.broken(why)
        self._let_go(broken=True)
        self._settle(None, at=point, before=before, began_s=began_s, lost=why, in_part=in_part)

    def _hand_over(self, view: View) -> None:
        """Where rank zero leaves, all get what it alone knows, and it lets go of the run's folder."""
        own = self._collective.rank
        stays = bool(self._collective.sum([float(own == 0 and view.rank_of(self._membership.member) == 0)])[0])
        if not stays:
            self._succession.hand_over()

    def _settle(
        self,
        view: View | None,
        *,
        at: int | None,
        before: int,
        began_s: float,
        lost: str | None,
        in_part: list[FinishedStep],
    ) -> None:
        """Form the group of ``view``, or of the next that comes, until one stands."""
        self._got = None
        while True:
            if view is None:
                view = self._membership.wait(newer_than=self._generation, timeout_s=_NEW_VIEW_S)
            if view is None and at is None:
                continue
            if view is None:
                raise GroundswellError(
                    f"a rank was lost ({lost}), and the controller did not say within {_NEW_VIEW_S:.0f} s who goes on: "
                    "it is dead or cut off; the run goes on from its last checkpoint when it is resumed"
                )
            self._generation = view.generation
            self._let_go(broken=lost is not None)
            if view.rank_of(self._membership.member) is None:
                if at is None:  # the others had to go on without; one that is not wanted any more is ended
                    view = None
                    continue
                self.left = True
                self._membership.left()
                return
            problem = self._try(view, at=at, before=before, began_s=began_s, lost=lost, in_part=in_part)
            if problem is None:
                return
            lost, view = lost or problem, None
            self._membership.broken(problem)

    def _try(self, view: View, **how: Any) -> str | None:
        """Form the group and agree in it; what failed, where another member is gone already."""
        newest = self._membership.latest
        generation = view.generation
        try:
            group = self._groups.form(
                view,
                overtaken=lambda: (known := newest()) is not None and known.generation > generation,
                patience_s=_MEETING_S,
            )
            self._collective.become(group)
            self._agree(view, **how)
        except NotFormedError as error:
            return str(error)
        except Exception as error:
            why = lost_peer(error)
            if why is None:
                raise
            return why
        return None

    def _agree(
        self, view: View, *, at: int | None, before: int, began_s: float, lost: str | None, in_part: list[FinishedStep]
    ) -> None:
        collective = self._collective
        own = Standing(
            joins=at is None and self._got is None,
            point=self._got[0] if self._got is not None else -1 if at is None else at,
            told=self._succession.told.step,
            writes=self._succession.writes,
            age_s=process_age_s(),
            dataset_size=self._dataset_size,
            carried=self._membership.carry(),
        )
        standings: list[Standing] = collective.share(collective.gather(own))
        self._check(standings)
        stay = [rank for rank, one in enumerate(standings) if not one.joins]
        source = max(stay, key=lambda rank: (standings[rank].point, standings[rank].told, -rank))
        furthest = standings[source]
        behind = own.joins or steps_at(own.point) < steps_at(furthest.point)
        takes_over = not standings[0].writes
        since = 0 if takes_over else min(standings[rank].told for rank in stay)
        given: _Given = collective.share(
            self._give(since=since, in_part=in_part) if collective.rank == source else None, source=source
        )
        self._live_state.spread(source=source, behind=behind)
        if behind or own.told < furthest.told:
            self._succession.remember(given.memory, joins=own.joins)
        carried = max((one.carried for one in standings), key=lambda one: tuple(one.values()))
        self._got = furthest.point, given
        self._membership.received(view, carried)
        self._replica.wrap(alike=True)
        change = Regroup(
            before=before or len(stay),
            takes_over=takes_over,
            known=given.memory.recent,
            newcomers_s=sum(one.age_s for one in standings if one.joins),
            lost=None if lost is None else view.lost or lost,
            began_s=began_s,
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
        self.goal = furthest.point
        self._membership.formed(view, carried)

    def _give(self, *, since: int, in_part: list[FinishedStep]) -> _Given:
        if self._got is not None:  # the course goes by it only once a group stands
            return replace(self._got[1], memory=self._succession.memory(since=since))
        state = self._course.state
        return _Given(
            step=state.step,
            samples_seen=state.samples_seen,
            last_batch=state.last_batch,
            in_force=state.in_force,
            memory=self._succession.memory(since=since),
            asked=self._boundary.asked,
            in_part=in_part,
        )

    def _check(self, standings: Sequence[Standing]) -> None:
        sizes = {one.dataset_size for one in standings}
        if len(sizes) > 1:
            raise CheckpointError(
                f"the data set of a worker that joins has another length ({', '.join(map(str, sorted(sizes)))} "
                "samples): each worker must see the same data, all of it"
            )

    def _let_go(self, *, broken: bool) -> None:
        self._update.discard()
        self._replica.unwrap()
        self._collective.become(Apart())
        if broken:
            gc.collect()  # what refers to the group would keep its connections open, and others waiting
        self._groups.leave(broken=broken)


def rehearsal(rules: Rules) -> Resumed:
    """What a worker trains by before it joins: one micro-batch, for the sake of warming up."""
    plan = BatchPlan(generation=0, world_size=1, batch=rules.micro_batch, micro_batch=rules.micro_batch)
    now = ApplyPlan(
        plan=plan, target=Target(batch=rules.base_batch), lr_factor=1.0, effective_step=0, reason="a rehearsal"
    )
    return Resumed(step=0, samples_seen=0, now=now, pending=None, in_force=None)
