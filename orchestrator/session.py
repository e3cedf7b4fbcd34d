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
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.core import cursor
from orchestrator.core.companions import Jump, StepScale, second_moment_factor
from orchestrator.core.cursor import Stream
from orchestrator.core.curvature import CurvatureStats
from orchestrator.errors import CheckpointError, NonFiniteError, SessionError, TaskError
from orchestrator.measure.estimators import find_estimator
from orchestrator.measure.meter import Reading
from orchestrator.ports import Collective
from orchestrator.runtime.announcement import Announcement, StepSums
from orchestrator.runtime.branches import Branches
from orchestrator.runtime.calibration import Calibration
from orchestrator.runtime.curvature import Curvature, LossOf
from orchestrator.runtime.ema import EmaWeights
from orchestrator.runtime.exchange import Exchange, OwnStep
from orchestrator.runtime.group_noise import GroupNoise
from orchestrator.runtime.history import History
from orchestrator.runtime.loader import PositionLoader
from orchestrator.runtime.memory import is_out_of_memory
from orchestrator.runtime.replica import Replica
from orchestrator.runtime.rng import SampleRandomness
from orchestrator.runtime.rules import companions_from, rules_from
from orchestrator.runtime.run_state import RunState
from orchestrator.runtime.step import Step, backward_seed, check_loss
from orchestrator.runtime.transfer import move
from orchestrator.runtime.update import WeightUpdate, check_parts
from orchestrator.runtime.worker import Worker, local_worker
from orchestrator.tasks.protocol import check_dataset
from orchestrator.types import ApplyPlan, BatchPlan, PlanRejected

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
        self._collective = self.worker.collective
        _check_same_length(len(dataset), self._collective)
        rules = rules_from(config, dataset_size=len(dataset), workers_stay=self.worker.workers_stay)
        self._state = RunState(rules, ramp_samples=config.lr_rule.ramp_samples)
        self._replica = Replica(
            model,
            collective=self._collective,
            device=self.worker.device,
            find_unused_parameters=config.train.find_unused_parameters,
        )
        self._update = WeightUpdate(
            optimizer,
            model.parameters(),
            scaler=grad_scaler,
            max_grad_norm=config.train.max_grad_norm,
            device=self.worker.device,
            collective=self._collective,
            base_batch=rules.base_batch,
            companions=companions_from(config),
        )
        half_life = config.train.ema_half_life_samples
        self._ema = None if half_life is None else EmaWeights(model, half_life_samples=half_life)
        self._estimator = find_estimator(config.measure.estimator)
        self._meter = self._estimator.build(model, self._update.trained, config.measure)
        self._calibration = Calibration(config.measure.calibration_samples, meter=self._meter)
        self._loader = PositionLoader(
            dataset,
            collate,
            index_of=Stream(size=len(dataset), seed=config.run.seed).indices,
            seed=config.run.seed,
            loader_workers=config.data.loader_workers,
            prefetch=config.data.prefetch,
            pin_memory=config.data.pin_memory,
            seed_each_sample=config.data.seed_each_sample,
        )
        self._history = History(
            config,
            worker=self.worker,
            model=model,
            optimizer=optimizer,
            rules=rules,
            dataset_size=len(dataset),
            calibration=self._calibration,
            scaler=grad_scaler,
            ema=self._ema,
        )
        self._exchange = Exchange(
            self._collective, self._history, self._calibration, lag_steps=rules.lag_steps, act=rules.act
        )
        self._groups = GroupNoise(
            config,
            model=model,
            optimizer=optimizer,
            trained=self._update.trained,
            collective=self._collective,
            journal=self._history.journal,
        )
        self._curvature = Curvature(
            config,
            model=self._replica.model,
            parameters=self._update.trained,
            dataset=dataset,
            collate=collate,
            worker=self.worker,
            journal=self._history.journal,
        )
        self._randomness = SampleRandomness(config.run.seed, self.worker.device)
        self._step: Step | None = None
        self._asked = Announcement()  # what was heard and not done yet
        self._stop_reason: str | None = None  # asked for on this rank
        self._stopped: str | None = None  # on all
        self._trunk = self._state  # beside a branch
        self._branches = Branches(
            rules.branching,
            model=model,
            optimizer=optimizer,
            scaler=grad_scaler,
            collective=self._collective,
            device=self.worker.device,
        )
        resumed = self._history.begin(resume=resume)
        self._state.begin(
            step=resumed.step, samples_seen=resumed.samples_seen, pending=resumed.pending, in_force=resumed.in_force
        )
        self._adopt(resumed.now)

    # What the user's loop calls

    @property
    def model(self) -> nn.Module:
        """What to call in the forward pass."""
        return self._replica.module

    @property
    def step_number(self) -> int:
        """Steps taken, from the beginning of the run."""
        return self._state.step

    @property
    def samples_seen(self) -> int:
        """Samples trained on, from the beginning of the run."""
        return self._state.samples_seen

    @property
    def on_branch(self) -> bool:
        """Whether the step at hand belongs to a branch, whose changes are taken back (``controller.policy: branched``).

        ``step_number`` and ``samples_seen`` are the branch's meanwhile.
        """
        return self._branches.under_way

    @property
    def plan(self) -> BatchPlan:
        """How the step at hand is cut and shared out."""
        return self._at_hand.plan

    @property
    def lr_factor(self) -> float:
        """What schedule and rule multiply the base learning rates by in the step at hand, from the samples seen."""
        return self._state.scale(self._at_hand.plan.batch).lr

    def __iter__(self) -> Iterator[Iterator[Any]]:
        """One item an optimizer step; each is an iterator over the micro-batches that this rank takes."""
        self._on_branches()  # due where the run stopped
        while not self._state.is_over and self._stopped is None:
            step = self._begin_step()
            yield self._micro_batches(step)
            if step.again:
                continue
            if not step.finished:
                raise SessionError(
                    f"step {self.step_number} was not finished: call session.step() after its micro-batches"
                )
            if not self._on_branches():
                self._at_boundary()
        self._end()

    def backward(self, loss: Tensor | Callable[[], Tensor]) -> Tensor | None:
        """Run the backward pass of one micro-batch, weighted by its samples; returns the detached mean loss.

        Given a callable that computes the loss, a micro-batch that runs out of memory there or in a pass that does
        not synchronise is given up on all ranks together: ``None`` is returned, the micro-batch is halved, and the
        same samples come again.
        """
        step = self._at_hand
        self._check_own_weights()
        size, last = step.take_micro_batch()
        synchronises = last and self._collective.world_size > 1
        started = False
        try:
            value = loss() if callable(loss) else loss
            check_loss(value)
            started = True
            # Divided, not multiplied by the reciprocal: what a plain loop writes, to the last bit.
            divisor = step.plan.batch / (size * self._collective.world_size)
            with self._update.part(share=size / step.plan.batch, loss_scale=step.loss_scale / divisor):
                self._update.scaled(value / divisor).backward(backward_seed(value))
        except Exception as error:
            # Once a synchronising backward pass has begun, other ranks may hold half of its all-reduces.
            if not is_out_of_memory(error) or (started and synchronises):
                raise
            del error
            self._give_up(step, size)
            return None
        mean = value.detach()
        self._meter.end_micro_batch(size=size, loss=mean, loss_scale=step.loss_scale / divisor)
        self._groups.end_micro_batch(size=size, loss_scale=step.loss_scale / divisor)
        step.done += 1
        return mean

    def step(self) -> None:
        """Update the weights on every rank, or on none; exchange what was measured when it is time."""
        step = self._at_hand
        self._check_own_weights()
        step.check_complete(self.step_number)
        self._randomness.end()
        if step.done == 0 or step.rejected is not None:
            self._replica.take_part(spoil=step.rejected is not None)
        reading = self._meter.read(grad_scale=step.loss_scale)
        if (step.rejected is not None or not reading.grad_is_finite) and not self._goes_on(step, reading):
            return
        scale = self._state.scale(step.plan.batch)
        self._groups.read(grad_scale=step.loss_scale)
        self._update.apply(scale)
        step.finished = True
        if self.on_branch:
            self._branches.took(step.plan.batch, step.loss_sum(reading))
            return
        self._state.took(step.plan.batch)
        if self._ema is not None:
            self._ema.update(step.plan.batch, samples_seen=self.samples_seen)
        own = self._own(step, reading, scale)
        self._hear(self._exchange.add(own, stop=self._stop_reason is not None))
        self._groups.add(own)
        if self.evaluation_due:
            self._settle()
        if self._calibration.is_over(self.samples_seen):
            self._settle()
            self._calibration.conclude(self._history.journal, step=own.step, samples_seen=self.samples_seen)
        if self._state.is_over:
            # Before anything else of the user's is called: a metric that raises must not cost what was trained.
            self._checkpoint(why="the end")

    def request_stop(self, reason: str) -> None:
        """Stop soon, with a checkpoint. Any rank may ask; all stop together.

        One process stops after the step at hand. Several hear of it at their next exchange: within a step when steps
        are long, within about half a second (at most 17 steps) when they are short.
        """
        self._stop_reason = reason

    @property
    def evaluation_due(self) -> bool:
        """Whether the step just finished is one after which the config asks for an evaluation."""
        finished = self._step is not None and self._step.finished and not self.on_branch
        return finished and (self._state.is_over or self._state.passed(self.config.evaluation.every_samples))

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within it the model has the averaged weights of ``train.ema_half_life_samples``, for an evaluation::

            if session.evaluation_due:
                with session.ema_weights():
                    session.record_evaluation(evaluate(session.model))

        Without an average (the key is null) the model keeps its own. Buffers, such as BatchNorm's running means, are
        the model's own in either case. Training within it is refused with ``SessionError``.
        """
        return nullcontext() if self._ema is None else self._ema.in_place()

    def record_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Write an evaluation's numbers to the run's folder."""
        self._history.journal.evaluation(metrics, step=self.step_number - 1, samples_seen=self.samples_seen)

    @property
    def curvature_due(self) -> bool:
        """Whether the step just finished is one after which the config asks for the Hessian-weighted noise scale."""
        finished = self._step is not None and self._step.finished and not self._curvature.is_refused
        return finished and not self.on_branch and self._state.passed(self.config.measure.curvature_every_samples)

    def measure_curvature(self, loss_of: LossOf) -> CurvatureStats | None:
        """Collective. Measure it, on the training set in an order of its own, and write it down as an event.

        ``loss_of(model, batch)`` is the mean loss of a batch, computed with the plain module it is given. Training goes
        on as if nothing had happened. ``None`` for a model whose loss cannot be differentiated twice: the reason is
        written down, and ``curvature_due`` is false from then on. Each call reads other samples. Raises
        ``SessionError`` within a step, whose own measurement it would spoil.
        """
        if self.on_branch:
            raise SessionError("measure_curvature() was called on a branch, which is given up: ask session.on_branch")
        if self._step is not None and not (self._step.finished or self._step.again):
            raise SessionError(
                f"measure_curvature() was called within step {self.step_number}, whose gradients are being measured: "
                "call it after session.step()"
            )
        # Their hooks would see the gradients computed here; the next step attaches them again.
        self._meter.close()
        self._groups.close()
        return self._curvature.measure(
            loss_of,
            micro_batch=self._state.plan.micro_batch,
            step=self.step_number - 1,
            samples_seen=self.samples_seen,
        )

    def close(self) -> None:
        if self.on_branch:  # the loop was left in the midst of one: the model is the trunk's again
            self._leave_branches()
        self._randomness.end()
        self._loader.close()
        self._meter.close()
        self._update.close()
        self._groups.close()
        self._history.journal.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._exchange.abandon()
            self._history.journal.fault(error, step=self.step_number, samples_seen=self.samples_seen)
        self.close()

    # One step, in order

    def _check_own_weights(self) -> None:
        if self._ema is not None:
            self._ema.check_not_in_place()

    @property
    def _at_hand(self) -> Step:
        if self._step is None:
            raise SessionError("no step has begun: backward() and step() belong inside the loop over the session")
        return self._step

    def _begin_step(self) -> Step:
        if (due := self._state.due()) is not None:
            self._adopt(due)
            self._history.journal.adopted(due, step=self.step_number, samples_seen=self.samples_seen)
        plan = self._state.plan_of_step()
        measured = self._estimator.parts(plan) >= 2 and self.step_number % self.config.measure.every_steps == 0
        measured = measured and not self.on_branch
        repeats = self._step is not None and self._step.again
        self._step = Step(
            plan=plan,
            spans=plan.spans(self._collective.rank),
            measured=measured,
            loss_scale=self._update.loss_scale,
            began_s=self.worker.now(),
        )
        self._meter.begin_step(measure=measured)
        self._update.begin_step()
        self._groups.begin_step(measure=measured and plan.num_micro_batches >= 2)
        self._replica.begin_step(again=repeats)
        return self._step

    def _micro_batches(self, step: Step) -> Iterator[Any]:
        for number, (offset, size) in enumerate(step.spans):
            position, last = self.samples_seen + offset, number == len(step.spans) - 1
            batch = move(self._loader.take(position, size), self.worker.device, non_blocking=True)
            # Dropout belongs to the samples, not to the rank that happens to compute them.
            self._randomness.begin(position)
            with self._replica.synchronising(last):
                step.micro = (size, last)
                yield batch
            self._randomness.end()
            if step.rejected is not None:
                return
            if step.micro is not None:
                raise SessionError("a micro-batch was passed over: call session.backward() once for each")

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
            parts=self._estimator.parts(step.plan),
            measured=step.measured,
            mean_grad_sq=reading.mean_grad_sq,
            part_mean_grad_sq=None if part is None else part.mean_grad_sq,
            sums=StepSums(
                weighted_sq_sum=reading.weighted_sq_sum,
                loss_sum=step.loss_sum(reading),
                part_weighted_sq_sum=0.0 if part is None else part.weighted_sq_sum,
            ),
            step_time_s=self.worker.now() - step.began_s,
            decides=self._state.decides,
        )

    def _settle(self) -> None:
        """Collective. Exchange what waits, before what needs the controller to know all."""
        self._hear(self._exchange.settle(stop=self._stop_reason is not None))
        self._groups.settle()

    def _hear(self, heard: Announcement) -> None:
        self._asked = self._asked.or_else(heard)
        if heard.plan is not None:
            self._state.next = heard.plan
        if self._exchange.first_non_finite is not None and self._update.scaler is None:
            self._stop_on_late_non_finite(self._exchange.first_non_finite)

    def _at_boundary(self) -> None:
        due = self._state.passed(self.config.checkpoint.every_samples) and not self._state.is_over
        if due:
            self._settle()
        heard, self._asked = self._asked, Announcement()
        if heard.hold and not heard.stop:  # one who asked for a stop would be gone after a resize
            path = self._checkpoint(why="resize")
            if path is not None:
                self._history.journal.close()
                self.worker.hold(path)
            else:
                self._history.hold_failed()
        elif due or (heard.save and not self._state.is_over):
            path = self._checkpoint(why="asked for" if heard.save else "regular")
            if path is not None:
                self.worker.report_checkpoint(path)
        if heard.stop:
            self._stopped = self._stop_reason or "another rank was asked to stop"

    def _on_branches(self) -> bool:
        """Whether the next step belongs to a branch; begins a round of them where one is due."""
        if self.on_branch:
            self._asked = self._asked.or_else(self._exchange.listen(stop=self._stop_reason is not None))
            if self._asked.interrupts:
                self._leave_branches()  # the round is due again when the run goes on
                return False
            before, found = self._state, self._branches.go_on()
            if found is not None:
                self._leave_branches()
                self._history.branched(found, samples_seen=self.samples_seen)
            elif self._branches.state is not before:
                self._begin_branch()
        elif self._branches.due(self._state):
            self._settle()
            if not self._asked.interrupts:
                self._begin_round()
        return self.on_branch

    def _begin_round(self) -> None:
        self._trunk = self._state
        waited = self._trunk.round_waits
        problem = self._branches.begin(self._trunk, noise_scale=self._history.journal.noise_scale)
        if problem is None:
            self._begin_branch()
        elif not (waited and self._trunk.round_waits):  # said once
            self._history.journal.event(
                "branches_put_off", reason=problem, step=self.step_number, samples_seen=self.samples_seen
            )

    def _begin_branch(self) -> None:
        self._state = self._branches.state
        self._adopt(self._branches.plan())

    def _leave_branches(self) -> None:
        if self.on_branch:
            self._branches.give_up()
        self._state = self._trunk
        self._set_course()

    def _end(self) -> None:
        self._settle()
        self.finished = self._state.is_over
        path = self._history.end(
            step=self.step_number,
            samples_seen=self.samples_seen,
            in_force=self._state.in_force,
            finished=self.finished,
            reason=self._stopped,
        )
        if path is not None:
            self.worker.report_checkpoint(path)

    def _checkpoint(self, *, why: str) -> str | None:
        self._settle()
        try:
            return self._history.save(
                step=self.step_number, samples_seen=self.samples_seen, in_force=self._state.in_force, why=why
            )
        except CheckpointError as error:
            logger.warning("%s", error)
            return None

    # What seldom happens

    def _adopt(self, apply: ApplyPlan) -> None:
        jump = self._state.adopt(apply)
        if jump is not None:
            self._carry_over(jump)
        self._set_course()

    def _set_course(self) -> None:
        state = self._state
        self._loader.set_course(
            cursor.steps(state.plan, self._collective.rank, position=state.samples_seen, total_samples=state.end)
        )

    def _carry_over(self, jump: Jump) -> None:
        self._update.carry_over(jump)
        if self.config.lr_rule.second_moment == "rescale" and not self.on_branch:
            factor = second_moment_factor(jump)
            reason = f"averaged squares of the gradient x {factor:.4g}: batch {jump.old_batch} to {jump.new_batch}"
            if jump.noise_scale is None:
                reason = "averaged squares of the gradient left as they are: the noise scale is not known"
            self._history.journal.event(
                "second_moment", reason=reason, step=self.step_number, samples_seen=self.samples_seen, factor=factor
            )

    def _give_up(self, step: Step, size: int) -> None:
        step.rejected = size // 2  # zero when not even one sample fits: all ranks are told before they give up
        self._update.discard()
        if self.worker.device.type == "cuda":
            torch.cuda.empty_cache()

    def _goes_on(self, step: Step, reading: Reading) -> bool:
        """Find out together why the mean gradient is not finite, and whether the step may go on.

        Memory that ran out somewhere: the step begins again, smaller. A loss or a gradient that is not finite: the run
        ends before it reaches the weights, unless an AMP scaler is there to pass over the step.
        """
        limits = [0.0] * self._collective.world_size
        if step.rejected is not None:
            limits[self._collective.rank] = 1.0 + step.rejected
        *limits, loss_sum = self._collective.sum([*limits, step.loss_sum(reading)])
        self._settle()
        if any(limits):
            if self.on_branch:  # the kept state took the room, which the trunk will have again
                self._update.discard()
                self._leave_branches()
                self._state.round_done()
                self._history.journal.event(
                    "branches_put_off",
                    reason="memory ran out on a branch",
                    step=self.step_number,
                    samples_seen=self.samples_seen,
                )
                step.finished = True
            else:
                self._redo_smaller([int(limit) - 1 for limit in limits])
                step.again = True
            return False
        if self._update.scaler is None and not (math.isfinite(loss_sum) and self._meter.is_finite()):
            if self.on_branch:
                self._update.discard()
                self._branches.diverged()
                step.finished = True
                return False
            self._stop_on_non_finite(step, loss=loss_sum / step.plan.batch)
        return True

    def _redo_smaller(self, limits: list[int]) -> None:
        """``limits`` by rank: the most samples to try next, negative where memory sufficed."""
        limit = min(x for x in limits if x >= 0)
        if limit == 0:
            raise SessionError(
                f"rank {limits.index(0)}: a micro-batch of one sample does not fit in memory; use a smaller model or "
                "sample, or a device with more memory"
            )
        self._replica.restore_buffers()
        if (part := self.config.optimizer.part_samples) is not None:
            self._update.discard()
            raise SessionError(
                f"rank {limits.index(limit)}: a micro-batch of {part} samples does not fit in memory, and "
                f"optimizer.part_samples says that a part has {part}: cut smaller, it would be another optimizer; "
                f"begin a new run with optimizer.part_samples: {limit} or less, or on a device with more memory"
            )
        planned = self._history.replan(
            PlanRejected(max_micro_batch=limit), step=self.step_number, samples_seen=self.samples_seen
        )
        self._update.discard()
        self._adopt(planned.now)
        if self._state.next is not None:
            # The decision on its way was cut for micro-batches that are now known not to fit.
            self._state.next = planned.pending

    def _stop_on_non_finite(self, step: Step, *, loss: float) -> None:
        first, last = self.samples_seen, self.samples_seen + step.plan.batch - 1
        what = "the loss" if not math.isfinite(loss) else "the gradient"
        self._update.discard()
        self._replica.restore_buffers()
        path = self._checkpoint(why="before a non-finite step")
        saved = "could not be saved" if path is None else f"are saved in {path}"
        raise NonFiniteError(
            f"step {self.step_number}: {what} is not finite (loss {loss}) on stream positions {first} to {last}; the "
            f"step was not taken and the weights before it {saved}; lower optimizer.lr, set "
            "train.max_grad_norm, or look at those samples"
        )

    def _stop_on_late_non_finite(self, number: int) -> None:
        raise NonFiniteError(
            f"step {number}: the loss is not finite, though its gradient is: a mean over no targets is such a loss "
            f"(every target of a micro-batch at ignore_index); the weights have gone on to step {self.step_number}. "
            "Return a finite loss for such samples, or leave them out, and resume from the last checkpoint"
        )


def _check_same_length(size: int, collective: Collective) -> None:
    mine = [0.0] * collective.world_size
    mine[collective.rank] = float(size)
    sizes = [int(x) for x in collective.sum(mine)]
    if len(set(sizes)) > 1:
        raise TaskError(
            f"the ranks' data sets differ in length ({', '.join(map(str, sizes))} samples): each rank must see "
            "the same data, all of it; the samples are shared out by position"
        )
