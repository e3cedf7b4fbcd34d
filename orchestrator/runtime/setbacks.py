"""What is done about a step that cannot be taken: memory ran out on some rank, or a number is not finite.

Every rank finds out from the mean gradient, which all have alike, that something is wrong; only then do they ask each
other what. Nobody is left waiting, and no such step reaches the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch

from orchestrator.config import RunConfig
from orchestrator.errors import NonFiniteError, SessionError
from orchestrator.measure.meter import Meter, Reading
from orchestrator.runtime.boundary import Boundary
from orchestrator.runtime.controller_talk import ControllerTalk
from orchestrator.runtime.course import Course
from orchestrator.runtime.parallel import ModelReplica
from orchestrator.runtime.step import Step
from orchestrator.runtime.update import WeightUpdate
from orchestrator.runtime.worker import Worker
from orchestrator.types import PlanRejected


@final
class Setbacks:
    def __init__(
        self,
        config: RunConfig,
        *,
        worker: Worker,
        replica: ModelReplica,
        update: WeightUpdate,
        meter: Meter,
        course: Course,
        boundary: Boundary,
        talk: ControllerTalk,
    ) -> None:
        self._part_samples = config.optimizer.part_samples
        self._worker = worker
        self._replica = replica
        self._update = update
        self._meter = meter
        self._course = course
        self._boundary = boundary
        self._talk = talk

    def give_up(self, step: Step, size: int) -> None:
        """A micro-batch of ``size`` samples ran out of memory on this rank; the others hear of it in ``go_on``."""
        step.rejected = size // 2  # zero when not even one sample fits: all ranks are told before they give up
        self._replica.give_up()
        self._update.discard()
        if self._worker.device.type == "cuda":
            torch.cuda.empty_cache()

    def go_on(self, step: Step, reading: Reading) -> bool:
        """Collective. Find out why the mean gradient is not finite, and whether the step may be taken all the same.

        Memory that ran out somewhere: the step begins again, smaller. A loss or a gradient that is not finite: the run
        ends before it reaches the weights, unless an AMP scaler is there to pass over the step.
        """
        collective = self._worker.collective
        limits = [0.0] * collective.world_size
        if step.rejected is not None:
            limits[collective.rank] = 1.0 + step.rejected
        *limits, loss_sum = collective.sum([*limits, step.loss_sum(reading)])
        self._boundary.settle()
        if any(limits):
            if self._course.on_branch:  # the kept state took the room, which the run will have again
                self._update.discard()
                self._course.give_up_round("memory ran out on a branch")
                step.finished = True
            else:
                self._redo_smaller([int(limit) - 1 for limit in limits])
                step.again = True
            return False
        if self._update.scaler is None and not (math.isfinite(loss_sum) and self._meter.is_finite()):
            if self._course.on_branch:
                self._update.discard()
                self._course.end_branch()
                step.finished = True
                return False
            self._end_before(step, loss=loss_sum / step.plan.batch)
        return True

    def _redo_smaller(self, limits: Sequence[int]) -> None:
        """``limits`` by rank: the most samples to try next, negative where memory sufficed."""
        limit = min(x for x in limits if x >= 0)
        if limit == 0:
            raise SessionError(
                f"rank {limits.index(0)}: a micro-batch of one sample does not fit in memory; use a smaller model or "
                "sample, or a device with more memory"
            )
        self._replica.restore_buffers()
        if (part := self._part_samples) is not None:
            self._update.discard()
            raise SessionError(
                f"rank {limits.index(limit)}: a micro-batch of {part} samples does not fit in memory, and "
                f"optimizer.part_samples says that a part has {part}: cut smaller, it would be another optimizer; "
                f"begin a new run with optimizer.part_samples: {limit} or less, or on a device with more memory"
            )
        state = self._course.state
        planned = self._talk.replan(PlanRejected(max_micro_batch=limit), at=state.moment)
        self._update.discard()
        self._course.adopt(planned.now)
        if state.next is not None:
            # The decision on its way was cut for micro-batches that are now known not to fit.
            state.next = planned.pending

    def _end_before(self, step: Step, *, loss: float) -> None:
        state = self._course.state
        first, last = state.samples_seen, state.samples_seen + step.plan.batch - 1
        what = "the loss" if not math.isfinite(loss) else "the gradient"
        self._update.discard()
        self._replica.restore_buffers()
        path = self._boundary.checkpoint(why="before a non-finite step")
        saved = "could not be saved" if path is None else f"are saved in {path}"
        raise NonFiniteError(
            f"step {state.step}: {what} is not finite (loss {loss}) on stream positions {first} to {last}; the "
            f"step was not taken and the weights before it {saved}; lower optimizer.lr, set "
            "train.max_grad_norm, or look at those samples"
        )
