"""Which settings of different sections do not go together?

They are tried once every section is right by itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from orchestrator.config.controlling import MEASURED_POLICIES
from orchestrator.config.optimization import OPTIMIZER_KEYS
from orchestrator.config.section import Broken
from orchestrator.config.worker_pods import cluster_rules
from orchestrator.core.branching import FEWEST_STEPS
from orchestrator.core.companions import IN_SAMPLES, RESCALED_OPTIMIZERS, SDE_OPTIMIZERS, largest_batch
from orchestrator.core.families import FAMILIES, PRECONDITIONED_OPTIMIZERS
from orchestrator.core.policy_inputs import whole

if TYPE_CHECKING:
    from orchestrator.config.run_config import RunConfig


def broken_combinations(config: RunConfig) -> list[Broken]:
    """Every rule between sections that ``config`` breaks."""
    return [
        *_batch_rules(config),
        *_part_rules(config),
        *_clock_rules(config),
        *_lr_rules(config),
        *_decay_rules(config),
        *_measure_rules(config),
        *_sharding_rules(config),
        *_time_rules(config),
        *(cluster_rules(config.cluster, config.workers, config.run.name) if config.cluster is not None else []),
    ]


def _batch_rules(config: RunConfig) -> list[Broken]:
    broken = []
    batch, controller, workers = config.batch, config.controller, config.workers
    acts = controller.mode == "act" and controller.policy in MEASURED_POLICIES
    grows = acts or (controller.mode == "act" and controller.policy == "decay_to_growth")
    may_shrink = controller.shrink and batch.min < batch.initial
    if grows and batch.max == batch.initial and not (acts and may_shrink):
        rule = f"controller.mode act with policy {controller.policy} has no room: batch.max equals batch.initial"
        fix = f"write batch.max: {16 * batch.initial}, or controller.mode: advise, or controller.policy: fixed"
        keys: tuple[str, ...] = ("batch.max", "batch.initial", "controller.mode", "controller.policy")
        broken.append(Broken(keys=keys, value=batch.max, rule=rule, fix=fix))
    key = "batch.min" if may_shrink else "batch.initial"
    lowest = batch.min if may_shrink else batch.initial
    if acts and lowest < 2:
        rule = "noise is measured between the micro-batches of a step, and one sample makes only one of them"
        keys = (key, "controller.policy")
        broken.append(Broken(keys=keys, value=lowest, rule=rule, fix="write 2 or more"))
    if workers.initial > batch.initial:
        rule = f"more workers than batch.initial has samples, {batch.initial}: some would have nothing to do"
        fix = f"write {batch.initial} or fewer, or begin with a larger batch"
        keys = ("workers.initial", "batch.initial")
        broken.append(Broken(keys=keys, value=workers.initial, rule=rule, fix=fix))
    branch, least = controller.branch_samples, FEWEST_STEPS * 2 * batch.initial
    if branch is not None and branch < least:
        rule = f"a branch at twice batch.initial, {batch.initial}, would have fewer than {FEWEST_STEPS} steps"
        keys = ("controller.branch_samples", "batch.initial")
        broken.append(Broken(keys=keys, value=branch, rule=rule, fix=f"write {least} or more; ten times is better"))
    for samples, size in controller.ramp or ():
        floor = batch.min if controller.shrink else batch.initial
        if not floor <= size <= batch.max:
            rule = f"the ramp wants a batch of {size} at {samples} samples, outside {floor} to {batch.max}"
            fix = "change the entry, or batch.max, batch.initial, batch.min (below initial with shrink: true)"
            keys = ("controller.ramp", "batch.max", "batch.initial", "batch.min", "controller.shrink")
            broken.append(Broken(keys=keys, value=controller.ramp, rule=rule, fix=fix))
    return broken


def _part_rules(config: RunConfig) -> list[Broken]:
    part, batch = config.optimizer.part_samples, config.batch
    if part is None:
        return []
    if config.measure.estimator == "split":
        rule = "split would halve the parts that the optimizer compares, and so train with another optimizer"
        fix = "write measure.estimator: micro_batch, which compares the parts themselves"
        keys: tuple[str, ...] = ("measure.estimator", "optimizer.part_samples")
        return [Broken(keys=keys, value="split", rule=rule, fix=fix)]
    if batch.find_micro_batch:
        rule = f"optimizer.part_samples, {part}, says how large a micro-batch is: another would be another optimizer"
        fix = "remove it, and write an optimizer.part_samples that fits in memory"
        return [Broken(keys=("batch.find_micro_batch", "optimizer.part_samples"), value=True, rule=rule, fix=fix)]
    key = "batch.min" if config.controller.shrink and batch.min < batch.initial else "batch.initial"
    lowest = min(batch.min, batch.initial) if key == "batch.min" else batch.initial
    if part > batch.micro_batch:
        rule = f"a part is one micro-batch, and batch.micro_batch is {batch.micro_batch}"
        fix = f"write {batch.micro_batch} or less, or raise batch.micro_batch if the memory is there"
        return [Broken(keys=("optimizer.part_samples", "batch.micro_batch"), value=part, rule=rule, fix=fix)]
    if 2 * part > lowest:
        rule = f"parts are compared, and {key}, {lowest}, does not make two of them"
        fix = f"write {lowest // 2} or less" if lowest > 1 else "write a batch of 2 or more"
        return [Broken(keys=("optimizer.part_samples", key), value=part, rule=rule, fix=fix)]
    return []


def _clock_rules(config: RunConfig) -> list[Broken]:
    """What must happen before the last sample; with epochs the total is known only with the data."""
    total = config.train.samples
    if total is None:
        return []
    broken = []

    def late(key: str, value: Any, rule: str, fix: str, *others: str) -> None:
        broken.append(Broken(keys=(key, *others, "train.samples"), value=value, rule=rule, fix=fix))

    schedule, controller = config.schedule, config.controller
    warmup, decay = schedule.warmup_samples, schedule.decay_samples or 0
    ends = f"and train.samples is {total}"
    if config.batch.initial > total:
        late("batch.initial", config.batch.initial, f"the first step takes all there is, {ends}", "write less")
    if warmup >= total:
        late("schedule.warmup_samples", warmup, f"the warm-up never ends, {ends}", "a tenth of the run is usual")
    elif warmup + decay > total:
        rule = f"warm-up ({warmup}) and decay do not fit, {ends}"
        late("schedule.decay_samples", decay, rule, "shorten one", "schedule.warmup_samples")
    times = schedule.milestones_samples or ()
    if times and max(times) >= total:
        late("schedule.milestones_samples", times, f"the last milestone is never reached, {ends}", "remove it")
    if controller.ramp and controller.ramp[-1][0] >= total:
        late("controller.ramp", controller.ramp, f"the ramp's last entry is never reached, {ends}", "remove it")
    curvature = config.measure.curvature_every_samples
    if curvature is not None and curvature > total:
        rule, fix = (
            f"the first measurement is never reached, {ends}",
            f"write {max(1, total // 4)}, or leave it out",
        )
        late("measure.curvature_every_samples", curvature, rule, fix)
    calibration = config.measure.calibration_samples
    if calibration is not None and calibration >= total:
        rule = f"the calibration never ends, {ends}"
        fix = f"write {max(1, total // 4)}, or measure.estimator: per_example"
        late("measure.calibration_samples", calibration, rule, fix, "measure.estimator")
    if config.lr_rule.ramp_samples >= total:
        late("lr_rule.ramp_samples", config.lr_rule.ramp_samples, f"the ramp never ends, {ends}", "write less")
    every, branch = controller.branch_every_samples or 0, controller.branch_samples or 0
    if every + branch > total:
        rule = f"the first round of branches never fits, {ends}"
        late("controller.branch_every_samples", every, rule, "shorten one", "controller.branch_samples")
    if controller.mode == "act" and controller.policy != "fixed" and controller.every_samples >= total:
        rule = f"the first decision is never reached, {ends}"
        fix = f"write {max(1, total // 16)}, or controller.policy: fixed"
        late("controller.every_samples", controller.every_samples, rule, fix, "controller.policy")
    return broken


def _measure_rules(config: RunConfig) -> list[Broken]:
    name = config.optimizer.name
    if not config.measure.preconditioned or name in PRECONDITIONED_OPTIMIZERS:
        return []
    rule = f"the metric is that of Adam's second moments, and optimizer {name} is not known to weigh by them alone"
    fix = f"remove it, or choose an optimizer that does: {', '.join(PRECONDITIONED_OPTIMIZERS)}"
    return [Broken(keys=("measure.preconditioned", "optimizer.name"), value=True, rule=rule, fix=fix)]


def _sharding_rules(config: RunConfig) -> list[Broken]:
    """What cannot be measured or updated where no worker has the whole of a gradient, or of the weights."""
    if config.train.parallel != "fsdp2":
        return []
    measure, broken = config.measure, []

    def refused(key: str, value: Any, why: str, fix: str) -> None:
        rule = f"train.parallel is fsdp2, and {why}"
        broken.append(
            Broken(keys=(key, "train.parallel"), value=value, rule=rule, fix=f"{fix}, or train.parallel: ddp")
        )

    if measure.estimator not in ("micro_batch", "split"):
        why = "an estimator that looks into layers would read weights and gradients that no worker has whole"
        refused("measure.estimator", measure.estimator, why, "write micro_batch, or split for batches of one of them")
    if measure.preconditioned:
        why = "each worker has only its shard of the second moments, and the whole of each micro-gradient"
        refused("measure.preconditioned", True, why, "remove it")
    if measure.curvature_every_samples is not None:
        why = "sharded layers cannot be differentiated twice"
        refused("measure.curvature_every_samples", measure.curvature_every_samples, why, "remove it")
    if config.optimizer.part_samples is not None:
        why = f"{config.optimizer.name} compares the gradients of parts, of which each worker keeps a shard alone"
        refused("optimizer.part_samples", config.optimizer.part_samples, why, "choose another optimizer, such as lamb")
    if config.batch.find_micro_batch:
        why = "a trial that runs out of memory on one worker would leave the others waiting for its shard"
        refused("batch.find_micro_batch", True, why, "remove it")
    if config.train.reproducible:
        why = "shards of gradients are summed on their way, in an order that depends on the workers"
        refused("train.reproducible", True, why, "remove it")
    if config.train.find_unused_parameters:
        why = "what is gathered together is reduced together, used or not"
        refused("train.find_unused_parameters", True, why, "remove it; a parameter that no step uses needs no word")
    return broken


def _lr_rules(config: RunConfig) -> list[Broken]:
    rule, optimizer, broken = config.lr_rule, config.optimizer.name, []
    # With decay_to_growth naming a rule would not help; see below.
    if rule.name == "auto" and optimizer not in FAMILIES and config.controller.policy != "decay_to_growth":
        why = f"auto chooses by the optimizer's family, and that of {optimizer} is not known"
        fix = "name the rule: linear suits sgd-like optimizers, sqrt suits adam-like ones"
        broken.append(Broken(keys=("lr_rule.name", "optimizer.name"), value="auto", rule=why, fix=fix))
    if rule.name == "sde":
        broken += _sde_rules(config)
    for setting in rule.in_samples:
        if optimizer not in IN_SAMPLES[setting]:
            why = f"{setting} is not defined in samples for {optimizer}"
            if setting == "weight_decay" and optimizer in OPTIMIZER_KEYS:
                why += ", whose decay is part of the gradient or of the layer's step"
            fix = f"take it out of the list, or use {', '.join(IN_SAMPLES[setting])}"
            keys = ("lr_rule.in_samples", "optimizer.name")
            broken.append(Broken(keys=keys, value=rule.in_samples, rule=why, fix=fix))
    if rule.second_moment == "rescale" and optimizer not in RESCALED_OPTIMIZERS:
        why = f"{optimizer} has no average of squared gradients that is known to follow the batch's noise"
        if optimizer == "lans":
            why = "lans averages squares of gradients brought to length one, which do not grow with the noise"
        fix = f"write second_moment: keep, or use {', '.join(RESCALED_OPTIMIZERS)}"
        keys = ("lr_rule.second_moment", "optimizer.name")
        broken.append(Broken(keys=keys, value=rule.second_moment, rule=why, fix=fix))
    return broken


def _sde_rules(config: RunConfig) -> list[Broken]:
    optimizer, batch = config.optimizer, config.batch
    if optimizer.name not in SDE_OPTIMIZERS:
        rule = f"sde is derived for {' and '.join(SDE_OPTIMIZERS)}, and the optimizer is {optimizer.name}"
        fix = "write lr_rule.name: sqrt for adam-like optimizers, noise_scale for sgd-like ones"
        return [Broken(keys=("lr_rule.name", "optimizer.name"), value="sde", rule=rule, fix=fix)]
    assert optimizer.betas is not None, "adam and adamw have betas"
    largest = largest_batch(optimizer.betas, base_batch=batch.initial)
    if largest is None or batch.max <= largest:
        return []
    rule = f"lr_rule sde needs batch.max / batch.initial x (1 - beta) < 1 for betas {list(optimizer.betas)}"
    fix = f"write {largest} or less, or lr_rule.name: sqrt with in_samples: [betas], which has no such limit"
    keys = ("batch.max", "batch.initial", "optimizer.betas", "lr_rule.name")
    return [Broken(keys=keys, value=batch.max, rule=rule, fix=fix)]


def _decay_rules(config: RunConfig) -> list[Broken]:
    """What decay_to_growth cannot go with: it moves the learning rate and the batch as one."""
    if config.controller.policy != "decay_to_growth":
        return []
    broken, policy, schedule = [], "controller.policy", config.schedule
    if config.optimizer.name not in FAMILIES:
        rule = (
            "decay_to_growth trades LR for batch by the optimizer's family, and that of "
            f"{config.optimizer.name} is not known"
        )
        fix = "write controller.policy: schedule with a ramp, and an lr_rule that suits the optimizer"
        broken.append(Broken(keys=(policy, "optimizer.name"), value="decay_to_growth", rule=rule, fix=fix))
    if config.lr_rule.name != "auto":
        rule = "decay_to_growth exchanges LR and batch by a rule of its own, and would not use this one"
        fix = "write lr_rule.name: auto, or another controller.policy"
        broken.append(Broken(keys=("lr_rule.name", policy), value=config.lr_rule.name, rule=rule, fix=fix))
    flat = schedule.name == "constant" or schedule.final_fraction == 1 or (schedule.gamma or 0) >= 1
    if flat:
        rule = "this schedule never decays, so decay_to_growth would never grow the batch"
        fix = "write schedule.name: cosine, or step with milestones_samples and a gamma below 1"
        keys = ("schedule.name", "schedule.final_fraction", "schedule.gamma", policy)
        broken.append(Broken(keys=keys, value=schedule.name, rule=rule, fix=fix))
    else:
        broken += _deadband_rules(config)
    return broken


def _deadband_rules(config: RunConfig) -> list[Broken]:
    """A schedule of our own that ends so high that not even the largest growth it asks for is outside the band."""
    schedule, initial = config.schedule, config.batch.initial
    if not (lowest := schedule.lowest_fraction):
        return []
    key = "schedule.gamma" if schedule.name == "step" else "schedule.final_fraction"
    deadband, largest = config.controller.deadband, whole(initial / lowest)
    if largest >= min(config.batch.max, deadband * initial) and largest > initial:
        return []
    rule = (
        f"the schedule falls to {lowest:.4g} of its peak, for which the batch would grow from {initial} to "
        f"{largest} at most, and nearer than the dead-band nothing changes"
    )
    fix = f"lower {key}"
    if largest > initial:
        fix = f"write {math.floor(1000 * largest / initial) / 1000:g} or less, or {fix}"
    keys = ("controller.deadband", key, "controller.policy")
    return [Broken(keys=keys, value=deadband, rule=rule, fix=fix)]


def _time_rules(config: RunConfig) -> list[Broken]:
    """What a policy that goes by step times cannot go with."""
    broken, controller, workers = [], config.controller, config.workers
    by_times = controller.policy == "goodput" or (controller.policy == "tradeoff" and controller.exchange_rate is None)
    if by_times and controller.mode == "advise":
        rule = (
            f"policy {controller.policy} learns from steps of different lengths what a step costs, and in mode "
            "advise all are of one length"
        )
        fix = "write controller.mode: act" + (
            ", or give controller.exchange_rate" if controller.policy == "tradeoff" else ", or another policy"
        )
        broken.append(Broken(keys=("controller.mode", "controller.policy"), value="advise", rule=rule, fix=fix))
    stays = workers.when == "never" or workers.min == workers.max
    if controller.policy == "goodput" and controller.cost_weight > 0 and stays:
        rule = "the workers stay as they are, and then time and cost choose the same batch"
        fix = "write controller.objective: time, or let workers.max be above workers.min (and workers.when not never)"
        keys = ("controller.objective", "workers.max", "workers.min", "workers.when")
        broken.append(Broken(keys=keys, value=controller.objective, rule=rule, fix=fix))
    return broken
