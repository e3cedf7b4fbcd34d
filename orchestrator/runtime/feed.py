"""What does a step hand out to the caller's loop, and what is made ready before its first micro-batch?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from orchestrator.config import RunConfig
from orchestrator.errors import SessionError
from orchestrator.measure.estimators import find_estimator
from orchestrator.measure.meter import Meter
from orchestrator.runtime.course import Course
from orchestrator.runtime.group_noise import GroupNoise
from orchestrator.runtime.loader import PositionLoader
from orchestrator.runtime.parallel import ModelReplica
from orchestrator.runtime.peers import Peers
from orchestrator.runtime.reproducible_step import ReproducibleStep
from orchestrator.runtime.rng import SampleRandomness
from orchestrator.runtime.step import Step
from orchestrator.runtime.transfer import move
from orchestrator.runtime.update import WeightUpdate
from orchestrator.runtime.worker import Worker


@final
class Feed:
    def __init__(
        self,
        config: RunConfig,
        *,
        worker: Worker,
        peers: Peers,
        course: Course,
        loader: PositionLoader,
        replica: ModelReplica,
        update: WeightUpdate,
        reproducible: ReproducibleStep | None,
        meter: Meter,
        groups: GroupNoise,
    ) -> None:
        self._every_steps = config.measure.every_steps
        self._estimator = find_estimator(config.measure.estimator)
        self._randomness = SampleRandomness(config.run.seed, worker.device)
        self._worker = worker
        self._peers = peers
        self._course = course
        self._loader = loader
        self._replica = replica
        self._update = update
        self._reproducible = reproducible
        self._meter = meter
        self._groups = groups

    def begin(self, *, again: bool) -> Step:
        """Make ready for the step that comes next, or that is taken ``again`` with the same samples."""
        self._course.adopt_due()
        state = self._course.state
        plan = state.plan_of_step()
        parts = self._estimator.parts(plan)
        measured = parts >= 2 and state.step % self._every_steps == 0 and not self._course.on_branch
        rank = max(0, self._worker.rank)  # one that is in no group yet rehearses by itself
        step = Step(
            plan=plan,
            spans=plan.spans(rank),
            company=self._replica.company(plan, rank),
            parts=parts,
            measured=measured,
            loss_scale=self._update.loss_scale,
            began_s=self._worker.now(),
        )
        self._meter.begin_step(measure=measured)
        self._update.begin_step()
        self._groups.begin_step(measure=measured and plan.num_micro_batches >= 2)
        self._replica.begin_step(again=again)
        if self._reproducible is not None and not self._peers.rehearses:
            self._reproducible.begin(plan)
        return step

    def micro_batches(self, step: Step) -> Iterator[Any]:
        """This rank's of the step; for each that is handed out the caller computes a loss and its gradient."""
        for number, (offset, size) in enumerate((*step.spans, *step.company)):
            position, last = self._course.state.samples_seen + offset, number == len(step.spans) - 1
            step.weightless = number >= len(step.spans)
            samples = self._loader.take(position, size, off_course=step.weightless)
            batch = move(samples, self._worker.device, non_blocking=True)
            # Dropout belongs to the samples, not to the rank that happens to compute them.
            self._randomness.begin(position)
            if self._reproducible is not None and not self._peers.rehearses:
                self._reproducible.begin_micro_batch()
            with self._replica.synchronising(last):
                step.micro = (size, last)
                yield batch
            self._randomness.end()
            if step.is_given_up:
                return
            if step.micro is not None:
                raise SessionError("a micro-batch was passed over: call session.backward() once for each")

    def end(self) -> None:
        """The step at hand has its gradients, or the loop was left in its midst: the generators are the caller's."""
        self._randomness.end()

    def close(self) -> None:
        self.end()
        self._loader.close()
