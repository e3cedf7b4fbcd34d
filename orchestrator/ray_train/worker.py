"""What runs on each Ray Train worker: the same training as everywhere, with the controller behind the mailbox."""

from __future__ import annotations

import importlib
import time
from dataclasses import replace
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint
from ray.train.v2.api.report_config import CheckpointUploadMode

from orchestrator.config import RunConfig
from orchestrator.ports import Collective
from orchestrator.ray_train.door import the_door
from orchestrator.ray_train.mailbox import open_mailbox
from orchestrator.ray_train.metrics import RunMetrics
from orchestrator.ray_train.reports import number_reports
from orchestrator.runtime.collective import Apart, ChangingCollective, ProcessGroupCollective, Solo
from orchestrator.runtime.group import Groups
from orchestrator.runtime.worker import Worker

_FIRST_GROUP_S = 120.0  # for all workers to have imported what they train


def run_worker(settings: dict[str, Any]) -> bool:
    """Ray Train's train function. ``settings`` holds the config and the ``module:function`` that trains."""
    config = RunConfig.model_validate(settings["config"], strict=False)
    module, _, function = settings["train"].partition(":")
    train = getattr(importlib.import_module(module), function)
    finished: bool = train(config, ray_worker(config), resume=True)
    return finished


def ray_worker(config: RunConfig) -> Worker:
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    live = config.workers.resize == "live"
    worker = Worker(
        collective=Apart() if live else _formed_by_ray(),
        device=device,
        brain=None,
        runtime="ray",
        hold=_hold,
        report_checkpoint=_report,
        folder_ready=True,
        own_process=True,
        trackers=lambda: (RunMetrics(config),),
    )
    if live:
        worker = _in_a_changing_group(worker, config)
    # Any rank may become rank zero where the group changes.
    speaks = live or worker.rank == 0
    return replace(worker, brain=open_mailbox(every_samples=config.controller.every_samples) if speaks else None)


def _formed_by_ray() -> Collective:
    return ProcessGroupCollective() if ray.train.get_context().get_world_size() > 1 else Solo()


def _in_a_changing_group(worker: Worker, config: RunConfig) -> Worker:
    """In the first group, or apart from it until the others take this worker in."""
    door = the_door()
    number_reports()
    groups = Groups(door.member, device=worker.device, hang_timeout_s=config.recovery.hang_timeout_s)
    first: Collective = Apart()
    if not door.joins:
        view = door.latest()
        assert view is not None, "the first group is told before training begins"
        first = groups.form(view, overtaken=lambda: False, patience_s=_FIRST_GROUP_S)
        door.formed(view, door.carry())
    return replace(worker, collective=ChangingCollective(first), membership=door, groups=groups)


def _report(path: str) -> None:
    ray.train.report({}, checkpoint=Checkpoint(path), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def _hold(path: str) -> None:
    """Tell the controller that the checkpoint is there, and wait: it ends this process to start the new group."""
    ray.train.report({"hold": path}, checkpoint=Checkpoint(path), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
    while True:
        time.sleep(1.0)
