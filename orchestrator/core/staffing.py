"""How many workers to ask for, and is it worth the resize?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.core import throughput
from orchestrator.core.goodput import Goodput
from orchestrator.core.planner import WorkerLimits, useful_workers
from orchestrator.core.throughput import StepModel, StepTimes, Timings
from orchestrator.types import BatchPlan, RequestWorkers

ResizeWhen = Literal["saves_time", "always", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """No more than ``workers``, whatever they would save, and why."""

    workers: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What there is to do, on what, and at what price of a change. ``asked``: the workers there are, or that were
    asked for last."""

    plan: BatchPlan
    whole_micro_batches: int  # of the plan, none of them halved only to be measured
    micro_batch: int  # the whole one: a batch that was cut smaller only to be measured needs no more workers
    computed_micro_batch: int  # what a worker really computes at once, half of the other where they are split
    asked: int
    remaining_samples: int
    times: StepTimes
    resize_cost_s: float
    limits: WorkerLimits
    when: ResizeWhen
    ceiling: Ceiling | None = None  # below that of the limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """More than ``workers`` did not come; none are asked for before ``until_samples``, or at all where that is None."""

    workers: int
    until_samples: int | None

    def ceiling(self, samples_seen: int) -> Ceiling | None:
        if self.until_samples is not None and samples_seen >= self.until_samples:
            return None
        return Ceiling(workers=self.workers, reason=f"more than {self.workers} workers did not come")


def tightest(ceilings: Iterable[Ceiling | None]) -> Ceiling | None:
    """Of those that there are."""
    return min((c for c in ceilings if c is not None), key=lambda c: c.workers, default=None)


def request(need: Need, *, goodput: Goodput | None, timings: Timings) -> RequestWorkers | None:
    """What ``goodput`` makes of the step times, where it is given; else as many as the batch has micro-batches for.

    Workers above a ceiling are given back at once, even where none are ever asked for otherwise.
    """
    if need.ceiling is not None:
        most = max(need.limits.minimum, need.ceiling.workers)
        if need.asked > most:
            return RequestWorkers(num_workers=most, reason=need.ceiling.reason)
        need = replace(need, limits=replace(need.limits, maximum=min(need.limits.maximum, most)))
        if goodput is not None and goodput.workers is not None:
            goodput = replace(goodput, workers=need.limits)
    if need.when == "never":
        return None
    return _by_micro_batches(need) if goodput is None else _by_goodput(need, goodput, throughput.fit(timings))


def _by_micro_batches(need: Need) -> RequestWorkers | None:
    plan, asked = need.plan, need.asked
    wanted = useful_workers(plan.batch, micro_batch=need.micro_batch, limits=need.limits)
    if wanted == asked:
        return None
    if wanted < asked:
        # Giving workers back saves no time, so it waits until some would have nothing to do.
        if need.whole_micro_batches >= asked:
            return None
        reason = f"batch {plan.batch} is {plan.num_micro_batches} micro-batches, too few for {asked} workers"
        return RequestWorkers(num_workers=wanted, reason=reason)
    then = -(-plan.num_micro_batches // wanted)
    reason = f"batch {plan.batch} is {plan.num_micro_batches} micro-batches: {wanted} workers take {then} each"
    if need.when == "saves_time":
        saving = throughput.predicted_saving_s(
            need.times,
            remaining_samples=need.remaining_samples,
            batch=plan.batch,
            accum_now=plan.accum_steps,
            accum_then=then,
        )
        if saving is None or saving <= need.resize_cost_s:
            return None
        reason += f", saving about {saving:.1f} s for a resize of about {need.resize_cost_s:.1f} s"
    return RequestWorkers(num_workers=wanted, reason=reason)


def _by_goodput(need: Need, goodput: Goodput, steps: StepModel | None) -> RequestWorkers | None:
    """The fleet of the best goodput, where the step times tell which; else by micro-batches, from which they learn.

    A fleet larger than any that was timed is tried where its micro-batches allow it, unless cost is all that counts:
    the worker-hours of a batch only rise with its workers. A resize pauses all workers, so it has to be paid by what
    the rest of the run gains, in the coin of the objective.
    """
    batch, micro_batch = need.plan.batch, need.computed_micro_batch
    if steps is None and goodput.cost_weight == 1:
        return None
    if steps is None or need.asked > steps.most_workers:
        return _by_micro_batches(need)
    wanted = goodput.best_workers(steps, batch, workers_now=need.asked, micro_batch=micro_batch)
    if wanted == steps.most_workers and goodput.cost_weight < 1:
        further = _by_micro_batches(need)
        if further is not None and further.num_workers > wanted:
            return further
    if wanted == need.asked:
        return None
    gain = goodput.value(steps, batch, workers=wanted, micro_batch=micro_batch) - goodput.value(
        steps, batch, workers=need.asked, micro_batch=micro_batch
    )
    reason = f"by the step times {wanted} workers suit batch {batch} better than {need.asked}"
    if need.when == "saves_time":
        each = throughput.micro_batch_time_s(need.times)
        if each is None:
            return None
        left_s = need.remaining_samples / batch * need.plan.accum_steps * each
        saving = left_s * -math.expm1(-gain)
        if saving <= need.resize_cost_s:
            return None
        reason += f", worth about {saving:.1f} s for a resize of about {need.resize_cost_s:.1f} s"
    return RequestWorkers(num_workers=wanted, reason=reason)
