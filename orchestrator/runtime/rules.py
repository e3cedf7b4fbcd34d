"""From the user's configuration to the controller's rules, once the size of the data set is known."""

from __future__ import annotations

from orchestrator.config import RunConfig
from orchestrator.core.branching import BranchSettings
from orchestrator.core.companions import Companions
from orchestrator.core.controller import Rules
from orchestrator.core.families import FAMILIES, NOISE_EXPONENTS
from orchestrator.core.lr_rules import Rule, build_rule
from orchestrator.core.noise import NoiseSettings
from orchestrator.core.planner import WorkerLimits
from orchestrator.core.policies import PLANNED, PolicySettings, build_policy, goodput_of, sees_clock
from orchestrator.core.schedules import Schedule, ScheduleSettings, build_schedule
from orchestrator.errors import ConfigError, TaskError
from orchestrator.measure.estimators import find_estimator


def total_samples(config: RunConfig, *, dataset_size: int) -> int:
    """How many samples the run trains on: ``train.samples``, or ``train.epochs`` times the data set."""
    if config.train.samples is not None:
        return config.train.samples
    assert config.train.epochs is not None, "the configuration asks for samples or epochs"
    return config.train.epochs * dataset_size


def rules_from(config: RunConfig, *, dataset_size: int, workers_stay: bool = False) -> Rules:
    """``workers_stay`` where the runtime cannot change the fleet, so that no batch is chosen for another one.

    Raises ``TaskError`` when the data set is smaller than the batch the run begins with, and ``ConfigError`` for a
    schedule or a policy that does not fit the run.
    """
    batch, control = config.batch, config.controller
    if dataset_size < batch.initial:
        raise TaskError(
            f"the training set has {dataset_size} samples and batch.initial is {batch.initial}: a batch never holds "
            f"a sample twice; set batch.initial to {dataset_size} or less, or bring more data"
        )
    act, estimator = control.mode == "act", find_estimator(config.measure.estimator)
    settings = policy_settings(config, dataset_size=dataset_size, workers_stay=workers_stay)
    try:
        policy = build_policy(settings)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    total = total_samples(config, dataset_size=dataset_size)
    return Rules(
        total_samples=total,
        base_batch=batch.initial,
        micro_batch=batch.micro_batch if config.optimizer.part_samples is None else config.optimizer.part_samples,
        act=act,
        measurable=act and control.policy != "fixed" and (estimator.cuts or _by_group(config)),
        split=estimator.halves,
        branching=_branching(config, ceiling=settings.ceiling),
        every_samples=control.every_samples,
        lag_steps=control.lag_steps,
        noise=NoiseSettings(half_life_samples=control.half_life_samples, confidence=control.confidence),
        policy=policy,
        lr_rule=_lr_rule(config),
        schedule=_schedule(config, total=total),
        workers=_worker_limits(config),
        resize_when=config.workers.when,
        resize_cost_s=config.workers.resize_cost_s,
        planned=settings.name in PLANNED,
        sees_clock=sees_clock(settings),
        goodput=goodput_of(settings) if settings.name == "goodput" else None,
        retry_samples=config.workers.retry_samples,
        budget_worker_hours=config.budget.limit_worker_hours,
        smallest_batch=settings.floor if act and control.policy != "fixed" else None,
    )


def policy_settings(config: RunConfig, *, dataset_size: int, workers_stay: bool = False) -> PolicySettings:
    """The config's words on the target batch, its limits fitted to the data set; ``workers_stay`` as above."""
    batch, control = config.batch, config.controller
    workers_stay = workers_stay or config.workers.when == "never"
    return PolicySettings(
        name=control.policy,
        kappa=control.kappa,
        exchange_rate=control.exchange_rate,
        price_per_worker_hour=control.price_per_worker_hour,
        price_per_sample=control.price_per_sample,
        smoothness=control.smoothness,
        max_smoothness=control.max_smoothness,
        strong_convexity=control.strong_convexity,
        accuracy=control.accuracy,
        dataset_size=dataset_size,
        cost_weight=control.cost_weight,
        workers=None if workers_stay else _worker_limits(config),
        theta=control.theta,
        ramp=tuple(control.ramp or ()),
        base_batch=batch.initial,
        deadband=control.deadband,
        cooldown_samples=control.cooldown_samples,
        max_growth=control.max_growth,
        floor=min(batch.min, dataset_size),
        ceiling=min(batch.max, dataset_size),
        shrink=control.shrink,
    )


def _branching(config: RunConfig, *, ceiling: int) -> BranchSettings | None:
    control = config.controller
    every, samples, tolerance = control.branch_every_samples, control.branch_samples, control.branch_tolerance
    if every is None or samples is None or tolerance is None:
        return None
    return BranchSettings(
        every_samples=every,
        retry_samples=control.every_samples,
        samples=samples,
        tolerance=tolerance,
        ceiling=ceiling,
    )


def _by_group(config: RunConfig) -> bool:
    """Whether micro-batches are compared by group, whatever the estimator compares."""
    return config.measure.groups != "none" or config.measure.preconditioned


def _worker_limits(config: RunConfig) -> WorkerLimits:
    return WorkerLimits(
        minimum=config.workers.min,
        maximum=config.workers.max,
        micro_batches_each=config.workers.micro_batches_each,
    )


def _lr_rule(config: RunConfig) -> Rule:
    if config.controller.policy == "decay_to_growth":
        return build_rule("power", exponent=NOISE_EXPONENTS[FAMILIES[config.optimizer.name]])
    lr_rule = config.lr_rule
    return build_rule(
        lr_rule.name,
        exponent=lr_rule.exponent,
        peak_batch=lr_rule.peak_batch,
        floor=lr_rule.floor,
        optimizer_name=config.optimizer.name,
    )


def _schedule(config: RunConfig, *, total: int) -> Schedule:
    try:
        return build_schedule(ScheduleSettings(**config.schedule.settings()), total_samples=total)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def companions_from(config: RunConfig) -> Companions:
    """What of the config's optimizer follows the batch beside the learning rate."""
    rule = config.lr_rule
    return Companions(
        in_samples=frozenset(rule.in_samples),
        sde=rule.name == "sde",
        rescale_second_moment=rule.second_moment == "rescale",
        lr_in_buffer=config.optimizer.name in ("lars", "clars"),
    )
