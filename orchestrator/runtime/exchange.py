"""When the ranks exchange what they measured, and what is made of it.

Training itself needs no exchange but the gradient's: whether a step may be taken, each rank reads from the mean
gradient, which all have alike. The sums of finished steps are therefore kept on each rank and exchanged together: at
every step when steps are long, twice a second when they are short, and always where a decision, a checkpoint or
an evaluation needs them. How often is rank zero's to say, from its clock; the decisions do not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from orchestrator.core import noise
from orchestrator.ports import Collective
from orchestrator.runtime.announcement import Announcement, StepSums
from orchestrator.runtime.calibration import Calibration
from orchestrator.runtime.controller_talk import ControllerTalk
from orchestrator.runtime.progress import FinishedStep
from orchestrator.types import BatchPlan, GradMeasured, GradSample

_EVERY_S = 0.5  # what a person at the terminal, or one who asks for a stop, does not feel
_MOST_STEPS = 16  # enough for the cost to vanish, and few if steps should suddenly become long


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnStep:
    """A finished step as one rank knows it: what all have alike, and ``sums``, its own part."""

    step: int
    samples_seen: int  # after it
    plan: BatchPlan
    spans: Sequence[tuple[int, int]]  # what this rank took: (first position, size)
    lr: float  # stepped with
    rule_lr: float  # of schedule and rule
    parts: int  # over all ranks, that its gradients are compared between
    measured: bool
    mean_grad_sq: float
    part_mean_grad_sq: float | None  # where a part was read besides the whole
    sums: StepSums
    step_time_s: float
    decides: bool


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """An exchange that has begun."""

    steps: list[OwnStep]
    result: Callable[[], list[float]]


@final
class Exchange:
    """Collects finished steps. All ranks make the same calls, and get the same answers."""

    def __init__(
        self, collective: Collective, talk: ControllerTalk, calibration: Calibration, *, lag_steps: int, act: bool
    ) -> None:
        self._collective = collective
        self._talk = talk
        self._calibration = calibration
        self._lag_steps = lag_steps
        self._act = act  # else a decision changes nothing, and no exchange is made for it
        self._waiting: list[OwnStep] = []
        self._under_way: _UnderWay | None = None
        self._rest_steps = 0
        self.first_non_finite: int | None = None  # step whose loss over all ranks was not finite, and yet was taken
        self._announces: dict[int, int] = {}  # step whose exchange announces a decision -> step at which it was taken

    def add(self, step: OwnStep, *, stop: bool) -> Announcement:
        """Collective. Take in a finished step; what is heard at its end.

        An exchange begins at the end of one step and is heard at the end of the next, so that nobody waits for it.
        """
        self._waiting.append(step)  # first: whatever fails from here on, the step was taken
        heard = self._finish()
        if step.decides:
            # Early enough to be heard at the end of the last step before it takes effect.
            self._announces[step.step + max(1, self._lag_steps - 1)] = step.step
        announces = self._act and step.step in self._announces
        if announces or step.decides or len(self._waiting) > self._rest_steps:
            self._begin(stop=stop)
            if self._collective.world_size == 1 or (announces and self._lag_steps == 1):
                heard = heard.or_else(self._finish())
        return heard

    def listen(self, *, stop: bool) -> Announcement:
        """Collective. What is asked for now, while no steps are finished that could be told of."""
        said = Announcement(stop=stop)
        if self._collective.rank == 0:
            said = self._talk.speak(said, decided_at=(), rest_steps=self._rest_steps)
        return Announcement.decode(self._collective.sum(said.encode()))

    def settle(self, *, stop: bool) -> Announcement:
        """Collective. Exchange all that waits now: what follows needs the controller to know it."""
        heard = self._finish()
        if self._waiting:
            self._begin(stop=stop)
            heard = heard.or_else(self._finish())
        return heard

    def _begin(self, *, stop: bool) -> None:
        steps, self._waiting = self._waiting, []
        due = [self._announces.pop(s) for s in sorted(self._announces) if s <= steps[-1].step]
        said = Announcement(stop=stop, sums=tuple(step.sums for step in steps))
        if self._collective.rank == 0:
            said = self._talk.speak(said, decided_at=due, rest_steps=self._rest(steps))
        else:
            self._talk.hear(due)
        self._under_way = _UnderWay(steps, self._collective.start_sum(said.encode()))

    def _finish(self) -> Announcement:
        under_way = self._under_way
        if under_way is None:
            return Announcement()
        heard = Announcement.decode(under_way.result())
        self._rest_steps = heard.rest_steps
        finished = [self._finished(step, sums) for step, sums in zip(under_way.steps, heard.sums, strict=True)]
        self._talk.steps(finished)
        self._under_way = None  # only now: what fails before is told without the others
        losses = ((step.measured.sample.step, step.measured.sample.loss) for step in finished)
        self.first_non_finite = next((step for step, loss in losses if not math.isfinite(loss)), None)
        return heard

    def abandon(self) -> None:
        """Write down the steps that no exchange told of: training has failed here, and the others cannot be asked."""
        self._talk.without_the_others(self.give_up())

    def begin_anew(self) -> None:
        """In another group, whose newcomers know nothing of what was agreed before: who waits for which step.

        A decision that was yet to be announced is known to all, for the new group was welcomed with it.
        """
        self._rest_steps = 0
        self._announces.clear()

    def give_up(self) -> list[FinishedStep]:
        """Forget what no exchange told of: the steps, with what all ranks know of them alike."""
        steps = [*([] if self._under_way is None else self._under_way.steps), *self._waiting]
        unknown = StepSums(weighted_sq_sum=math.nan, loss_sum=math.nan)
        self._under_way, self._waiting = None, []
        return [self._finished(step, unknown) for step in steps]

    def _rest(self, steps: Sequence[OwnStep]) -> int:
        """How many steps may pass before the next exchange. One process has nobody to wait for."""
        if self._collective.world_size == 1 or not steps:
            return 0
        mean_s = sum(step.step_time_s for step in steps) / len(steps)
        return min(_MOST_STEPS, int(_EVERY_S / max(mean_s, 1e-6))) - 1

    def _finished(self, step: OwnStep, sums: StepSums) -> FinishedStep:
        batch = step.plan.batch
        moments = self._calibration.take_in(
            _moments(step, sums.weighted_sq_sum, step.mean_grad_sq, sums.loss_sum),
            _moments(step, sums.part_weighted_sq_sum, step.part_mean_grad_sq, sums.loss_sum),
            samples_seen=step.samples_seen,
            batch=batch,
        )
        sample = GradSample(
            step=step.step,
            samples_seen=step.samples_seen,
            batch=batch,
            micro_batches=step.parts,
            loss=sums.loss_sum / batch,
            lr=step.rule_lr,
            grad_sq=None if moments is None else moments[0],
            trace_cov=None if moments is None else moments[1],
        )
        return FinishedStep(
            measured=GradMeasured(sample=sample, step_time_s=step.step_time_s),
            lr=step.lr,
            plan=step.plan,
            spans=step.spans,
            decides=step.decides,
        )


def _moments(
    step: OwnStep, weighted_sq_sum: float, mean_grad_sq: float | None, loss_sum: float
) -> tuple[float, float] | None:
    """(|G|^2, tr(Sigma)); ``None`` for what was not measured, or is not finite."""
    if mean_grad_sq is None or not step.measured:
        return None
    if not all(map(math.isfinite, (mean_grad_sq, weighted_sq_sum, loss_sum))):
        return None
    return noise.moments_from_sums(
        weighted_sq_sum=weighted_sq_sum, mean_grad_sq=mean_grad_sq, batch=step.plan.batch, micro_batches=step.parts
    )
