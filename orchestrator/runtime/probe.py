"""How large is the noise scale of a model as it stands? Measured without training it.

Samples, dropout, precision and the arithmetic of a reading are those of a run with the same config; no optimizer is
built, and weights, buffers and gradients are afterwards what they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.core import groups, noise
from orchestrator.core.cursor import Stream
from orchestrator.core.groups import GroupSums
from orchestrator.core.lr_rules import RuleSettings
from orchestrator.core.noise import NoiseState, moments_from_sums
from orchestrator.core.probing import Advice, ProbePlan, advise, fewest_samples, plan_probe
from orchestrator.errors import ConfigError, NonFiniteError, Problem, SessionError
from orchestrator.measure.estimators import find_estimator
from orchestrator.measure.groups import GroupMeter, layers
from orchestrator.runtime.checkpoints import Fault, load_weights
from orchestrator.runtime.loader import PositionLoader
from orchestrator.runtime.memory import is_out_of_memory
from orchestrator.runtime.precision import precision
from orchestrator.runtime.rng import SampleRandomness
from orchestrator.runtime.rules import policy_settings
from orchestrator.runtime.step import backward_seed, check_loss
from orchestrator.runtime.transfer import move
from orchestrator.runtime.worker import local_worker
from orchestrator.tasks.protocol import Task, build_task, check_task, collate_of
from orchestrator.types import BatchPlan, GradSample, NoiseStats

DEFAULT_SAMPLES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured, on what, and what follows from it."""

    stats: NoiseStats
    plan: ProbePlan
    loss: float  # mean over the samples used
    dataset_size: int  # samples
    device: str
    advice: Advice
    layers: Mapping[str, NoiseStats] = field(default_factory=dict)  # by module path, where asked for
    checkpoint: str | None = None  # where the weights come from; None: the seeded model of the task
    passed_over: tuple[Fault, ...] = ()  # newer checkpoints that are not whole


def probe(
    config: RunConfig, *, checkpoint: Path | None = None, samples: int | None = None, by_layer: bool = True
) -> Probe:
    """Measure the config's model on this process: seeded as a run begins, or with the weights of ``checkpoint``.

    ``checkpoint`` is a checkpoint's folder or a run's; ``samples`` is at most the data set, and 4096 or the data set
    when left out; ``by_layer`` measures each module's own parameters besides. Raises a ``GroundswellError`` for what
    cannot be measured.
    """
    torch.set_num_threads(config.workers.threads)
    task = build_task(config.task.name, config.task.options, seed=config.run.seed)
    torch.manual_seed(config.run.seed)
    model = task.model()
    check_task(task, model)
    path, faults = (None, ()) if checkpoint is None else load_weights(checkpoint, model)
    device = local_worker(config).device
    found = measure(config, task=task, model=model, device=device, samples=samples, by_layer=by_layer)
    return replace(found, checkpoint=None if path is None else str(path), passed_over=faults)


def measure(
    config: RunConfig,
    *,
    task: Task,
    model: nn.Module,
    device: torch.device,
    samples: int | None = None,
    by_layer: bool = True,
) -> Probe:
    """The same for a model in memory, which is moved to ``device`` and keeps its mode."""
    size = len(task.train_set)
    plan = _plan(config, samples=samples, dataset_size=size)
    stats, of_layers, loss = _read(config, plan, task=task, model=model.to(device), device=device, by_layer=by_layer)
    return Probe(
        stats=stats,
        layers=of_layers,
        plan=plan,
        loss=loss,
        dataset_size=size,
        device=str(device),
        advice=_advice(config, stats, dataset_size=size),
    )


