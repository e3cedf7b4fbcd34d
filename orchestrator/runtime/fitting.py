"""How large a micro-batch fits on every worker? Found by trying before the first step, where the config asks for it."""

from __future__ import annotations

from typing import final

from orchestrator.config import RunConfig
from orchestrator.core import controller
from orchestrator.core.controller import Rules
from orchestrator.core.fitting import largest_fitting
from orchestrator.errors import SessionError
from orchestrator.runtime.controller_talk import ControllerTalk
from orchestrator.runtime.course import Course
from orchestrator.runtime.curvature import LossOf
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.trials import MEMORIES, Trials
from orchestrator.runtime.worker import Worker
from orchestrator.types import PlanRejected, Target


@final
class Fitting:
    """All ranks make the same calls."""

    def __init__(
        self,
        config: RunConfig,
        rules: Rules,
        *,
        dataset_size: int,
        worker: Worker,
        trials: Trials,
        course: Course,
        journal: Journal,
        talk: ControllerTalk,
    ) -> None:
        self._wanted = config.batch.find_micro_batch
        self._given = config.batch.micro_batch
        self._rules = rules
        self._largest_batch = min(config.batch.max, dataset_size)
        self._worker = worker
        self._trials = trials
        self._course = course
        self._journal = journal
        self._talk = talk
        self._asked = False

    def check_asked(self) -> None:
        """Raises ``SessionError`` where the config wants the search and the user's loop left it out."""
        if self._wanted and not self._asked:
            raise SessionError(
                "batch.find_micro_batch is true, and nothing was looked for: call session.find_micro_batch(loss_of) "
                "before the loop over the session, or remove the key"
            )

    def find(self, loss_of: LossOf) -> None:
        """Collective. Find the largest micro-batch that fits, and see to it that no plan has a larger one."""
        self._asked = True
        state = self._course.state
        if not self._wanted or state.step > 0:
            return  # a run that goes on has kept what was found
        began_s, kind = self._worker.now(), self._worker.device.type
        if kind not in MEMORIES:
            reason = f"batch.micro_batch stays {self._given}: on a device of type {kind} what fits cannot be tried out"
            self._journal.event("micro_batch_not_sought", reason=reason, step=0, samples_seen=0)
            return
        most = self._largest_ever()
        start = min(state.plan.micro_batch, most)
        with self._trials.of(loss_of, MEMORIES[kind](self._worker.device)) as fits:
            found = largest_fitting(fits, start=start, most=most)
        if found == 0:
            raise SessionError(
                "a micro-batch of one sample does not fit in the memory of every worker, beside weights, gradients "
                "and the optimizer's state; use a smaller model or sample, or a device with more memory"
            )
        self._journal.event(
            "micro_batch_found",
            reason=f"{found} samples at once fit on every worker; no plan of this run has more than {most}",
            step=0,
            samples_seen=0,
            micro_batch=found,
            duration_s=self._worker.now() - began_s,
        )
        if found < most:
            planned = self._talk.replan(PlanRejected(max_micro_batch=found), at=state.moment)
            self._course.adopt(planned.now)

    def _largest_ever(self) -> int:
        """The most samples that any plan of this run computes at once."""
        begun = controller.init(self._rules, world_size=1)
        return controller.plan_for(begun, Target(batch=self._largest_batch), self._rules).micro_batch
