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
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.core import cursor
from orchestrator.core.controller import is_decision_point
from orchestrator.core.cursor import Stream
from orchestrator.core.schedules import Schedule, ScheduleSettings, build_schedule
from orchestrator.errors import CheckpointError, ConfigError, NonFiniteError, SessionError, TaskError
from orchestrator.measure.micro_batch import GradMeter, Reading
from orchestrator.ports import Collective
from orchestrator.runtime.announcement import Announcement, StepSums
from orchestrator.runtime.exchange import Exchange, OwnStep
from orchestrator.runtime.history import History, Resumed
from orchestrator.runtime.loader import PositionLoader, move
from orchestrator.runtime.memory import is_out_of_memory
from orchestrator.runtime.replica import Replica
from orchestrator.runtime.rng import seeded
from orchestrator.runtime.rules import rules_from
from orchestrator.runtime.worker import Worker, local_worker
from orchestrator.tasks.protocol import check_dataset
from orchestrator.types import ApplyPlan, BatchPlan, PlanRejected, Target

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
        self.config = config
        self.worker = local_worker(config) if worker is None else worker
        _check_same_length(len(dataset), self.worker.collective)
        self.optimizer = optimizer
        self._collective = self.worker.collective
        self._rules = rules_from(config, dataset_size=len(dataset))
        try:
            self._schedule: Schedule = build_schedule(
                ScheduleSettings(**config.schedule.settings()), total_samples=self._rules.total_samples
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._replica = Replica(
            model,
            collective=self._collective,
            device=self.worker.device,
            find_unused_parameters=config.train.find_unused_parameters,
        )
        self._meter = GradMeter(model.parameters(), device=self.worker.device)
        self._scaler = grad_scaler
        self._stream = Stream(size=len(dataset), seed=config.run.seed)
        self._loader = PositionLoader(
            dataset,
            collate,
            index_of=self._stream.indices,
            seed=config.run.seed,
            loader_workers=config.data.loader_workers,
            prefetch=config.data.prefetch,
            pin_memory=config.data.pin_memory,
            seed_each_sample=config.data.seed_each_sample,
        )
        self._history = History(
            config, worker=self.worker, model=model, optimizer=optimizer, rules=self._rules, scaler=grad_scaler
        )
        self._exchange = Exchange(self._collective, self._history, lag_steps=self._rules.lag_steps, act=self._rules.act)
        self._step = _StepState()
        self._next: ApplyPlan | None = None
        self._asked = Announcement()  # what was heard and not done yet
        self._stop: str | None = None
        self.finished = False
        self._begin(self._history.begin(resume=resume, dataset_size=len(dataset)))

    # What the user's loop calls

    @property
    def model(self) -> nn.Module:
        """What to call in the forward pass."""
        return self._replica.module

    @property
    def plan(self) -> BatchPlan:
        """How the step at hand is cut and shared out."""
        return self._step.plan

    @property
    def lr_factor(self) -> float:
        """What the base learning rates are multiplied by in the step at hand, computed afresh from the samples seen."""
        rule = self._rules.lr_rule(
            self._step.plan.batch / self._rules.base_batch,
            noise_scale=self._target.noise_scale,
            base_batch=self._rules.base_batch,
        )
        return self._schedule(self.samples_seen) * rule

    def __iter__(self) -> Iterator[Iterator[Any]]:
        """One item an optimizer step; each is an iterator over the micro-batches that this rank takes."""
        while self.samples_seen < self._rules.total_samples and self._stop is None:
            number = self.step_number
            self._begin_step()
            yield self._micro_batches()
            if self.step_number == number and not self._step.redo:
                raise SessionError(f"step {number} was not finished: call session.step() after its micro-batches")
            if not self._step.redo:
                self._at_boundary()
        self._end()

    def backward(self, loss: Tensor | Callable[[], Tensor]) -> Tensor | None:
        """Run the backward pass of one micro-batch, weighted by its samples; returns the detached mean loss.

        Given a callable that computes the loss, a micro-batch that runs out of memory there or in a pass that does
        not synchronise is given up on all ranks together: ``None`` is returned, the micro-batch is halved, and the
        same samples come again.
        """
        micro = self._step.micro
        if micro is None:
            raise SessionError("backward() belongs inside the loop over a step's micro-batches, once for each")
        size, last = micro
        self._step.micro = None
        synchronises = last and self._collective.world_size > 1
        started = False
        try:
            value = loss() if callable(loss) else loss
            _check_loss(value)
            started = True
            # Divided, not multiplied by the reciprocal: what a plain loop writes, to the last bit.
            divisor = self._step.plan.batch / (size * self._collective.world_size)
            scaled = value / divisor
            seed = _backward_seed(value)
            (scaled if self._scaler is None else self._scaler.scale(scaled)).backward(seed)
        except Exception as error:
            # Once a synchronising backward pass has begun, other ranks may hold half of its all-reduces.
            if not is_out_of_memory(error) or (started and synchronises):
                raise
            del error
            self._give_up(size)
            return None
        mean = value.detach()
        self._meter.end_micro_batch(size=size, loss=mean, loss_scale=self._step.amp_scale / divisor)
        self._step.done += 1
        return mean

    def step(self) -> None:
        """Update the weights on every rank, or on none; exchange what was measured when it is time."""
        step = self._step
        if step.plan is None or step.finished:
            raise SessionError("step() belongs inside the loop over the session, once after a step's micro-batches")
        if step.done != len(step.spans) and step.rejected is None:
            raise SessionError(
                f"step {self.step_number}: {step.done} of {len(step.spans)} micro-batches went through backward()"
            )
        if step.done == 0 or step.rejected is not None:
            self._replica.take_part(spoil=step.rejected is not None)
        reading = self._meter.read(grad_scale=step.amp_scale)
        if (step.rejected is not None or not math.isfinite(reading.mean_grad_sq)) and not self._is_whole(reading):
            return
        factor = self.lr_factor
        self._update_weights(factor)
        step.finished = True
        self._hear(self._exchange.add(self._own(reading, factor), stop=step.stop is not None))
        if self.evaluation_due:
            self._settle()
        if self._is_last:
            # Before anything else of the user's is called: a metric that raises must not cost what was trained.
            self._checkpoint(why="the end")

    def request_stop(self, reason: str) -> None:
        """Stop after the step at hand, with a checkpoint. Any rank may ask; all stop together."""
        self._step.stop = reason

    @property
    def evaluation_due(self) -> bool:
        """Whether the step just finished is one after which the config asks for an evaluation."""
        return self._is_last or self._passed(self.config.evaluation.every_samples)

    def record_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Write an evaluation's numbers to the run's folder."""
        self._history.evaluation(metrics, step=self.step_number - 1, samples_seen=self.samples_seen)

    def close(self) -> None:
        self._loader.close()
        self._meter.close()
        self._history.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._history.fault(error, step=self.step_number, samples_seen=self.samples_seen)
        self.close()

    # One step, in order

    def _begin(self, resumed: Resumed) -> None:
        self.step_number = resumed.step
        self.samples_seen = resumed.samples_seen
        self._adopt(resumed.now)
        self._next = resumed.pending

    def _begin_step(self) -> None:
        if self._next is not None and self._next.effective_step == self.step_number:
            self._adopt(self._next)
            self._history.adopted(self._next, step=self.step_number, samples_seen=self.samples_seen)
            self._next = None
        plan = cursor.last_plan(self._plan, remaining=self._rules.total_samples - self.samples_seen)
        every = self.config.measure.every_steps
        measure = plan.num_micro_batches >= 2 and self.step_number % every == 0
        self._step = _StepState(
            plan=plan,
            spans=plan.spans(self._collective.rank),
            measure=measure,
            amp_scale=1.0 if self._scaler is None else self._scaler.get_scale(),
            began=self.worker.now(),
            stop=self._step.stop,
            again=self._step.redo,
        )
        self._meter.begin_step(measure=measure)
        if not self._step.again:
            self._replica.keep_buffers()

    def _micro_batches(self) -> Iterator[Any]:
        step = self._step
        for number, (offset, size) in enumerate(step.spans):
            position, last = self.samples_seen + offset, number == len(step.spans) - 1
            batch = move(self._loader.take(position, size), self.worker.device, non_blocking=True)
            # Dropout belongs to the samples, not to the rank that happens to compute them.
            with seeded(self.config.run.seed, position, self.worker.device), self._replica.synchronising(last):
                step.micro = (size, last)
                yield batch
            if step.rejected is not None:
                return
            if step.micro is not None:
                raise SessionError("a micro-batch was passed over: call session.backward() once for each")

    def _is_whole(self, reading: Reading) -> bool:
        """Find out together why the mean gradient is not finite, and whether the step may go on.

        Memory that ran out somewhere: the step begins again, smaller. A loss or a gradient that is not finite: the run
        ends before it reaches the weights, unless an AMP scaler is there to pass over the step.
        """
        limits = [0.0] * self._collective.world_size
        if self._step.rejected is not None:
            limits[self._collective.rank] = 1.0 + self._step.rejected
        *limits, loss_sum = self._collective.sum([*limits, self._loss_sum(reading)])
        self._settle()
        if any(limits):
            self._redo_smaller([int(limit) - 1 for limit in limits])
            return False
        if self._scaler is None and not (math.isfinite(loss_sum) and self._meter.is_finite()):
            self._stop_on_non_finite(loss_sum / self._step.plan.batch)
        return True

    def _loss_sum(self, reading: Reading) -> float:
        """Over the samples of the micro-batches that this rank took."""
        return sum(size * loss for (_, size), loss in zip(self._step.spans, reading.losses, strict=False))

    def _own(self, reading: Reading, lr_factor: float) -> OwnStep:
        """The step just finished, as this rank knows it."""
        step, after = self._step, self.samples_seen
        before = after - step.plan.batch
        return OwnStep(
            step=self.step_number - 1,
            samples_seen=after,
            plan=step.plan,
            spans=[(before + offset, size) for offset, size in step.spans],
            lr=self._base_lrs[0] * lr_factor,
            measured=step.measure,
            mean_grad_sq=reading.mean_grad_sq,
            sums=StepSums(weighted_sq_sum=reading.weighted_sq_sum, loss_sum=self._loss_sum(reading)),
            step_time_s=self.worker.now() - step.began,
            decides=not self._is_last and self._passed(self._rules.every_samples),
        )

    @property
    def _is_last(self) -> bool:
        """Whether the step just finished ends the run."""
        return self.samples_seen >= self._rules.total_samples

    def _passed(self, every_samples: int | None) -> bool:
        """Whether the step just finished passed a multiple of ``every_samples``."""
        before = self.samples_seen - self._step.plan.batch
        return every_samples is not None and is_decision_point(
            before=before, after=self.samples_seen, every_samples=every_samples
        )

    def _settle(self) -> None:
        """Collective. Exchange what waits, before what needs the controller to know all."""
        self._hear(self._exchange.settle(stop=self._step.stop is not None))

    def _hear(self, heard: Announcement) -> None:
        self._asked = self._asked.or_else(heard)
        if heard.plan is not None:
            self._next = heard.plan

    def _update_weights(self, factor: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if self.config.train.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._replica.model.parameters(), self.config.train.max_grad_norm)
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.samples_seen += self._step.plan.batch
        self.step_number += 1

    def _at_boundary(self) -> None:
        due = self._passed(self.config.checkpoint.every_samples) and not self._is_last
        if due:
            self._settle()
        heard, self._asked = self._asked, Announcement()
        if heard.hold:
            path = self._checkpoint(why="resize")
            if path is not None:
                self._history.close()
                self.worker.hold(path)
            else:
                self._history.hold_failed()
        elif due or (heard.save and not self._is_last):
            path = self._checkpoint(why="asked for" if heard.save else "regular")
            if path is not None:
                self.worker.report_checkpoint(path)
        if heard.stop:
            self._stop = self._step.stop or "another rank was asked to stop"

    def _end(self) -> None:
        self._settle()
        self.finished = self._is_last
        path = self._history.end(
            step=self.step_number, samples_seen=self.samples_seen, finished=self.finished, reason=self._stop
        )
        if path is not None:
            self.worker.report_checkpoint(path)

    # What seldom happens

    def _adopt(self, apply: ApplyPlan) -> None:
        self._plan, self._target = apply.plan, Target(batch=apply.target.batch, noise_scale=apply.target.noise_scale)
        self._loader.set_course(
            cursor.steps(
                self._plan,
                self._collective.rank,
                position=self.samples_seen,
                total_samples=self._rules.total_samples,
            )
        )

    def _give_up(self, size: int) -> None:
        self._step.rejected = size // 2  # zero when not even one sample fits: all ranks are told before they give up
        self.optimizer.zero_grad(set_to_none=True)
        if self.worker.device.type == "cuda":
            torch.cuda.empty_cache()

    def _redo_smaller(self, limits: list[int]) -> None:
        """``limits`` by rank: the most samples to try next, negative where memory sufficed."""
        limit = min(x for x in limits if x >= 0)
        if limit == 0:
            raise SessionError(
                f"rank {limits.index(0)}: a micro-batch of one sample does not fit in memory; use a smaller model or "
                "sample, or a device with more memory"
            )
        self._replica.restore_buffers()
        planned = self._history.replan(
            PlanRejected(max_micro_batch=limit), step=self.step_number, samples_seen=self.samples_seen
        )
        self.optimizer.zero_grad(set_to_none=True)
        self._adopt(planned.now)
        if self._next is not None:
            # The decision on its way was cut for micro-batches that are now known not to fit.
            self._next = planned.pending
        self._step.redo = True

    def _stop_on_non_finite(self, loss: float) -> None:
        first, last = self.samples_seen, self.samples_seen + self._step.plan.batch - 1
        what = "the loss" if not math.isfinite(loss) else "the gradient"
        self.optimizer.zero_grad(set_to_none=True)
        self._replica.restore_buffers()
        path = self._checkpoint(why="before a non-finite step")
        saved = "could not be saved" if path is None else f"are saved in {path}"
        raise NonFiniteError(
            f"step {self.step_number}: {what} is not finite (loss {loss}) on stream positions {first} to {last}; the "
            f"step was not taken and the weights before it {saved}; lower optimizer.lr, set "
            "train.max_grad_norm, or look at those samples"
        )

    def _checkpoint(self, *, why: str) -> str | None:
        self._settle()
        try:
            return self._history.save(step=self.step_number, samples_seen=self.samples_seen, why=why)
        except CheckpointError as error:
            logger.warning("%s", error)
            return None


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise SessionError(f"the loss is of type {type(loss).__name__}; backward() wants a scalar tensor, the mean")
    if loss.dim() != 0:
        raise SessionError(f"the loss has shape {tuple(loss.shape)}; backward() wants the mean, a scalar")
    if not loss.requires_grad:
        raise SessionError(
            "the loss carries no gradient: it was detached, computed under no_grad, or does not depend on the model"
        )


def _backward_seed(loss: Tensor) -> Tensor | None:
    """One, which is what autograd begins with by itself; NaN for a loss that is not finite.

    Every rank then sees such a loss in the mean gradient, even one whose own gradient is finite.
    """
    if loss.device.type == "cpu" and math.isfinite(loss.item()):
        return None
    return loss.detach() * 0 + 1  # a device is not waited for


def _check_same_length(size: int, collective: Collective) -> None:
    mine = [0.0] * collective.world_size
    mine[collective.rank] = float(size)
    sizes = [int(x) for x in collective.sum(mine)]
    if len(set(sizes)) > 1:
        raise TaskError(
            f"the ranks' data sets differ in length ({', '.join(map(str, sizes))} samples): each rank must see "
            "the same data, all of it; the samples are shared out by position"
        )


class _StepState:
    """What is known of the step at hand; begun afresh for each."""

    __slots__ = (
        "again",
        "amp_scale",
        "began",
        "done",
        "finished",
        "measure",
        "micro",
        "plan",
        "redo",
        "rejected",
        "spans",
        "stop",
    )  # fmt: skip

    def __init__(
        self,
        *,
        plan: BatchPlan | None = None,
        spans: tuple[tuple[int, int], ...] = (),
        measure: bool = False,
        amp_scale: float = 1.0,
        began: float = 0.0,
        stop: str | None = None,
        again: bool = False,
    ) -> None:
        self.plan: BatchPlan = plan  # type: ignore[assignment]  # only the state before the first step has none
        self.spans = spans
        self.measure = measure
        self.amp_scale = amp_scale
        self.began = began
        self.stop = stop
        self.micro: tuple[int, bool] | None = None  # size and whether it is the last, until backward() takes it
        self.done = 0
        self.rejected: int | None = None  # the most samples to try next, after memory ran out here
        self.redo = False  # memory ran out: the same samples come again
        self.again = again  # they came before
        self.finished = False
