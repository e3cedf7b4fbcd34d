"""What does a session ask of its model's replica, and which kind is it: copies (DDP), or shards (FSDP2)?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from orchestrator.config import RunConfig
from orchestrator.errors import SessionError
from orchestrator.measure.estimators import find_estimator
from orchestrator.measure.meter import Meter
from orchestrator.measure.micro_batch import GradMeter
from orchestrator.measure.sharded import Attach, ShardedMeanGradient
from orchestrator.runtime.replica import Replica
from orchestrator.runtime.sharded import ShardedReplica
from orchestrator.runtime.sharding import is_sharded
from orchestrator.runtime.worker import Worker
from orchestrator.types import BatchPlan


class ModelReplica(Protocol):
    """One rank's part of the model. All ranks make the same calls, but for ``give_up``."""

    model: nn.Module  # as the user gave it

    @property
    def module(self) -> nn.Module:
        """What the user calls."""
        ...

    def company(self, plan: BatchPlan, rank: int) -> tuple[tuple[int, int], ...]:
        """``(offset, size)`` of what a rank computes after its own micro-batches of a step, with weight zero."""
        ...

    def begin_step(self, *, again: bool) -> None:
        """Remember the buffers, such as running means, as they are before a step, unless it is done ``again``."""
        ...

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward; after the ``last`` one gradients are averaged over the ranks."""
        ...

    def can_give_up(self, *, in_backward: bool, last: bool) -> bool:
        """Whether a micro-batch that runs out of memory, in backward or before, leaves no other rank waiting."""
        ...

    def give_up(self) -> None:
        """It did, on this rank."""
        ...

    def take_part(self, *, spoil: bool) -> None:
        """Do what the other ranks still wait for in this step; with ``spoil`` its mean gradient becomes NaN on all."""
        ...

    def restore_buffers(self) -> None:
        """Put back what was kept: the step was not taken."""
        ...


def replica_of(
    config: RunConfig, *, model: nn.Module, optimizer: torch.optim.Optimizer, worker: Worker
) -> ModelReplica:
    """Collective. Raises ``SessionError`` where model and optimizer are not what ``train.parallel`` asks for."""
    sharded = is_sharded(model)
    if sharded and config.train.parallel == "ddp":
        raise SessionError(
            "the model is sharded (fully_shard was called on it) and train.parallel is ddp: write train.parallel: fsdp2"
        )
    if sharded or (config.train.parallel == "fsdp2" and worker.world_size > 1):
        return ShardedReplica(model, optimizer=optimizer, collective=worker.collective, device=worker.device)
    return Replica(
        model,
        collective=worker.collective,
        device=worker.device,
        find_unused_parameters=config.train.find_unused_parameters,
        averages=not config.train.reproducible,
        group_changes=worker.membership is not None,
    )


def attach_of(replica: ModelReplica) -> Attach | None:
    """How a hook comes to see the gradients of sharded parameters; ``None`` where autograd knows the parameters."""
    return replica.gradients.attach if isinstance(replica, ShardedReplica) else None


def meter_of(config: RunConfig, *, model: nn.Module, trained: Sequence[nn.Parameter], replica: ModelReplica) -> Meter:
    """What reads the gradients: by the config's estimator, and of shards between micro-batches."""
    if isinstance(replica, ShardedReplica):
        mean = ShardedMeanGradient(trained, sum_over_ranks=replica.sum_over_ranks)
        return GradMeter(trained, attach=replica.gradients.attach, mean=mean)
    return find_estimator(config.measure.estimator).build(model, trained, config.measure)
