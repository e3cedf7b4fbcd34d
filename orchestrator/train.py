"""Trains a task with the public session: what the built-in tasks run is what a user could have written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError, TaskError
from orchestrator.optim import OPTIMIZERS
from orchestrator.registry import resolve
from orchestrator.runtime.precision import precision
from orchestrator.runtime.sharding import is_sharded, shard
from orchestrator.runtime.transfer import move
from orchestrator.runtime.worker import Worker
from orchestrator.session import Session
from orchestrator.tasks.protocol import Task, build_task, check_task, collate_of

_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, **OPTIMIZERS}


def train(config: RunConfig, worker: Worker, *, resume: bool) -> bool:
    """Run the config's task to its end or to a stop; says whether it reached the end."""
    torch.set_num_threads(config.workers.threads)
    task = build_task(config.task.name, config.task.options, seed=config.run.seed)
    torch.manual_seed(config.run.seed)
    model = task.model()
    check_task(task, model)
    model = shard(model, config, worker)
    session = Session(
        config,
        model=model,
        optimizer=build_optimizer(config, model),
        dataset=task.train_set,
        collate=collate_of(task),
        worker=worker,
        resume=resume,
    )
    with session:
        session.find_micro_batch(partial(_loss, task, config=config, worker=worker))
        for step in session:
            for batch in step:
                session.backward(partial(_loss, task, session.model, batch, config=config, worker=worker))
            session.step()
            if session.curvature_due:
                session.measure_curvature(partial(_loss, task, config=config, worker=worker))
            if session.evaluation_due:
                chunk = _chunk(config, session)
                session.evaluate(partial(evaluate, task, model, config, worker, chunk=chunk))
    return session.finished


def _loss(task: Task, model: nn.Module, batch: Any, *, config: RunConfig, worker: Worker) -> Tensor:
    with precision(config, worker.device):
        return task.loss(model, batch)


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The config's optimizer over all parameters that take a gradient."""
    try:
        factory = resolve(config.optimizer.name, _OPTIMIZERS, kind="optimizer")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = factory(parameters, **config.optimizer.settings())
    return optimizer


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, config: RunConfig, worker: Worker, *, chunk: int) -> dict[str, float]:
    """The task's metrics over its held-out set, each rank taking every so-many-th batch; the same on all ranks.

    A batch has ``chunk`` samples, but for the last.
    """
    collate = collate_of(task)
    sums: dict[str, float] = {}
    count = 0
    was_training = model.training
    model.eval()
    size = len(task.eval_set)
    try:
        for indices in _chunks(size, chunk, worker.rank, worker.world_size, even=is_sharded(model)):
            counts = indices.start < size
            some = indices if counts else range(min(size, chunk))
            batch = move(collate([task.eval_set[i] for i in some]), worker.device, non_blocking=True)
            with precision(config, worker.device):
                metrics = _numbers(task.metrics(model, batch))
            if not counts:
                continue
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value * len(indices)
            count += len(indices)
    finally:
        model.train(was_training)
    # A rank that had no batch does not know the names; rank zero always has one.
    names = worker.collective.share(sorted(sums))
    totals = worker.collective.sum([sums.get(name, 0.0) for name in names] + [float(count)])
    return {name: total / totals[-1] for name, total in zip(names, totals, strict=False)}


def _chunk(config: RunConfig, session: Session) -> int:
    """In samples. What is configured need not fit where the largest micro-batch that does was looked for."""
    return session.plan.micro_batch if config.batch.find_micro_batch else config.batch.micro_batch


def _numbers(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise TaskError(f"metrics() must return a mapping of names to scalars, and returned {type(metrics).__name__}")
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TaskError(f"metrics() must return scalars, and {name} is not one: {error}") from error
    return numbers


def _chunks(size: int, chunk: int, rank: int, world_size: int, *, even: bool) -> Iterator[range]:
    """What ``rank`` evaluates; ``even``: as often as the others, where need be beyond the end, for company."""
    for first in range(rank * chunk, size + rank * chunk * even, world_size * chunk):
        yield range(first, min(size, first + chunk))