def _plan(config: RunConfig, *, samples: int | None, dataset_size: int) -> ProbePlan:
    micro_batch = config.batch.micro_batch
    if find_estimator(config.measure.estimator).halves:
        micro_batch = -(-micro_batch // 2)
    needed = fewest_samples(micro_batch)
    source = "probe" if samples is None else f"--samples {samples}"
    if samples is not None and samples > dataset_size:
        raise ConfigError(
            Problem(
                source=source,
                rule=f"the training set has {dataset_size} samples, and one that comes twice says nothing new",
                fix=f"write {dataset_size} or less, or leave --samples out",
            )
        )
    try:
        return plan_probe(min(DEFAULT_SAMPLES, dataset_size) if samples is None else samples, micro_batch=micro_batch)
    except ValueError as error:
        fix = f"write --samples {needed} or more"
        if needed > dataset_size:
            smaller = dataset_size // fewest_samples(1)
            fix = f"the training set has {dataset_size}: "
            fix += f"give --set batch.micro_batch={smaller} or less" if smaller else "bring more data"
        raise ConfigError(Problem(source=source, rule=str(error), fix=fix)) from error


def _read(
    config: RunConfig, plan: ProbePlan, *, task: Task, model: nn.Module, device: torch.device, by_layer: bool
) -> tuple[NoiseStats, dict[str, NoiseStats], float]:
    """The statistics, those of each layer, and the mean loss."""
    seed, data = config.run.seed, config.data
    settings = plan.noise_settings(confidence=config.controller.confidence)
    state, position, loss_sum = noise.init(settings), 0, 0.0
    estimator = find_estimator(config.measure.estimator)
    trained = [p for p in model.parameters() if p.requires_grad]
    meter = estimator.build(model, trained, config.measure)
    layer_meter = GroupMeter(layers(model, trained) if by_layer else {})
    of_layers: dict[str, NoiseState] = {}
    loader = PositionLoader(
        task.train_set,
        collate_of(task),
        index_of=Stream(size=len(task.train_set), seed=seed).indices,
        seed=seed,
        loader_workers=data.loader_workers,
        prefetch=data.prefetch,
        pin_memory=data.pin_memory,
        seed_each_sample=data.seed_each_sample,
    )
    randomness = SampleRandomness(seed, device)
    size = plan.micro_batch
    loader.set_course((first, size) for first in range(0, plan.samples, size))
    try:
        for number, count in enumerate(plan.groups):
            with _left_as_found(model):
                meter.begin_step(measure=True)
                layer_meter.begin_step(measure=True)
                for first in range(position, position + count * size, size):
                    batch = move(loader.take(first, size), device, non_blocking=True)
                    randomness.begin(first)
                    loss = _backward(config, task, model, batch, count=count, device=device)
                    meter.end_micro_batch(size=size, loss=loss, loss_scale=1 / count)
                    layer_meter.end_micro_batch(size=size, loss_scale=1 / count)
                reading, by_group = meter.read(), layer_meter.read()
            group = count * size
            if not (reading.grad_is_finite and math.isfinite(reading.weighted_sq_sum)):
                raise NonFiniteError(
                    f"the loss or its gradient is not finite on stream positions {position} to {position + group - 1} "
                    "(losses "
                    + ", ".join(f"{loss:.4g}" for loss in reading.losses)
                    + "), so there is no noise scale to measure: look at those samples, or probe an earlier checkpoint"
                )
            parts = estimator.parts(BatchPlan(generation=0, world_size=1, batch=group, micro_batch=size))
            position += group
            loss_sum += size * sum(reading.losses)
            found = moments_from_sums(
                weighted_sq_sum=reading.weighted_sq_sum,
                mean_grad_sq=reading.mean_grad_sq,
                batch=group,
                micro_batches=parts,
            )
            assert found is not None, "a group has at least two micro-batches, and so at least two samples"
            sample = GradSample(
                step=number,
                samples_seen=position,
                batch=group,
                micro_batches=parts,
                loss=sum(reading.losses) / count,
                lr=0.0,
                grad_sq=found[0],
                trace_cov=found[1],
            )
            state = noise.absorb(state, sample, settings)
            sums = GroupSums(
                step=number,
                samples_seen=position,
                batch=group,
                micro_batches=count,
                lr=0.0,
                weighted_sq_sums=by_group.weighted_sq_sum.tolist(),
                mean_grad_sqs=by_group.mean_grad_sq.tolist(),
            )
            of_layers = groups.absorb(of_layers, sums, settings, names=layer_meter.names)
    finally:
        randomness.end()
        meter.close()
        layer_meter.close()
        loader.close()
    found_of_layers = {name: noise.stats(averages, settings) for name, averages in of_layers.items()}
    return noise.stats(state, settings), found_of_layers, loss_sum / position


def _backward(
    config: RunConfig, task: Task, model: nn.Module, batch: Any, *, count: int, device: torch.device
) -> Tensor:
    """One micro-batch of ``count`` in its group, as a session weights it; the detached mean loss."""
    try:
        with precision(config, device):
            loss = task.loss(model, batch)
        check_loss(loss)
        (loss / count).backward(backward_seed(loss))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SessionError(
            f"a micro-batch of {config.batch.micro_batch} samples does not fit in memory: give --set "
            "batch.micro_batch a smaller number"
        ) from error
    return loss.detach()


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Gradients empty inside; gradients and buffers, such as running means, as they were after."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


def _advice(config: RunConfig, stats: NoiseStats, *, dataset_size: int) -> Advice:
    rule = config.lr_rule
    return advise(
        stats,
        batch=config.batch.initial,
        settings=policy_settings(config, dataset_size=dataset_size),
        own_rule=rule.name,
        rule_settings=RuleSettings(exponent=rule.exponent, peak_batch=rule.peak_batch, floor=rule.floor),
    )
