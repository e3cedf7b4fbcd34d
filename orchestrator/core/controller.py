"""The one brain: ``advance(state, event, rules) -> (state, action)``, the same in every runtime.

The target batch is a function of the measured data alone. A decision is taken whenever the samples seen pass a
multiple of ``every_samples`` and takes effect ``lag_steps`` later, so that an answer that travels arrives in time
and every runtime decides alike. On a clock may depend the workers asked for, and what ``policies.sees_clock`` declares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from orchestrator.core import budget, guard, noise, orders, restraints, staffing, throughput
from orchestrator.core.branching import BranchSettings, calibrate
from orchestrator.core.goodput import Goodput
from orchestrator.core.guard import GuardState
from orchestrator.core.lr_rules import Rule
from orchestrator.core.noise import NoiseSettings, NoiseState
from orchestrator.core.planner import WorkerLimits, make_plan
from orchestrator.core.policy_inputs import Policy, PolicyInputs
from orchestrator.core.schedules import Schedule
from orchestrator.core.staffing import Missing, Need, ResizeWhen
from orchestrator.core.throughput import StepTimes, Timings
from orchestrator.types import (
    Action,
    ApplyPlan,
    BatchPlan,
    Branched,
    Event,
    GradMeasured,
    Keep,
    NoiseStats,
    Ordered,
    Orders,
    PlanRejected,
    Preempted,
    RequestWorkers,
    SaveCheckpoint,
    Spent,
    Stop,
    Target,
    WorkersChanged,
    WorkersMissing,
    assert_never,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Everything the user settled before the run; it never changes while training."""

    total_samples: int
    base_batch: int
    micro_batch: int  # the most samples in one forward pass on one device
    act: bool  # False: advise only
    measurable: bool  # whether a plan must hold at least two micro-batches
    every_samples: int
    lag_steps: int
    noise: NoiseSettings
    policy: Policy
    lr_rule: Rule
    schedule: Schedule
    workers: WorkerLimits
    resize_when: ResizeWhen
    resize_cost_s: float  # taken until a resize has been measured
    planned: bool = False  # whether the policy carries out a plan over the samples, whatever is measured
    sees_clock: bool = False  # whether the policy is declared time-dependent, and may be shown the step times
    goodput: Goodput | None = None  # what chooses the workers, where it is known better than by micro-batches
    branching: BranchSettings | None = None  # of policy branched
    split: bool = False  # whether every micro-batch is computed in two halves, for the sake of comparing them
    retry_samples: int | None = None  # until workers that did not come are asked for again; None: never
    budget_worker_hours: float | None = None
    smallest_batch: int | None = None  # that a cap may be ordered at; None: the batch is never altered


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingTarget:
    """A decision on its way: ``target`` holds from step ``effective_step`` on."""

    effective_step: int
    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerState:
    """All that the controller remembers; a value that is saved, sent and replayed as one."""

    target: Target
    world_size: int
    noise: NoiseState
    guard: GuardState
    step: int = -1  # the last step absorbed
    samples_seen: int = 0
    generation: int = 0
    pending: PendingTarget | None = None
    last_change_samples: int | None = None  # of the target, or a jump of the learning rate
    changed: bool = False  # whether the target changed since the last decision
    lr: float | None = None  # at the last decision
    loss_sum: float = 0.0  # since the last decision, weighted by samples
    loss_samples: int = 0
    peak_lr_fraction: float = 0.0  # the schedule's highest value at a step so far
    times: StepTimes = field(default_factory=StepTimes)
    timings: Timings = field(default_factory=Timings)  # kept for time-dependent policies alone
    max_micro_batch: int | None = None  # after memory ran out
    resize_cost_s: float | None = None  # as last measured
    requested_workers: int | None = None
    kappa: float | None = None  # critical batch / noise scale, as branches last found it
    orders: Orders = field(default_factory=Orders)
    missing: Missing | None = None  # workers that were given up
    spent: Spent | None = None  # of the budget, as last heard


def init(rules: Rules, *, world_size: int) -> ControllerState:
    return ControllerState(
        target=Target(batch=rules.base_batch),
        world_size=world_size,
        noise=noise.init(rules.noise),
        guard=GuardState(),
    )


