"""What happens between two steps: what was measured is told, what was asked is heard, and what follows is done.

What is heard may come at the end of any exchange, in the midst of a step's bookkeeping; it is kept, and done at the
boundary, where every rank stands at the same step with the same weights.
"""

from __future__ import annotations

import logging
from typing import final

from orchestrator.config import RunConfig
from orchestrator.errors import CheckpointError, NonFiniteError
from orchestrator.ports import View
from orchestrator.runtime.announcement import Announcement
from orchestrator.runtime.controller_talk import ControllerTalk
from orchestrator.runtime.course import Course
from orchestrator.runtime.exchange import Exchange, OwnStep
from orchestrator.runtime.group_noise import GroupNoise
from orchestrator.runtime.history import History
from orchestrator.runtime.progress import FinishedStep
from orchestrator.runtime.run_state import RunState
from orchestrator.runtime.saving import Saving
from orchestrator.runtime.worker import Worker

logger = logging.getLogger(__name__)


@final
class Boundary:
    """All ranks make the same calls."""

    def __init__(
        self,
        config: RunConfig,
        *,
        worker: Worker,
        course: Course,
        exchange: Exchange,
        groups: GroupNoise,
        saving: Saving,
        talk: ControllerTalk,
        history: History,
        passes_over_non_finite: bool,
    ) -> None:
        self._save_every_samples = config.checkpoint.every_samples
        self._worker = worker
        self._course = course
        self._exchange = exchange
        self._groups = groups
        self._saving = saving
        self._talk = talk
        self._history = history
        self._passes_over_non_finite = passes_over_non_finite
        self._asked = Announcement()  # what was heard and not done yet
        self._stop_reason: str | None = None  # asked for on this rank
        self._stopped = False  # on all

    def begin(self, *, stop: str | None) -> None:
        """``stop`` says why no step is taken, where none is."""
        self._stopped = stop is not None

    def request_stop(self, reason: str) -> None:
        self._stop_reason = reason

    @property
    def is_last(self) -> bool:
        """Whether no further step begins here."""
        return self._state.is_over or self._stopped

    @property
    def stops(self) -> bool:
        """Whether a stop was heard, the same on all ranks."""
        return self._asked.stop or self._stopped

    @property
    def asked(self) -> Announcement:
        """What was heard and not done yet, the same on all ranks."""
        return self._asked

    def go_on_in_another_group(self, asked: Announcement) -> None:
        """``asked`` is what its ranks had heard before it, which newcomers have not."""
        self._asked = asked
        self._exchange.begin_anew()

    def took(self, step: OwnStep) -> None:
        """Collective. A step of the run was taken."""
        self._hear(self._exchange.add(step, stop=self._wants_stop))
        self._groups.add(step)

    def settle(self) -> None:
        """Collective. Exchange what waits, before what needs the controller to know all."""
        self._hear(self._exchange.settle(stop=self._wants_stop))
        self._groups.settle()

    def checkpoint(self, *, why: str) -> str | None:
        """Collective. Its path, or ``None`` where it could not be written, which is said and no reason to end."""
        self.settle()
        state = self._state
        try:
            return self._saving.save(state.moment, in_force=state.in_force, why=why)
        except CheckpointError as error:
            logger.warning("%s", error)
            return None

    def _save_regularly(self) -> None:
        state = self._state
        try:
            self._saving.begin(state.moment, in_force=state.in_force, why="regular")
        except CheckpointError as error:
            logger.warning("%s", error)

    def abandon(self) -> None:
        """Training has failed on this rank: write down what it did, without the others."""
        self._exchange.abandon()

    def cross(self) -> View | None:
        """Collective. Do what is due between the step just taken and the next; the group to go on as, if another."""
        return None if self.branches() else self._do_what_was_asked()

    def give_up(self) -> list[FinishedStep]:
        """A rank is gone: forget what was under way with it; the steps that are known in part."""
        self._asked = Announcement()
        self._groups.give_up()
        self._saving.give_up()
        return self._exchange.give_up()

    def branches(self) -> bool:
        """Collective. Whether the next step belongs to a branch; begins a round of them where one is due."""
        course = self._course
        if course.on_branch:
            self._asked = self._asked.or_else(self._exchange.listen(stop=self._wants_stop))
            if self._asked.interrupts:
                course.take_back()  # the round is due again when the run goes on
                return False
            found = course.go_on_with_round()
            if found is not None:
                self._talk.branched(found, samples_seen=self._state.samples_seen)
        elif course.round_is_due:
            self.settle()
            if not self._asked.interrupts:
                course.begin_round()
        return course.on_branch

    def end(self) -> bool:
        """Collective. Save, and write down how the run ended; whether it reached its last sample."""
        self.settle()
        state = self._state
        path = self._history.end(
            state.moment, in_force=state.in_force, finished=state.is_over, reason=self._stop_reason
        )
        self._worker.report_checkpoint(path)
        return state.is_over

    @property
    def _state(self) -> RunState:
        return self._course.state

    @property
    def _wants_stop(self) -> bool:
        return self._stop_reason is not None

    def _hear(self, heard: Announcement) -> None:
        self._asked = self._asked.or_else(heard)
        if heard.plan is not None:
            self._state.next = heard.plan
        number = self._exchange.first_non_finite
        if number is not None and not self._passes_over_non_finite:
            raise NonFiniteError(
                f"step {number}: the loss is not finite, though its gradient is: a mean over no targets is such a loss "
                "(every target of a micro-batch at ignore_index); the weights have gone on to step "
                f"{self._state.step}. Return a finite loss for such samples, or leave them out, and resume from the "
                "last checkpoint"
            )

    def _do_what_was_asked(self) -> View | None:
        due = self._state.passed(self._save_every_samples) and not self._state.is_over
        if due:
            self.settle()
        heard, self._asked = self._asked, Announcement()
        self._saving.take_in(heard.saved_step)
        if heard.hold and not heard.stop:  # one who asked for a stop would be gone after a resize
            path = self.checkpoint(why="resize")
            if path is not None:
                self._history.close()
                self._worker.hold(path)
            else:
                self._talk.hold_failed()
        elif heard.save and not self._state.is_over:
            path = self.checkpoint(why="asked for")
            if path is not None:
                self._worker.report_checkpoint(path)
        elif due and not heard.regroup:  # it would wait for this one to be written, and so for ever
            self._save_regularly()
        if heard.stop:
            self._stopped = True
        elif heard.regroup and self._saving.is_under_way:
            self._asked = Announcement(regroup=True)  # once that is written: who writes it may be one who leaves
        elif heard.regroup:
            self.settle()
            view: View = self._worker.collective.share(self._talk.view)
            return view
        return None
