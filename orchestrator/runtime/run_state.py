"""Where does the run stand, and what is it set to do there? The clock in samples, and the plans now and next."""

from __future__ import annotations

from typing import final

from orchestrator.core import cursor
from orchestrator.core.controller import Rules, is_decision_point
from orchestrator.types import ApplyPlan, BatchPlan, Target


@final
class RunState:
    """The same on every rank. ``begin`` comes first; ``next`` is a plan that waits for its step."""

    step: int
    samples_seen: int
    plan: BatchPlan
    target: Target

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.next: ApplyPlan | None = None
        self._last_batch = 0

    def begin(self, *, step: int, samples_seen: int, pending: ApplyPlan | None) -> None:
        self.step, self.samples_seen, self.next = step, samples_seen, pending

    def adopt(self, apply: ApplyPlan) -> None:
        self.plan, self.target = apply.plan, apply.target

    def due(self) -> ApplyPlan | None:
        """The next plan, if its step has come; it is handed out once."""
        if self.next is None or self.next.effective_step != self.step:
            return None
        due, self.next = self.next, None
        return due

    def plan_of_step(self) -> BatchPlan:
        """The plan in force, cut to what is left of the run."""
        return cursor.last_plan(self.plan, remaining=self._rules.total_samples - self.samples_seen)

    def lr_factor(self, batch: int) -> float:
        """What the base learning rates are multiplied by in a step of ``batch`` samples that begins here."""
        base = self._rules.base_batch
        rule = self._rules.lr_rule(batch / base, noise_scale=self.target.noise_scale, base_batch=base)
        return self._rules.schedule(self.samples_seen) * rule

    def took(self, batch: int) -> None:
        """A step of ``batch`` samples was taken."""
        self.samples_seen += batch
        self.step += 1
        self._last_batch = batch

    @property
    def is_over(self) -> bool:
        return self.samples_seen >= self._rules.total_samples

    def passed(self, every_samples: int | None) -> bool:
        """Whether the step just taken passed a multiple of ``every_samples``."""
        before = self.samples_seen - self._last_batch
        return every_samples is not None and is_decision_point(
            before=before, after=self.samples_seen, every_samples=every_samples
        )

    @property
    def decides(self) -> bool:
        """Whether the step just taken is one at which the target is decided."""
        return not self.is_over and self.passed(self._rules.every_samples)
