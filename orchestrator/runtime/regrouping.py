"""How a group changes while training goes on: at a boundary where all agree, or after a rank was lost.

Each process leaves the group at hand, and meets those that the controller names in the next one; where that breaks as
well, in the one after it. What they tell each other there is the ``Agreement``'s.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from typing import final

from orchestrator.core.controller import Rules
from orchestrator.errors import GroundswellError
from orchestrator.ports import Membership, View
from orchestrator.runtime.agreement import Agreement, Pause
from orchestrator.runtime.boundary import Boundary
from orchestrator.runtime.collective import Apart, ChangingCollective
from orchestrator.runtime.course import Course
from orchestrator.runtime.group import Groups, NotFormedError, lost_peer
from orchestrator.runtime.progress import Resumed
from orchestrator.runtime.replica import Replica
from orchestrator.runtime.succession import Succession
from orchestrator.runtime.update import WeightUpdate
from orchestrator.runtime.worker import Worker
from orchestrator.types import ApplyPlan, BatchPlan, Target

logger = logging.getLogger(__name__)

_NEW_VIEW_S = 60.0  # for the controller to say who goes on, after a rank was lost
_MEETING_S = 30.0  # for all members of a view to come


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
        course: Course,
        boundary: Boundary,
        succession: Succession,
        agreement: Agreement,
    ) -> None:
        self._membership = membership
        self._groups = groups
        self._worker = worker
        self._collective = collective
        self._replica = replica
        self._update = update
        self._course = course
        self._boundary = boundary
        self._succession = succession
        self._agreement = agreement
        self._generation = 0  # of the group that a launcher forms, and of none yet
        self.goal = 0  # the point at which the whole group goes on: who stands before it skips what lies between
        self.left = False  # this process is in no group any more

    def join(self) -> None:
        """This process has warmed up: wait to be taken in. Returns without a group if it is never needed."""
        self._membership.ready()
        view = None
        while view is None:
            view = self._membership.wait(newer_than=self._generation, timeout_s=_NEW_VIEW_S)
        self._settle(view, Pause(point=None, workers=0, began_s=self._worker.now()))

    def change(self, view: View, *, point: int) -> None:
        """Go on as ``view``, at a boundary where the whole group has agreed to; not as one that was overtaken."""
        if view.generation <= self._generation:
            return
        pause = self._pause(point)
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
        self._settle(view, pause)

    def recover(self, why: str, *, point: int) -> None:
        """A rank is gone, or does not answer: go on with those that are left."""
        pause = self._pause(point)
        logger.warning("a rank is gone, and the others go on: %s", why)
        self._course.take_back()  # a branch that was under way is given up, and has no points of the run
        in_part = self._boundary.give_up()
        self._membership.broken(why)
        self._let_go(broken=True)
        self._settle(None, replace(pause, lost=why, in_part=in_part))

    def _pause(self, point: int) -> Pause:
        return Pause(point=point, workers=self._collective.world_size, began_s=self._worker.now())

    def _hand_over(self, view: View) -> None:
        """Where rank zero leaves, all get what it alone knows, and it lets go of the run's folder."""
        own = self._collective.rank
        stays = bool(self._collective.sum([float(own == 0 and view.rank_of(self._membership.member) == 0)])[0])
        if not stays:
            self._succession.hand_over()

    def _settle(self, view: View | None, pause: Pause) -> None:
        """Form the group of ``view``, or of the next that comes, until one stands."""
        self._agreement.begin()
        while True:
            if view is None:
                view = self._membership.wait(newer_than=self._generation, timeout_s=_NEW_VIEW_S)
            if view is None and pause.point is None:
                continue
            if view is None:
                raise GroundswellError(
                    f"a rank was lost ({pause.lost}), and the controller did not say within {_NEW_VIEW_S:.0f} s who "
                    "goes on: it is dead or cut off; the run goes on from its last checkpoint when it is resumed"
                )
            self._generation = view.generation
            self._let_go(broken=pause.lost is not None)
            if view.rank_of(self._membership.member) is None:
                if pause.point is None:  # the others had to go on without; one that is not wanted any more is ended
                    view = None
                    continue
                self.left = True
                self._membership.left()
                return
            problem = self._try(view, pause)
            if problem is None:
                return
            pause, view = replace(pause, lost=pause.lost or problem), None
            self._membership.broken(problem)

    def _try(self, view: View, pause: Pause) -> str | None:
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
            self.goal = self._agreement.reach(view, pause)
        except NotFormedError as error:
            return str(error)
        except Exception as error:
            why = lost_peer(error)
            if why is None:
                raise
            return why
        return None

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
