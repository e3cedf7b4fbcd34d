"""With whom does a loop train, and what does it do when that changes while it goes on?

The loop asks a group that stays the same questions as one that workers join, leave and are lost from, and need not know
which of the two it is in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, final

from orchestrator.measure.meter import Meter
from orchestrator.ports import Membership
from orchestrator.runtime.agreement import Agreement
from orchestrator.runtime.boundary import Boundary
from orchestrator.runtime.collective import ChangingCollective
from orchestrator.runtime.course import Course
from orchestrator.runtime.group import lost_peer
from orchestrator.runtime.live_state import LiveState
from orchestrator.runtime.parallel import ModelReplica
from orchestrator.runtime.points import after_step, at_boundary, before_step
from orchestrator.runtime.regrouping import Regrouping
from orchestrator.runtime.replica import Replica
from orchestrator.runtime.step import Step
from orchestrator.runtime.succession import Succession
from orchestrator.runtime.trained import Trained
from orchestrator.runtime.update import WeightUpdate
from orchestrator.runtime.worker import Worker

T = TypeVar("T")


class Peers(Protocol):
    """All ranks make the same calls, but for ``beat``, ``lost`` and those of a rehearsal."""

    @property
    def rehearses(self) -> bool:
        """Whether this worker has yet to join the others: its step changes nothing, and is ended with ``join``."""
        ...

    @property
    def left(self) -> bool:
        """Whether this worker was asked to go: its loop ends, and the others go on."""
        ...

    def beat(self, *, waits: bool) -> None:
        """A sign of life; ``waits`` for the others from here, or does not."""
        ...

    def lost(self, error: BaseException) -> str | None:
        """What ``error`` says of a rank that is gone and that the others go on without; ``None`` is no such error."""
        ...

    def are_beyond(self, point: int) -> bool:
        """Whether the others were beyond that point of the run when they went on together, so that it is skipped."""
        ...

    def outlive(self, work: Callable[[], T], *, at: int) -> T | None:
        """Collective. Do ``work`` at that point, again where a rank is lost; ``None`` where the others were beyond."""
        ...

    def recover(self, step: Step) -> None:
        """Go on without who is ``lost``; the step comes again, unless one of those that are left has taken it."""
        ...

    def cross(self) -> None:
        """Collective. Do what is due between the step just taken and the next; another group may take that one."""
        ...

    def end_rehearsal(self, step: Step) -> None:
        """Leave no trace of a step that was taken to warm up."""
        ...

    def join(self) -> None:
        """Wait to be taken in by the others, or to be let go."""
        ...


@final
class FixedPeers:
    """Who trains stays the same: a rank that is lost ends the run, which goes on from its last checkpoint."""

    rehearses = False
    left = False

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary

    def beat(self, *, waits: bool) -> None:
        """Nobody listens."""

    def lost(self, error: BaseException) -> str | None:
        return None

    def are_beyond(self, point: int) -> bool:
        return False

    def outlive(self, work: Callable[[], T], *, at: int) -> T | None:
        return work()

    def recover(self, step: Step) -> None:
        raise AssertionError("no loss is survived here")

    def cross(self) -> None:
        self._boundary.cross()

    def end_rehearsal(self, step: Step) -> None:
        raise AssertionError("nobody rehearses here")

    def join(self) -> None:
        raise AssertionError("nobody joins here")


@final
class ChangingPeers:
    """``orchestrator.ports.Membership`` says who comes and goes, and ``Regrouping`` does it."""

    def __init__(
        self,
        membership: Membership,
        regrouping: Regrouping,
        *,
        replica: Replica,
        update: WeightUpdate,
        meter: Meter,
        course: Course,
        boundary: Boundary,
    ) -> None:
        self.rehearses = membership.joins
        self._membership = membership
        self._regrouping = regrouping
        self._replica = replica
        self._update = update
        self._meter = meter
        self._course = course
        self._boundary = boundary

    @property
    def left(self) -> bool:
        return self._regrouping.left

    def beat(self, *, waits: bool) -> None:
        self._membership.beat(waits=waits)

    def lost(self, error: BaseException) -> str | None:
        return None if self.rehearses else lost_peer(error)

    def are_beyond(self, point: int) -> bool:
        return self._regrouping.goal > point

    def outlive(self, work: Callable[[], T], *, at: int) -> T | None:
        while True:
            try:
                return work()
            except Exception as error:
                why = self.lost(error)
                if why is None:
                    raise
            self._regrouping.recover(why, point=at)
            if self.are_beyond(at) or self.left:
                return None

    def recover(self, step: Step) -> None:
        assert step.lost is not None, "somebody is lost"
        why, step.lost = step.lost, None
        self._meter.begin_step(measure=False)
        if not step.finished:
            self._replica.restore_buffers()
        taken, number = step.finished, self._course.run_step - step.finished
        self._regrouping.recover(why, point=after_step(number) if taken else before_step(number))
        step.finished = self.are_beyond(before_step(number))
        step.again = not step.finished

    def cross(self) -> None:
        here = at_boundary(self._course.run_step - 1)
        self.beat(waits=True)
        view = None if self.are_beyond(here) else self.outlive(self._boundary.cross, at=here)
        if view is not None:
            self._regrouping.change(view, point=before_step(self._course.run_step))
        self.beat(waits=False)

    def end_rehearsal(self, step: Step) -> None:
        self._meter.read(grad_scale=step.loss_scale)
        self._update.discard()
        self._replica.restore_buffers()
        step.finished = True

    def join(self) -> None:
        self._regrouping.join()
        self.rehearses = False


def peers_of(
    worker: Worker,
    *,
    trained: Trained,
    replica: ModelReplica,
    update: WeightUpdate,
    meter: Meter,
    course: Course,
    boundary: Boundary,
    succession: Succession,
    dataset_size: int,
) -> Peers:
    """Those that change where the launcher gave the worker a membership."""
    if worker.membership is None:
        return FixedPeers(boundary)
    assert isinstance(worker.collective, ChangingCollective), "a membership comes with one"
    assert worker.groups is not None, "a membership comes with them"
    assert isinstance(replica, Replica), "the launcher gives none where the model is sharded"
    agreement = Agreement(
        worker.membership,
        worker=worker,
        replica=replica,
        state=LiveState(trained=trained, device=worker.device, collective=worker.collective),
        course=course,
        boundary=boundary,
        succession=succession,
        dataset_size=dataset_size,
    )
    regrouping = Regrouping(
        worker.membership,
        worker.groups,
        worker=worker,
        collective=worker.collective,
        replica=replica,
        update=update,
        course=course,
        boundary=boundary,
        succession=succession,
        agreement=agreement,
    )
    return ChangingPeers(
        worker.membership,
        regrouping,
        replica=replica,
        update=update,
        meter=meter,
        course=course,
        boundary=boundary,
    )
