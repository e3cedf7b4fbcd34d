"""What training is set to: the plan in force, and, while a branch is tried, the run that it goes back to.

The run's own state and a branch's are of one kind, so whoever takes a step asks for ``state`` and need not know which
of the two it is.
"""

from __future__ import annotations

from typing import final

from orchestrator.config import RunConfig
from orchestrator.core import cursor
from orchestrator.core.companions import Jump, second_moment_factor
from orchestrator.core.controller import Rules
from orchestrator.ports import Collective
from orchestrator.runtime.branches import Branches
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.loader import PositionLoader
from orchestrator.runtime.progress import Resumed
from orchestrator.runtime.run_state import RunState
from orchestrator.runtime.update import WeightUpdate
from orchestrator.types import ApplyPlan, Branched


@final
class Course:
    """All ranks make the same calls; ``begin`` comes first."""

    def __init__(
        self,
        config: RunConfig,
        rules: Rules,
        *,
        collective: Collective,
        branches: Branches,
        loader: PositionLoader,
        update: WeightUpdate,
        journal: Journal,
    ) -> None:
        self._rescales = config.lr_rule.second_moment == "rescale"
        self._run = RunState(rules, ramp_samples=config.lr_rule.ramp_samples)
        self._collective = collective
        self._branches = branches
        self._loader = loader
        self._update = update
        self._journal = journal

    def begin(self, resumed: Resumed) -> None:
        self._run.begin(
            step=resumed.step,
            samples_seen=resumed.samples_seen,
            pending=resumed.pending,
            in_force=resumed.in_force,
            last_batch=resumed.last_batch,
        )
        self.adopt(resumed.now)

    @property
    def state(self) -> RunState:
        """Of the branch under way, or of the run."""
        return self._branches.state if self.on_branch else self._run

    @property
    def run_step(self) -> int:
        """Steps of the run taken, whatever branch is under way."""
        return self._run.step

    @property
    def on_branch(self) -> bool:
        return self._branches.under_way

    def took(self, batch: int, *, loss_sum: float) -> None:
        """A step of ``batch`` samples was taken; ``loss_sum`` is over this rank's part of them."""
        if self.on_branch:
            self._branches.took(batch, loss_sum)
        else:
            self._run.took(batch)

    def adopt_due(self) -> None:
        """Train by the plan that was to take effect at the step that begins here, if there is one."""
        state = self.state
        if (due := state.due()) is not None:
            self.adopt(due)
            self._journal.adopted(due, step=state.step, samples_seen=state.samples_seen)

    def adopt(self, apply: ApplyPlan) -> None:
        """Train by this plan from here on."""
        jump = self.state.adopt(apply)
        if jump is not None:
            self._carry_over(jump)
        self._read_ahead()

    # Branches

    @property
    def round_is_due(self) -> bool:
        return not self.on_branch and self._branches.due(self._run)

    def begin_round(self) -> None:
        """Collective. Begin the round of branches that is due, or say why it is put off."""
        waited = self._run.round_waits
        problem = self._branches.begin(self._run, noise_scale=self._journal.noise.scale)
        if problem is None:
            self.adopt(self._branches.plan())
        elif not (waited and self._run.round_waits):  # said once
            self._put_off(problem)

    def go_on_with_round(self) -> Branched | None:
        """Collective after a step on a branch. What the round found, when this was its last step."""
        before, found = self.state, self._branches.go_on()
        if found is not None:
            self._read_ahead()
        elif self.state is not before:
            self.adopt(self._branches.plan())
        return found

    def end_branch(self) -> None:
        """The step at hand diverged, and the branch under way with it."""
        self._branches.diverged()

    def take_back(self) -> None:
        """Leave the branch under way, if there is one; its round is due again."""
        if self.on_branch:
            self._branches.give_up()
            self._read_ahead()

    def give_up_round(self, why: str) -> None:
        """Leave the branch under way, and the round with it."""
        self.take_back()
        self._run.round_done()
        self._put_off(why)

    def _put_off(self, why: str) -> None:
        run = self._run
        self._journal.event("branches_put_off", reason=why, step=run.step, samples_seen=run.samples_seen)

    # What follows from a plan

    def _read_ahead(self) -> None:
        state, rank = (
            self.state,
            max(0, self._collective.rank),
        )  # of the rehearsal of one that is in no group yet: its own
        self._loader.set_course(cursor.steps(state.plan, rank, position=state.samples_seen, total_samples=state.end))

    def _carry_over(self, jump: Jump) -> None:
        self._update.carry_over(jump)
        if not self._rescales or self.on_branch:
            return
        factor = second_moment_factor(jump)
        reason = f"averaged squares of the gradient x {factor:.4g}: batch {jump.old_batch} to {jump.new_batch}"
        if jump.noise_scale is None:
            reason = "averaged squares of the gradient left as they are: the noise scale is not known"
        run = self._run
        self._journal.event("second_moment", reason=reason, step=run.step, samples_seen=run.samples_seen, factor=factor)
