"""How are the parts of a session made and put together?

Each part is given those that it asks, and no other. Ranks exchange as some of them are made, so all keep the order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orchestrator.config import RunConfig
from orchestrator.core.controller import Rules
from orchestrator.core.cursor import Stream
from orchestrator.errors import TaskError
from orchestrator.measure.meter import Meter
from orchestrator.ports import Collective
from orchestrator.runtime.boundary import Boundary
from orchestrator.runtime.branches import Branches
from orchestrator.runtime.calibration import Calibration
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.course import Course
from orchestrator.runtime.curvature import Curvature
from orchestrator.runtime.ema import EmaWeights
from orchestrator.runtime.exchange import Exchange
from orchestrator.runtime.feed import Feed
from orchestrator.runtime.fitting import Fitting
from orchestrator.runtime.group_noise import GroupNoise
from orchestrator.runtime.history import History
from orchestrator.runtime.loader import PositionLoader
from orchestrator.runtime.parallel import ModelReplica, attach_of, meter_of, replica_of
from orchestrator.runtime.peers import Peers, peers_of
from orchestrator.runtime.reproducible_step import ReproducibleStep
from orchestrator.runtime.rules import companions_from, rules_from
from orchestrator.runtime.setbacks import Setbacks
from orchestrator.runtime.trained import Trained
from orchestrator.runtime.trials import Trials
from orchestrator.runtime.update import WeightUpdate
from orchestrator.runtime.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a session asks, each for its own question."""

    rules: Rules
    replica: ModelReplica
    update: WeightUpdate
    reproducible: ReproducibleStep | None  # in ``reproducible`` mode
    ema: EmaWeights | None  # where the weights are averaged
    meter: Meter
    calibration: Calibration
    groups: GroupNoise
    curvature: Curvature
    history: History
    course: Course
    boundary: Boundary
    setbacks: Setbacks
    fitting: Fitting
    peers: Peers
    feed: Feed


def assemble(
    config: RunConfig,
    *,
    worker: Worker,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    dataset: Any,
    collate: Callable[[list[Any]], Any] | None,
) -> Parts:
    """Collective. Raises ``TaskError`` where the ranks' data sets differ in length; a newcomer's is compared later."""
    collective, dataset_size = worker.collective, len(dataset)
    if worker.membership is None or not worker.membership.joins:
        _check_same_length(dataset_size, collective)
    rules = rules_from(config, dataset_size=dataset_size, workers_stay=worker.workers_stay)
    replica = replica_of(config, model=model, optimizer=optimizer, worker=worker)
    update = WeightUpdate(
        optimizer,
        model.parameters(),
        scaler=scaler,
        max_grad_norm=config.train.max_grad_norm,
        device=worker.device,
        # What the parts say is summed with the rest in reproducible mode.
        collective=Solo() if config.train.reproducible else collective,
        base_batch=rules.base_batch,
        companions=companions_from(config),
    )
    reproducible = None
    if config.train.reproducible:
        reproducible = ReproducibleStep(model, totals=update.part_totals, collective=collective)
    half_life = config.train.ema_half_life_samples
    ema = None if half_life is None else EmaWeights(model, half_life_samples=half_life)
    trained = Trained(model=replica.model, optimizer=optimizer, scaler=scaler, ema=None if ema is None else ema.tensors)
    meter = meter_of(config, model=model, trained=update.trained, replica=replica)
    calibration = Calibration(config.measure.calibration_samples, meter=meter)
    loader = PositionLoader(
        dataset,
        collate,
        index_of=Stream(size=dataset_size, seed=config.run.seed).indices,
        seed=config.run.seed,
        loader_workers=config.data.loader_workers,
        prefetch=config.data.prefetch,
        pin_memory=config.data.pin_memory,
        seed_each_sample=config.data.seed_each_sample,
    )
    history = History(
        config, worker=worker, trained=trained, rules=rules, dataset_size=dataset_size, calibration=calibration
    )
    journal, talk = history.journal, history.talk
    groups = GroupNoise(
        config,
        model=model,
        optimizer=optimizer,
        trained=update.trained,
        collective=collective,
        journal=journal,
        attach=attach_of(replica),
    )
    curvature = Curvature(
        config,
        model=replica.model,
        parameters=update.trained,
        dataset=dataset,
        collate=collate,
        worker=worker,
        journal=journal,
    )
    branches = Branches(
        rules.branching, model=model, optimizer=optimizer, scaler=scaler, collective=collective, device=worker.device
    )
    course = Course(
        config, rules, collective=collective, branches=branches, loader=loader, update=update, journal=journal
    )
    boundary = Boundary(
        config,
        worker=worker,
        course=course,
        exchange=Exchange(collective, talk, calibration, lag_steps=rules.lag_steps, act=rules.act),
        groups=groups,
        saving=history.saving,
        talk=talk,
        history=history,
        passes_over_non_finite=scaler is not None,
    )
    setbacks = Setbacks(
        config,
        worker=worker,
        replica=replica,
        update=update,
        meter=meter,
        course=course,
        boundary=boundary,
        talk=talk,
    )
    trials = Trials(
        config,
        model=replica.model,
        optimizer=optimizer,
        dataset=dataset,
        collate=collate,
        worker=worker,
        update=update,
        meter=meter,
        groups=groups,
    )
    fitting = Fitting(
        config,
        rules,
        dataset_size=dataset_size,
        worker=worker,
        trials=trials,
        course=course,
        journal=journal,
        talk=talk,
    )
    peers = peers_of(
        worker,
        trained=trained,
        replica=replica,
        update=update,
        meter=meter,
        course=course,
        boundary=boundary,
        succession=history.succession,
        dataset_size=dataset_size,
    )
    feed = Feed(
        config,
        worker=worker,
        peers=peers,
        course=course,
        loader=loader,
        replica=replica,
        update=update,
        reproducible=reproducible,
        meter=meter,
        groups=groups,
    )
    return Parts(
        rules=rules,
        replica=replica,
        update=update,
        reproducible=reproducible,
        ema=ema,
        meter=meter,
        calibration=calibration,
        groups=groups,
        curvature=curvature,
        history=history,
        course=course,
        boundary=boundary,
        setbacks=setbacks,
        fitting=fitting,
        peers=peers,
        feed=feed,
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
