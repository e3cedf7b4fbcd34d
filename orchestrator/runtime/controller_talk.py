"""What is said between the ranks and the controller while a run goes on, and when is it said?

Rank zero speaks for all: it hands on what was measured, asks for decisions as they come due, and announces them with
what was asked meanwhile, by the controller, at the desk or for the storage's sake. What it was told of the steps all
ranks keep, for any of them may have to speak next.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

from orchestrator.config import RunConfig
from orchestrator.core import codec
from orchestrator.ports import View, Welcome
from orchestrator.runtime import folder
from orchestrator.runtime.announcement import Announcement
from orchestrator.runtime.budget_watch import BudgetWatch
from orchestrator.runtime.control import ControlDesk, standing_orders
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.progress import FinishedStep, Moment
from orchestrator.runtime.saving import Saving
from orchestrator.runtime.worker import Worker
from orchestrator.types import ApplyPlan, Branched, Event

_RECENT = 1024  # steps; far more than a controller in another process has not heard of yet


@final
class ControllerTalk:
    """All ranks call what is not said to be rank zero's."""

    def __init__(
        self,
        config: RunConfig,
        *,
        run: Path,
        worker: Worker,
        journal: Journal,
        desk: ControlDesk,
        budget: BudgetWatch,
        saving: Saving,
    ) -> None:
        self._keeps_ledger = config.ledger
        self._patience_s = config.recovery.storage_patience_s
        self._run = run
        self._stop_request = str(run / folder.STOP_REQUEST)  # looked for at every exchange
        self._worker = worker
        self._journal = journal
        self._desk = desk
        self._budget = budget
        self._saving = saving
        self._told = Moment(step=0, samples_seen=0)
        self._announced: ApplyPlan | None = None
        self._recent: deque[FinishedStep] = deque(maxlen=_RECENT)  # known to all ranks, where the group may change
        self.stop_reason: str | None = None  # the controller's; rank zero's, like the next two
        self.storage_trouble: str | None = None  # that the run ends for
        self.view: View | None = None  # of the group that the controller asked for last

    # As rank zero begins to speak

    def begin_at(self, at: Moment) -> None:
        """All that was before that moment is known; to any rank, for each may have to go on in rank zero's place."""
        self._told = at

    def begin(self, welcome: Welcome) -> None:
        """Rank zero's: the controller has welcomed the run."""
        self.welcomed(welcome)
        self.attend()

    def welcomed(self, welcome: Welcome) -> None:
        """Rank zero's: the controller has said what to do from here on."""
        self._announced = welcome.pending

    def attend(self) -> None:
        """Rank zero's: tell the controller what the folder knows, the orders that stand and what the run has cost.

        Raises what comes of reading what another version wrote.
        """
        standing = standing_orders(self._run)
        if standing is not None:
            self._desk.begin(standing, self._worker.controller, self._told)
        self.stop_reason = self._budget.begin(self._worker.controller, self._told) or self.stop_reason

    # What rank zero announces

    def speak(self, said: Announcement, *, decided_at: Sequence[int], rest_steps: int) -> Announcement:
        """Rank zero's announcement: the decisions that are due, and what was asked meanwhile.

        Waits for a decision whose answer is late.
        """
        controller = self._worker.controller
        self._budget.look(controller, self._told)
        commands = controller.commands()
        self.stop_reason = commands.stop or self.stop_reason
        self.view = commands.regroup or self.view
        for note in commands.notes:
            self._journal.note(note, step=None, samples_seen=None)
        self._desk.take(controller, self._told, coming=self._coming)
        plan = None
        for step in decided_at:
            action = controller.answer(step)
            self._journal.decision(step, action)
            plan = action if isinstance(action, ApplyPlan) else plan
        self._announced = plan or self._announced
        requested = os.path.exists(self._stop_request) or self._desk.wants_stop or self._gives_up_on_storage()
        return replace(
            said,
            plan=plan,
            stop=said.stop or self.stop_reason is not None or requested,  # said again, should a rank be lost by then
            hold=commands.hold is not None,
            regroup=commands.regroup is not None,
            save=self._desk.asks_to_save() or commands.save is not None or self._saving.tries_again(),
            saved_step=self._saving.written_step,
            rest_steps=rest_steps,
        )

    def hear(self, decided_at: Sequence[int]) -> None:
        """The other ranks', as rank zero speaks: it writes those decisions down."""
        self._journal.forget_decisions(decided_at)

    def _gives_up_on_storage(self) -> bool:
        """Whether the folder could not be written for longer than the config is patient."""
        trouble = self._journal.storage_trouble(self._patience_s) or self._saving.trouble
        self.storage_trouble = trouble or self.storage_trouble
        return trouble is not None

    def _coming(self) -> ApplyPlan | None:
        """The decision on its way. Waits for it to be taken, where that is due."""
        for step in self._journal.decisions_on_their_way:
            action = self._worker.controller.answer(step)
            if isinstance(action, ApplyPlan):
                return action
        before = self._announced
        return before if before is not None and before.effective_step > self._told.step else None

    # What the controller is told

    @property
    def told(self) -> Moment:
        """Before which step: the first of which this rank does not know what all ranks measured."""
        return self._told

    def steps(self, finished: Sequence[FinishedStep]) -> None:
        """Collective when the ledger is kept. Take in finished steps, in order."""
        if self._keeps_ledger:
            self._journal.ledger(finished, self._worker.collective.gather([list(step.spans) for step in finished]))
        self._take_in(finished)

    def steps_in_part(self, finished: Sequence[FinishedStep]) -> None:
        """Take in steps that a rank took part in which is gone, with what it measured of them."""
        if self._keeps_ledger:
            self._journal.planned_ledger(finished)
        self._take_in(finished)

    def _take_in(self, finished: Sequence[FinishedStep]) -> None:
        for step in finished:
            if self._worker.rank == 0:
                self._worker.controller.post(step.measured)
            sample = step.measured.sample
            self._told = Moment(step=sample.step + 1, samples_seen=sample.samples_seen)
        if self._worker.membership is not None:
            self._recent.extend(finished)
        self._journal.steps(finished)

    def without_the_others(self, finished: Sequence[FinishedStep]) -> None:
        """Steps of which only rank zero's part is known; a ledger cannot vouch for them, and leaves them out."""
        if not self._keeps_ledger:
            self._journal.steps(finished)

    def recent(self, *, since: int) -> list[FinishedStep]:
        """Steps from that one on of which this rank knows what all ranks measured, but for those long gone."""
        return [step for step in self._recent if step.measured.sample.step >= since]

    def catch_up(self, recent: Sequence[FinishedStep], *, told: Moment) -> None:
        """Know what another rank knows."""
        self._recent.extend(step for step in recent if step.measured.sample.step >= self._told.step)
        self._told = told

    def replan(self, event: Event, *, at: Moment) -> Welcome:
        """Collective. Hand over an event that changes the plan at once."""
        mine = self._worker.controller.replan(event) if self._worker.rank == 0 else None
        welcome: Welcome = self._worker.collective.share(mine)
        self._journal.event(
            "plan_rejected",
            reason=welcome.now.reason,
            step=at.step,
            samples_seen=at.samples_seen,
            micro_batch=welcome.now.plan.micro_batch,
            cause=codec.encode(event),
        )
        return welcome

    def branched(self, found: Branched, *, samples_seen: int) -> None:
        """Hand over what a round of branches found."""
        if self._worker.rank != 0:
            return
        self._worker.controller.post(found)
        losses = [[multiple * found.batch, loss] for multiple, loss in found.losses]
        said = ", ".join(f"{'none' if loss is None else format(loss, '.4g')} at {batch}" for batch, loss in losses)
        self._journal.event(
            "branches",
            reason=f"branches of the same samples end with loss {said}",
            step=found.step,
            samples_seen=samples_seen,
            losses=losses,
            cause=codec.encode(found),
        )

    def hold_failed(self) -> None:
        """The checkpoint of a resize could not be written: training goes on as it is."""
        if self._journal.is_open:
            self._worker.controller.hold_failed()
