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
from orchestrator.core import cursor, noise
from orchestrator.core.controller import is_decision_point
from orchestrator.core.cursor import Stream
from orchestrator.core.schedules import Schedule, ScheduleSettings, build_schedule
from orchestrator.errors import CheckpointError, ConfigError, NonFiniteError, SessionError, TaskError
from orchestrator.measure.micro_batch import GradMeter
from orchestrator.ports import Collective
from orchestrator.runtime.announcement import Announcement
from orchestrator.runtime.history import History, Resumed
from orchestrator.runtime.loader import PositionLoader, move
from orchestrator.runtime.memory import is_out_of_memory
from orchestrator.runtime.replica import Replica
from orchestrator.runtime.rng import seeded
from orchestrator.runtime.rules import rules_from
from orchestrator.runtime.worker import Worker, local_worker
from orchestrator.tasks.protocol import check_dataset
from orchestrator.types import ApplyPlan, BatchPlan, GradMeasured, GradSample, PlanRejected, Target

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
        self._step = _StepState()
        self._due: dict[int, int] = {}  # step whose exchange announces -> step at which it was decided
        self._next: ApplyPlan | None = None
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
            (scaled if self._scaler is None else self._scaler.scale(scaled)).backward()
        except Exception as error:
            # Once a synchronising backward pass has begun, other ranks may hold half of its all-reduces.
            if not is_out_of_memory(error) or (started and synchronises):
                raise
            del error
            self._give_up(size)
            return None
        self._meter.end_micro_batch(size=size, loss_scale=self._step.amp_scale / divisor)
        self._step.done += 1
        mean = value.detach()
        self._step.loss_sum += mean.double() * size
        return mean

    def step(self) -> None:
        """Exchange the step's sums, then update the weights on every rank, or on none."""
        step = self._step
        if step.plan is None or step.heard is not None:
            raise SessionError("step() belongs inside the loop over the session, once after a step's micro-batches")
        if step.done != len(step.spans) and step.rejected is None:
            raise SessionError(
                f"step {self.step_number}: {step.done} of {len(step.spans)} micro-batches went through backward()"
            )
        if step.done == 0 or step.rejected is not None:
            self._replica.take_part()
        heard = self._exchange()
        if heard.rejected:
            self._redo_smaller(heard)
            return
        if step.carried is not None:
            heard = heard.including(step.carried)
        sample = self._sample(heard)
        self._update_weights(sample)
        self._record(sample)
        if heard.plan is not None:
            self._next = heard.plan
        step.heard = heard
        if self.samples_seen >= self._rules.total_samples:
            # Before anything else of the user's is called: a metric that raises must not cost what was trained.
            self._checkpoint(why="the end")

    def request_stop(self, reason: str) -> None:
        """Stop after the step at hand, with a checkpoint. Any rank may ask; all stop together."""
        self._step.stop = reason

    @property
    def evaluation_due(self) -> bool:
        """Whether the step just finished is one after which the config asks for an evaluation."""
        every, after = self.config.evaluation.every_samples, self.samples_seen
        if after >= self._rules.total_samples:
            return True
        before = after - self._step.plan.batch
        return every is not None and is_decision_point(before=before, after=after, every_samples=every)

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
            loss_sum=torch.zeros((), dtype=torch.float64, device=self.worker.device),
            began=self.worker.now(),
            stop=self._step.stop,
            carried=self._step.carried if self._step.redo else None,
        )
        self._meter.begin_step(measure=measure)
        if self._step.carried is None:
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

    def _exchange(self) -> Announcement:
        step = self._step
        share = torch.zeros_like(step.loss_sum)
        if step.rejected is None:  # in every step: a gradient that is not finite must not reach the weights
            share = self._meter.mean_grad_sq_share(
                rank=self._collective.rank, world_size=self._collective.world_size, grad_scale=step.amp_scale
            )
        # The step's one host synchronisation: three numbers come from the device.
        weighted, mean_sq, loss_sum = torch.stack([self._meter.weighted_sq_sum, share, step.loss_sum]).tolist()
        said = Announcement(
            weighted_sq_sum=weighted,
            mean_grad_sq=mean_sq,
            loss_sum=loss_sum,
            rejected=step.rejected is not None,
            stop=step.stop is not None,
        )
        if self._collective.rank == 0:
            said = self._history.speak(said, decided_at=self._due.pop(self.step_number, None))
        return Announcement.decode(self._collective.sum(said.encode()))

    def _sample(self, heard: Announcement) -> GradSample:
        step = self._step
        loss = heard.loss_sum / step.plan.batch
        finite = math.isfinite(loss) and math.isfinite(heard.mean_grad_sq) and math.isfinite(heard.weighted_sq_sum)
        if not finite and self._scaler is None:
            self._stop_on_non_finite(loss)
        moments = None
        if step.measure and finite:
            moments = noise.moments_from_sums(
                weighted_sq_sum=heard.weighted_sq_sum,
                mean_grad_sq=heard.mean_grad_sq,
                batch=step.plan.batch,
                micro_batches=step.plan.num_micro_batches,
            )
        return GradSample(
            step=self.step_number,
            samples_seen=self.samples_seen + step.plan.batch,
            batch=step.plan.batch,
            micro_batches=step.plan.num_micro_batches,
            loss=loss,
            lr=self._base_lrs[0] * self.lr_factor,
            grad_sq=None if moments is None else moments[0],
            trace_cov=None if moments is None else moments[1],
        )

    def _update_weights(self, sample: GradSample) -> None:
        factor = self.lr_factor
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
        self.samples_seen = sample.samples_seen
        self.step_number += 1

    def _record(self, sample: GradSample) -> None:
        step = self._step
        before = sample.samples_seen - sample.batch
        event = GradMeasured(sample=sample, step_time_s=self.worker.now() - step.began)
        decides = sample.samples_seen < self._rules.total_samples and is_decision_point(
            before=before, after=sample.samples_seen, every_samples=self._rules.every_samples
        )
        if decides:
            self._due[sample.step + self._rules.lag_steps] = sample.step
        taken = [(before + offset, size) for offset, size in step.spans]
        self._history.step(event, plan=step.plan, spans=taken, decides=decides)

    def _at_boundary(self) -> None:
        heard = self._step.heard
        assert heard is not None, "step() hears before a boundary is reached"
        before = self.samples_seen - self._step.plan.batch
        every = self.config.checkpoint.every_samples
        due = every is not None and is_decision_point(before=before, after=self.samples_seen, every_samples=every)
        if heard.hold:
            path = self._checkpoint(why="resize")
            if path is not None:
                self._history.close()
                self.worker.hold(path)
            else:
                self._history.hold_failed()
        elif (due or heard.save) and self.samples_seen < self._rules.total_samples:
            path = self._checkpoint(why="asked for" if heard.save else "regular")
            if path is not None:
                self.worker.report_checkpoint(path)
        if heard.stop:
            self._stop = self._step.stop or "another rank was asked to stop"

    def _end(self) -> None:
        self.finished = self.samples_seen >= self._rules.total_samples
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

    def _redo_smaller(self, heard: Announcement) -> None:
        limits = [-1.0] * self._collective.world_size
        if self._collective.rank != 0:
            limits = [0.0] * self._collective.world_size
        if self._step.rejected is not None:
            limits[self._collective.rank] += 1.0 + self._step.rejected
        said = [int(x) for x in self._collective.sum(limits)]
        limit = min(x for x in said if x >= 0)
        if limit == 0:
            raise SessionError(
                f"rank {said.index(0)}: a micro-batch of one sample does not fit in memory; use a smaller model or "
                "sample, or a device with more memory"
            )
        self._replica.restore_buffers()
        planned = self._history.replan(
            PlanRejected(max_micro_batch=limit), step=self.step_number, samples_seen=self.samples_seen
        )
        self.optimizer.zero_grad(set_to_none=True)
        self._adopt(planned.now)
        if self._next is not None or heard.plan is not None:
            # The decision on its way was cut for micro-batches that are now known not to fit.
            self._next = planned.pending
        self._step.redo = True
        self._step.carried = heard if self._step.carried is None else heard.including(self._step.carried)

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
        "amp_scale",
        "began",
        "carried",
        "done",
        "heard",
        "loss_sum",
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
        loss_sum: Tensor | None = None,
        began: float = 0.0,
        stop: str | None = None,
        carried: Announcement | None = None,
    ) -> None:
        self.plan: BatchPlan = plan  # type: ignore[assignment]  # only the state before the first step has none
        self.spans = spans
        self.measure = measure
        self.amp_scale = amp_scale
        self.loss_sum: Tensor = loss_sum  # type: ignore[assignment]  # as above
        self.began = began
        self.stop = stop
        self.micro: tuple[int, bool] | None = None  # size and whether it is the last, until backward() takes it
        self.done = 0
        self.rejected: int | None = None  # the most samples to try next, after memory ran out here
        self.redo = False
        self.heard: Announcement | None = None
        self.carried = carried  # what was asked in the same step before it had to be done again
