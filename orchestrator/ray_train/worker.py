"""What runs on each Ray Train worker: the same training as everywhere, with the controller behind the mailbox."""

from __future__ import annotations

import importlib
import time
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint
from ray.train.v2.api.report_config import CheckpointUploadMode

from orchestrator.config import RunConfig
from orchestrator.ports import Collective
from orchestrator.ray_train.mailbox import open_mailbox
from orchestrator.ray_train.metrics import RunMetrics
from orchestrator.runtime.collective import ProcessGroupCollective, Solo
from orchestrator.runtime.worker import Worker


def run_worker(settings: dict[str, Any]) -> bool:
    """Ray Train's train function. ``settings`` holds the config and the ``module:function`` that trains."""
    config = RunConfig.model_validate(settings["config"], strict=False)
    module, _, function = settings["train"].partition(":")
    train = getattr(importlib.import_module(module), function)
    finished: bool = train(config, ray_worker(config), resume=True)
    return finished


def ray_worker(config: RunConfig) -> Worker:
    context = ray.train.get_context()
    collective: Collective = ProcessGroupCollective() if context.get_world_size() > 1 else Solo()
    zero = context.get_world_rank() == 0
    return Worker(
        collective=collective,
        device=ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu"),
        brain=open_mailbox(every_samples=config.controller.every_samples) if zero else None,
        runtime="ray",
        hold=_hold,
        report_checkpoint=_report,
        folder_ready=True,
        own_process=True,
        trackers=(RunMetrics(config),) if zero else (),
    )


def _report(path: str) -> None:
    ray.train.report({}, checkpoint=Checkpoint(path), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def _hold(path: str) -> None:
    """Tell the controller that the checkpoint is there, and wait: it ends this process to start the new group."""
    ray.train.report({"hold": path}, checkpoint=Checkpoint(path), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
    while True:
        time.sleep(1.0)