def advance(state: ControllerState, event: Event, rules: Rules) -> tuple[ControllerState, Action]:
    """Take one event in and say what to do. Events of a step already absorbed change nothing."""
    match event:
        case GradMeasured():
            return _measured(state, event, rules)
        case WorkersChanged(world_size=world_size, resize_cost_s=cost):
            state = replace(
                state,
                world_size=world_size,
                requested_workers=orders.workers_kept(state.requested_workers, world_size, state.orders),
                resize_cost_s=state.resize_cost_s if cost is None else cost,
                times=StepTimes(),  # another layout has other step times
                generation=state.generation + 1,
            )
            return state, _apply_now(state, rules, f"{world_size} workers now")
        case PlanRejected(max_micro_batch=limit):
            if state.max_micro_batch is not None:
                limit = min(limit, state.max_micro_batch)
            times, timings = StepTimes(), Timings()  # another micro-batch has other step times
            state = replace(state, max_micro_batch=limit, times=times, timings=timings, generation=state.generation + 1)
            reason = f"out of memory: micro-batches of at most {limit} from now on, the batch stays"
            return state, _apply_now(state, rules, reason)
        case Preempted(why=why):
            return state, SaveCheckpoint(reason=f"a worker will be taken away: {why}")
        case Branched():
            return _branched(state, event, rules)
        case Ordered(orders=given):
            asked = orders.workers_asked(state.requested_workers, state.world_size, before=state.orders, given=given)
            state = replace(state, orders=given, requested_workers=asked)
            return state, Keep(reason=f"by order: {orders.sentence(given)}")
        case WorkersMissing(present=present):
            again = None if rules.retry_samples is None else state.samples_seen + rules.retry_samples
            missing = Missing(workers=present, until_samples=again)
            state = replace(state, requested_workers=present, missing=missing)
            return state, Keep(reason=f"training goes on with {present} workers")
        case Spent():
            stop = budget.used_up(rules.budget_worker_hours, event)
            return replace(state, spent=event), stop or Keep(reason="the budget lasts until the next look")
        case _:
            assert_never(event)


def plan_for(state: ControllerState, target: Target, rules: Rules) -> BatchPlan:
    """The plan that realises ``target`` with the workers there are now."""
    plan = _whole_plan(state, target, rules)
    if not rules.split:
        return plan
    return make_plan(
        target.batch,
        world_size=plan.world_size,
        micro_batch=_computed_micro_batch(state, rules),
        generation=plan.generation,
        measurable=True,
    )


def current_plan(state: ControllerState, rules: Rules, *, reason: str) -> ApplyPlan:
    """What training should be doing at the step after the last one absorbed."""
    return _apply_now(state, rules, reason)


def pending_plan(state: ControllerState, rules: Rules) -> ApplyPlan | None:
    """The decision that is on its way, planned for the workers there are now."""
    if state.pending is None:
        return None
    return _apply(state, state.pending.target, rules, step=state.pending.effective_step, reason="decided before")


def is_decision_point(*, before: int, after: int, every_samples: int) -> bool:
    """Whether a step that went from ``before`` to ``after`` samples seen is one at which the target is decided."""
    return after // every_samples > before // every_samples


def _measured(state: ControllerState, event: GradMeasured, rules: Rules) -> tuple[ControllerState, Action]:
    sample = event.sample
    if sample.step <= state.step:
        return state, Keep(reason=f"step {sample.step} was absorbed before")
    before = state.samples_seen
    state = _absorb(state, event, rules)
    if state.samples_seen >= rules.total_samples:
        return state, Stop(reason=f"all {rules.total_samples} samples seen")
    if is_decision_point(before=before, after=state.samples_seen, every_samples=rules.every_samples):
        stats = noise.stats(state.noise, rules.noise)
        state, action = decide(state, stats=stats, lr=sample.lr, rules=rules)
        if not isinstance(action, Keep):
            return state, action
        state, wanted = _ask_for_workers(state, rules)
        return state, replace(action, workers=wanted)
    state, wanted = _ask_for_workers(state, rules)
    return state, wanted or Keep(reason="nothing to decide at this step")


def _absorb(state: ControllerState, event: GradMeasured, rules: Rules) -> ControllerState:
    sample, times, timings = event.sample, state.times, state.timings
    if event.step_time_s is not None and sample.batch == state.target.batch:
        plan = plan_for(state, state.target, rules)
        times = throughput.absorb(times, event.step_time_s, accum_steps=plan.accum_steps)
        if rules.sees_clock:
            busiest = min(plan.batch, plan.accum_steps * plan.micro_batch)
            timings = throughput.note(timings, event.step_time_s, workers=plan.world_size, busiest_samples=busiest)
    state = replace(
        state,
        step=sample.step,
        samples_seen=sample.samples_seen,
        noise=noise.absorb(state.noise, sample, rules.noise),
        loss_sum=state.loss_sum + sample.loss * sample.batch,
        loss_samples=state.loss_samples + sample.batch,
        peak_lr_fraction=max(state.peak_lr_fraction, rules.schedule(state.samples_seen)),
        times=times,
        timings=timings,
    )
    return with_due_target(state)


def with_due_target(state: ControllerState) -> ControllerState:
    """The decision on its way becomes the target when the next step is the one from which it holds."""
    pending = state.pending
    if pending is None or state.step + 1 < pending.effective_step:
        return state
    return replace(state, target=pending.target, pending=None, last_change_samples=state.samples_seen, changed=True)


