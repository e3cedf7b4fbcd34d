"""Where does the run stand, and what is it set to do there? The clock in samples, and the plans now and next."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import final

from orchestrator.core import cursor
from orchestrator.core.branching import BranchSettings
from orchestrator.core.companions import Jump, StepScale
from orchestrator.core.controller import Rules, is_decision_point
from orchestrator.core.ramp import InForce, Ramp
from orchestrator.runtime.progress import Moment
from orchestrator.types import ApplyPlan, BatchPlan


@final
class RunState:
    """The same on every rank. ``begin`` comes first; ``next`` is a plan that waits for its step."""

    step: int
    samples_seen: int
    plan: BatchPlan
    in_force: InForce | None  # from the first plan on
    end: int  # samples seen then
    last_batch: int  # samples of the step just taken

    def __init__(self, rules: Rules, *, ramp_samples: int) -> None:
        self._rules = rules
        self.next: ApplyPlan | None = None
        self._ramp_samples = ramp_samples
        self.last_batch = 0
        self.end = rules.total_samples

    def begin(
        self,
        *,
        step: int,
        samples_seen: int,
        pending: ApplyPlan | None,
        in_force: InForce | None,
        last_batch: int = 0,
    ) -> None:
        """``in_force`` is that of the checkpoint, for a plan that changes the batch just there is a jump as well.

        ``last_batch`` is that of the step just taken, where the group changed between that step and the next.
        """
        self.step, self.samples_seen, self.next, self.in_force = step, samples_seen, pending, in_force
        self.last_batch = last_batch

    def adopt(self, apply: ApplyPlan) -> Jump | None:
        """Train by this plan from here on; the jump, if its target batch is another one than before."""
        before, self.plan = self.in_force, apply.plan
        if before is None or before.target.batch == apply.target.batch:
            self.in_force = InForce(target=apply.target) if before is None else replace(before, target=apply.target)
            return None
        ramp = None
        if self._ramp_samples:
            ramp = Ramp(start_factor=self._rule(before, before.target.batch), start_samples=self.samples_seen)
        self.in_force = replace(before, target=apply.target, ramp=ramp)
        known = apply.target.noise_scale if apply.target.fresh else None
        return Jump(old_batch=before.target.batch, new_batch=apply.target.batch, noise_scale=known)

    def due(self) -> ApplyPlan | None:
        """The next plan, if its step has come; it is handed out once."""
        if self.next is None or self.next.effective_step != self.step:
            return None
        due, self.next = self.next, None
        return due

    def plan_of_step(self) -> BatchPlan:
        """The plan in force, cut to what is left of the run."""
        return cursor.last_plan(self.plan, remaining=self.remaining)

    def scale(self, batch: int) -> StepScale:
        """What becomes of the optimizer's base settings in a step of ``batch`` samples that begins here."""
        assert self.in_force is not None, "a plan was adopted"
        return StepScale(
            ratio=batch / self._rules.base_batch,
            rule=self._rule(self.in_force, batch),
            schedule=self._rules.schedule(self.samples_seen),
        )

    def _rule(self, by: InForce, batch: int) -> float:
        """The rule's factor at this point of the run, on the ramp if there is one."""
        base = self._rules.base_batch
        goal = self._rules.lr_rule(batch / base, noise_scale=by.target.noise_scale, base_batch=base)
        if by.ramp is None:
            return goal
        return by.ramp.factor(goal, samples_seen=self.samples_seen, length_samples=self._ramp_samples)

    def branch(self, *, samples: int) -> RunState:
        """A copy that goes its own way from here, over so many samples."""
        branch = copy.copy(self)
        branch.next, branch.end = None, min(self.end, self.samples_seen + samples)
        branch._ramp_samples = 0  # branches are judged at the rate that the rule leads to, not on the way there
        return branch

    def round_due(self, settings: BranchSettings) -> bool:
        """Whether a round of branches should begin here."""
        assert self.in_force is not None, "a plan was adopted"
        every = settings.retry_samples if self.round_waits else settings.every_samples
        return self.samples_seen // every > self.in_force.branched_samples // every

    @property
    def round_waits(self) -> bool:
        """Whether the round that is due here was put off before."""
        return self.in_force is not None and self.in_force.round_waits

    def round_done(self, *, waits: bool = False) -> None:
        """The round that was due here is over, or ``waits`` to be looked at again."""
        assert self.in_force is not None, "a plan was adopted"
        self.in_force = replace(self.in_force, branched_samples=self.samples_seen, round_waits=waits)

    def took(self, batch: int) -> None:
        """A step of ``batch`` samples was taken."""
        self.samples_seen += batch
        self.step += 1
        self.last_batch = batch

    @property
    def moment(self) -> Moment:
        """Before the next step."""
        return Moment(step=self.step, samples_seen=self.samples_seen)

    @property
    def is_over(self) -> bool:
        return self.remaining <= 0

    @property
    def remaining(self) -> int:
        """Samples to the end of the run, or of the branch."""
        return self.end - self.samples_seen

    def passed(self, every_samples: int | None) -> bool:
        """Whether the step just taken passed a multiple of ``every_samples``."""
        before = self.samples_seen - self.last_batch
        return every_samples is not None and is_decision_point(
            before=before, after=self.samples_seen, every_samples=every_samples
        )

    @property
    def decides(self) -> bool:
        """Whether the step just taken is one at which the target is decided."""
        return not self.is_over and self.passed(self._rules.every_samples)
