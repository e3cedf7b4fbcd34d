"""The training loop one can read aloud: fetch, forward and backward, measure, decide, apply, record.

A user who owns the loop writes

    with Session(config, model=model, optimizer=optimizer, dataset=dataset) as session:
        for step in session:
            for batch in step:
                session.backward(lambda: loss_function(session.model, batch))
            session.step()

and the same lines run on one process, under torchrun and under Ray Train. Accumulation, weighting, noise measurement,
the learning rate, changes of plan and checkpoints happen inside; the model and the optimizer are not patched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.core.companions import StepScale
from orchestrator.core.curvature import CurvatureStats
from orchestrator.errors import SessionError, StorageError
from orchestrator.measure.meter import Reading
from orchestrator.runtime.announcement import StepSums
from orchestrator.runtime.assembly import assemble
from orchestrator.runtime.curvature import LossOf
from orchestrator.runtime.exchange import OwnStep
from orchestrator.runtime.memory import is_out_of_memory
from orchestrator.runtime.points import after_step, before_step
from orchestrator.runtime.regrouping import rehearsal
from orchestrator.runtime.sharding import is_sharded
from orchestrator.runtime.step import Step, backward_seed, check_loss
from orchestrator.runtime.update import check_parts
from orchestrator.runtime.worker import Worker, local_worker
from orchestrator.tasks.protocol import check_dataset
from orchestrator.types import BatchPlan

logger = logging.getLogger(__name__)


@final
class Session:
    """One rank's part of a run. All ranks make the same calls.

    ``dataset`` is map-style; ``loss`` values given to ``backward`` are means over the samples of their micro-batch.
    The learning rates found in ``optimizer`` are the base of the schedule and the rule.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        worker: Worker | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        resume: bool = False,
    ) -> None:
        check_dataset(dataset)
        check_parts(config, optimizer)
        self.config = config
        self.worker = local_worker(config) if worker is None else worker
        self.optimizer = optimizer
        self.finished = False
        parts = assemble(
            config,
            worker=self.worker,
            model=model,
            optimizer=optimizer,
            scaler=grad_scaler,
            dataset=dataset,
            collate=collate,
        )
        self._replica = parts.replica
        self._update = parts.update
        self._reproducible = parts.reproducible
        self._ema = parts.ema
        self._meter = parts.meter
        self._calibration = parts.calibration
        self._groups = parts.groups
        self._curvature = parts.curvature
        self._history = parts.history
        self._course = parts.course
        self._boundary = parts.boundary
        self._setbacks = parts.setbacks
        self._fitting = parts.fitting
        self._peers = parts.peers
        self._feed = parts.feed
        self._step: Step | None = None
        if self._peers.rehearses:
            self._course.begin(rehearsal(parts.rules))
            return
        resumed = self._history.begin(resume=resume)
        self._course.begin(resumed)
        self._boundary.begin(stop=resumed.stop)

    # What the user's loop calls

    @property
    def model(self) -> nn.Module:
        """What to call in the forward pass."""
        return self._replica.module

    @property
    def step_number(self) -> int:
        """Steps taken, from the beginning of the run."""
        return self._course.state.step

    @property
    def samples_seen(self) -> int:
        """Samples trained on, from the beginning of the run."""
        return self._course.state.samples_seen

    @property
    def on_branch(self) -> bool:
        """Whether the step at hand belongs to a branch, whose changes are taken back (``controller.policy: branched``).

        ``step_number`` and ``samples_seen`` are the branch's meanwhile.
        """
        return self._course.on_branch

    @property
    def plan(self) -> BatchPlan:
        """How the step at hand is cut and shared out."""
        return self._at_hand.plan

    @property
    def lr_factor(self) -> float:
        """What schedule and rule multiply the base learning rates by in the step at hand, from the samples seen."""
        return self._course.state.scale(self._at_hand.plan.batch).lr

    @property
    def left(self) -> bool:
        """Whether this worker was asked to go: the loop ends, and the others go on."""
        return self._peers.left

    @property
    def rehearsing(self) -> bool:
        """Whether the step at hand is a rehearsal, by a worker that has yet to join the others.

        It takes real samples through the whole loop once, so that everything is loaded and compiled, and changes
        nothing.
        """
        return self._peers.rehearses

    def __iter__(self) -> Iterator[Iterator[Any]]:
        """One item an optimizer step; each is an iterator over the micro-batches that this rank takes."""
        if self._peers.rehearses:
            yield self._feed.micro_batches(self._begin_step())
            self._step = None
            self._peers.join()
        else:
            self._fitting.check_asked()
            if not self._boundary.is_last:
                self._boundary.branches()  # due where the run stopped
        while not self._boundary.is_last and not self.left:
            step = self._begin_step()
            yield self._feed.micro_batches(step)
            if step.again:
                continue
            if not step.finished:
                raise SessionError(
                    f"step {self.step_number} was not finished: call session.step() after its micro-batches"
                )
            self._peers.cross()
        if not self.left:
            self.finished = bool(self._peers.outlive(self._boundary.end, at=before_step(self.step_number)))

    def find_micro_batch(self, loss_of: LossOf) -> None:
        """Collective, before the loop. Find the largest micro-batch that fits, where ``batch.find_micro_batch`` is set.

        ``loss_of(model, batch)`` is the mean loss of a batch, computed with the plain module it is given. Training
        begins as if nothing had happened, in micro-batches of at most what was found. Does nothing in a run that goes
        on, which remembers it. Raises ``SessionError`` where not even one sample fits.
        """
        if not self._peers.rehearses:  # the others know it
            self._fitting.find(loss_of)

    def backward(self, loss: Tensor | Callable[[], Tensor]) -> Tensor | None:
        """Run the backward pass of one micro-batch, weighted by its samples; returns the detached mean loss.

        Given a callable that computes the loss, a micro-batch that runs out of memory there or in a pass that does
        not synchronise is given up on all ranks together: ``None`` is returned, the micro-batch is halved, and the
        same samples come again. ``None`` is also returned for a micro-batch that another rank trains on and this one
        computes to keep it company (``train.parallel: fsdp2``).
        """
        step = self._at_hand
        self._check_own_weights()
        if step.lost is not None:
            return None
        size, last = step.take_micro_batch()
        averaged = 1 if self._reproducible is not None else self.worker.world_size  # ranks whose gradients DDP averages
        self._peers.beat(waits=last and self.worker.world_size > 1)
        started = False
        try:
            value = loss() if callable(loss) else loss
            check_loss(value)
            started = True
            # Divided, not multiplied by the reciprocal: what a plain loop writes, to the last bit.
            divisor = step.plan.batch / (size * averaged)
            with self._update.part(share=size / step.plan.batch, loss_scale=step.loss_scale / divisor):
                self._update.scaled(value / divisor).backward(backward_seed(value, weightless=step.weightless))
        except Exception as error:
            step.lost = self._peers.lost(error)
            if step.lost is not None:
                return None
            if not is_out_of_memory(error) or not self._replica.can_give_up(in_backward=started, last=last):
                raise
            del error
            self._setbacks.give_up(step, size)
            return None
        if step.weightless:
            return None
        mean = value.detach()
        self._meter.end_micro_batch(size=size, loss=mean, loss_scale=step.loss_scale / divisor)
        self._groups.end_micro_batch(size=size, loss_scale=step.loss_scale / divisor)
        if self._reproducible is not None and not self._peers.rehearses:
            self._reproducible.end_micro_batch()
        step.done += 1
        return mean

    def step(self) -> None:
        """Update the weights on every rank, or on none; exchange what was measured when it is time.

        Where a worker was lost, those that are left take the step again with the same samples.
        """
        step = self._at_hand
        self._check_own_weights()
        step.check_complete(self.step_number)
        self._feed.end()
        if self._peers.rehearses:
            self._peers.end_rehearsal(step)
            return
        self._peers.beat(waits=True)
        if step.lost is None:
            try:
                self._take(step)
            except Exception as error:
                step.lost = self._peers.lost(error)
                if step.lost is None:
                    raise
        if step.lost is not None:
            self._peers.recover(step)
        self._peers.beat(waits=False)

    def request_stop(self, reason: str) -> None:
        """Stop soon, with a checkpoint. Any rank may ask; all stop together.

        One process stops after the step at hand. Several hear of it at their next exchange: within a step when steps
        are long, within about half a second (at most 17 steps) when they are short.
        """
        self._boundary.request_stop(reason)

    @property
    def evaluation_due(self) -> bool:
        """Whether the step just finished is one after which the config asks for an evaluation.

        Once a stop was heard there is none but the last one: who stops a run may give it no time for more.
        """
        finished = self._step is not None and self._step.finished and not self.on_branch
        state = self._course.state
        due = state.passed(self.config.evaluation.every_samples) and not self._boundary.stops
        return finished and (state.is_over or due) and not self._peers.are_beyond(self._behind_step)

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within it the model has the averaged weights of ``train.ema_half_life_samples``, for an evaluation::

            if session.evaluation_due:
                with session.ema_weights():
                    session.record_evaluation(evaluate(session.model))

        Without an average (the key is null) the model keeps its own. Buffers, such as BatchNorm's running means, are
        the model's own in either case. Training within it is refused with ``SessionError``.
        """
        return nullcontext() if self._ema is None else self._ema.in_place()

    def evaluate(self, metrics: Callable[[], Mapping[str, float]]) -> None:
        """Collective. Record what ``metrics`` gives, and where a worker is lost meanwhile, call it again.

        It is called within ``ema_weights``. With ``record_evaluation`` a loss is a restart from the last checkpoint.
        """

        def averaged() -> Mapping[str, float]:
            with self.ema_weights():
                return metrics()

        found = self._peers.outlive(averaged, at=self._behind_step)
        if found is not None:
            self.record_evaluation(found)

    def record_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Write an evaluation's numbers to the run's folder."""
        self._history.journal.evaluation(metrics, step=self.step_number - 1, samples_seen=self.samples_seen)

    @property
    def curvature_due(self) -> bool:
        """Whether the step just finished is one after which the config asks for the Hessian-weighted noise scale.

        None once a stop was heard.
        """
        finished = self._step is not None and self._step.finished and not self._curvature.is_refused
        state = self._course.state
        return (
            finished
            and not self._peers.are_beyond(self._behind_step)
            and not self._boundary.stops
            and not self.on_branch
            and state.passed(self.config.measure.curvature_every_samples)
        )

    def measure_curvature(self, loss_of: LossOf) -> CurvatureStats | None:
        """Collective. Measure it, on the training set in an order of its own, and write it down as an event.

        ``loss_of(model, batch)`` is the mean loss of a batch, computed with the plain module it is given. Training goes
        on as if nothing had happened. ``None`` for a model whose loss cannot be differentiated twice: the reason is
        written down, and ``curvature_due`` is false from then on. Each call reads other samples. Raises
        ``SessionError`` within a step, whose own measurement it would spoil.
        """
        if self.on_branch:
            raise SessionError("measure_curvature() was called on a branch, which is given up: ask session.on_branch")
        if is_sharded(self._replica.model):
            raise SessionError(
                "measure_curvature() differentiates the loss twice, which sharded layers do not allow: leave it out, "
                "or write train.parallel: ddp"
            )
        if self._step is not None and not (self._step.finished or self._step.again):
            raise SessionError(
                f"measure_curvature() was called within step {self.step_number}, whose gradients are being measured: "
                "call it after session.step()"
            )
        # Their hooks would see the gradients computed here; the next step attaches them again.
        self._meter.close()
        self._groups.close()
        return self._peers.outlive(
            lambda: self._curvature.measure(
                loss_of,
                micro_batch=self._course.state.plan.micro_batch,
                step=self.step_number - 1,
                samples_seen=self.samples_seen,
            ),
            at=self._behind_step,
        )

    def close(self) -> None:
        self._course.take_back()  # where the loop was left in the midst of a branch: the model is the run's again
        self._feed.close()
        self._meter.close()
        self._update.close()
        self._groups.close()
        self._history.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._boundary.abandon()
            self._history.journal.fault(error, step=self.step_number, samples_seen=self.samples_seen)
        try:
            self.close()
        except StorageError as lost:
            if error is None:
                raise
            logger.error("%s", lost)  # what training ended with is raised

    # One step, in order

    def _check_own_weights(self) -> None:
        if self._ema is not None:
            self._ema.check_not_in_place()

    @property
    def _behind_step(self) -> int:
        """The point of the run behind the step just taken."""
        return after_step(self.step_number - 1)

    @property
    def _at_hand(self) -> Step:
        if self._step is None:
            raise SessionError("no step has begun: backward() and step() belong inside the loop over the session")
        return self._step

    def _begin_step(self) -> Step:
        self._step = self._feed.begin(again=self._step is not None and self._step.again)
        return self._step

    def _take(self, step: Step) -> None:
        if step.done == 0 or step.rejected is not None:
            self._replica.take_part(spoil=step.rejected is not None)
        if self._reproducible is not None:
            self._reproducible.finish(spoil=step.rejected is not None)
        reading = self._meter.read(grad_scale=step.loss_scale)
        if self._reproducible is not None:
            reading = self._reproducible.summable(reading)
        if (step.rejected is not None or not reading.grad_is_finite) and not self._setbacks.go_on(step, reading):
            return
        state = self._course.state
        scale = state.scale(step.plan.batch)
        self._groups.read(grad_scale=step.loss_scale)
        self._update.apply(scale)
        step.finished = True
        self._course.took(step.plan.batch, loss_sum=step.loss_sum(reading))
        if self.on_branch:
            return
        if self._ema is not None:
            self._ema.update(step.plan.batch, samples_seen=self.samples_seen)
        own = self._own(step, reading, scale)
        self._boundary.took(own)
        if self.evaluation_due:
            self._boundary.settle()  # where a stop may be heard, and no evaluation be due any more
        if self._calibration.is_over(self.samples_seen):
            self._boundary.settle()
            self._calibration.conclude(self._history.journal, step=own.step, samples_seen=self.samples_seen)
        if state.is_over:
            # Before anything else of the user's is called: a metric that raises must not cost what was trained.
            self._boundary.checkpoint(why="the end")

    def _own(self, step: Step, reading: Reading, scale: StepScale) -> OwnStep:
        """The step just taken, as this rank knows it."""
        before, part = self.samples_seen - step.plan.batch, reading.part
        return OwnStep(
            step=self.step_number - 1,
            samples_seen=self.samples_seen,
            plan=step.plan,
            spans=[(before + offset, size) for offset, size in step.spans],
            lr=self._update.lr,
            rule_lr=self._update.base_lr * scale.lr,
            parts=step.parts,
            measured=step.measured,
            mean_grad_sq=reading.mean_grad_sq,
            part_mean_grad_sq=None if part is None else part.mean_grad_sq,
            sums=StepSums(
                weighted_sq_sum=reading.weighted_sq_sum,
                loss_sum=step.loss_sum(reading),
                part_weighted_sq_sum=0.0 if part is None else part.weighted_sq_sum,
            ),
            step_time_s=self.worker.now() - step.began_s,
            decides=self._course.state.decides,
        )