def decide(
    state: ControllerState, *, stats: NoiseStats, lr: float, rules: Rules
) -> tuple[ControllerState, ApplyPlan | Keep]:
    """What the target should be after the last step absorbed, which was taken at ``lr``, if ``stats`` is known of it.

    While a decision is on its way no other is taken.
    """
    if state.pending is not None:
        wait = f"batch {state.pending.target.batch} takes effect at step {state.pending.effective_step}"
        return state, Keep(reason=f"keep {state.target.batch}: {wait}", target_batch=state.target.batch)
    watched = guard.observe(
        state.guard,
        batch=state.target.batch,
        lr=lr,
        stats=stats,
        mean_loss=state.loss_sum / state.loss_samples,
        changed=state.changed,
    )
    if not state.changed and restraints.lr_jumped(state.lr, lr):
        state = replace(state, last_change_samples=state.samples_seen)
    state = replace(state, guard=watched, changed=False, lr=lr, loss_sum=0.0, loss_samples=0)
    decision = rules.policy(
        PolicyInputs(
            stats=stats,
            batch=state.target.batch,
            samples_seen=state.samples_seen,
            last_change_samples=state.last_change_samples,
            credit=guard.credit(watched),
            kappa=state.kappa,
            lr_fraction=rules.schedule(state.samples_seen),
            peak_lr_fraction=state.peak_lr_fraction,
            workers=state.world_size,
            micro_batch=_computed_micro_batch(state, rules),
            steps=throughput.fit(state.timings) if rules.sees_clock else None,
            took_no_longer=rules.sees_clock and throughput.took_no_longer(state.timings),
        )
    )
    decision = orders.restrained(decision, state.orders, batch=state.target.batch)
    if decision.target_batch == state.target.batch:
        return state, Keep(reason=decision.reason, target_batch=state.target.batch)
    if not rules.act:
        return state, Keep(
            reason=f"advise only: {decision.reason}", target_batch=state.target.batch, wish=decision.target_batch
        )
    # An estimate without an upper end is no ground for a learning rate either; the last good one stays.
    known = stats.noise_scale if stats.bounded else state.target.noise_scale
    target = Target(batch=decision.target_batch, noise_scale=known, fresh=stats.bounded)
    step = state.step + 1 + rules.lag_steps
    state = replace(state, pending=PendingTarget(effective_step=step, target=target), generation=state.generation + 1)
    return state, _apply(state, target, rules, step=step, reason=decision.reason)


def _branched(state: ControllerState, event: Branched, rules: Rules) -> tuple[ControllerState, Action]:
    assert rules.branching is not None, "branches are trained only where the policy asks for them"
    found = calibrate(
        event.batch,
        [(multiple, math.inf if loss is None else loss) for multiple, loss in event.losses],
        stats=noise.stats(state.noise, rules.noise),
        tolerance=rules.branching.tolerance,
    )
    if found is None:
        return state, Keep(reason=f"the branch at the present batch of {event.batch} diverged: nothing was learnt")
    kappa = state.kappa if found.kappa is None else found.kappa
    return replace(state, kappa=kappa), Keep(reason=found.reason)


def _ask_for_workers(state: ControllerState, rules: Rules) -> tuple[ControllerState, RequestWorkers | None]:
    if state.pending is not None or state.orders.held:
        return state, None
    need = Need(
        plan=plan_for(state, state.target, rules),
        whole_micro_batches=_whole_plan(state, state.target, rules).num_micro_batches,
        micro_batch=_micro_batch(state, rules),
        computed_micro_batch=_computed_micro_batch(state, rules),
        asked=state.requested_workers or state.world_size,
        remaining_samples=rules.total_samples - state.samples_seen,
        times=state.times,
        resize_cost_s=rules.resize_cost_s if state.resize_cost_s is None else state.resize_cost_s,
        limits=rules.workers,
        when=rules.resize_when,
    )
    ceilings = (
        orders.ceiling(state.orders),
        budget.ceiling(need, rules.budget_worker_hours, state.spent),
        None if state.missing is None else state.missing.ceiling(state.samples_seen),
    )
    need = replace(need, ceiling=staffing.tightest(ceilings))
    if (wanted := staffing.request(need, goodput=rules.goodput, timings=state.timings)) is None:
        return state, None
    return replace(state, requested_workers=wanted.num_workers), wanted


def _whole_plan(state: ControllerState, target: Target, rules: Rules) -> BatchPlan:
    """Without the halves."""
    return make_plan(
        target.batch,
        world_size=state.world_size,
        micro_batch=_micro_batch(state, rules),
        generation=state.generation,
        measurable=rules.measurable,
    )


def _micro_batch(state: ControllerState, rules: Rules) -> int:
    """In samples. What ran out of memory is what was computed at once: a half, where micro-batches are split."""
    if state.max_micro_batch is None:
        return rules.micro_batch
    return min(rules.micro_batch, state.max_micro_batch * (2 if rules.split else 1))


def _computed_micro_batch(state: ControllerState, rules: Rules) -> int:
    """The most samples that a worker computes at once: a micro-batch, or half of one where they are split."""
    whole = _micro_batch(state, rules)
    return -(-whole // 2) if rules.split else whole


def _apply_now(state: ControllerState, rules: Rules, reason: str) -> ApplyPlan:
    return _apply(state, state.target, rules, step=state.step + 1, reason=reason)


def _apply(state: ControllerState, target: Target, rules: Rules, *, step: int, reason: str) -> ApplyPlan:
    factor = rules.lr_rule(target.batch / rules.base_batch, noise_scale=target.noise_scale, base_batch=rules.base_batch)
    return ApplyPlan(
        plan=plan_for(state, target, rules), target=target, lr_factor=factor, effective_step=step, reason=reason
    )
