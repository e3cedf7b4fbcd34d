"""One process of the fleet, as a value that the launcher builds and passes in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from orchestrator.config import RunConfig
from orchestrator.ports import Brain, Collective, Membership, Tracker
from orchestrator.runtime.brain import LocalBrain
from orchestrator.runtime.collective import ProcessGroupCollective, Solo
from orchestrator.runtime.group import Groups


def _cannot_hold(path: str) -> None:
    raise RuntimeError(f"this runtime cannot resize, yet was asked to hold at {path}")


def _report_nothing(path: str) -> None:
    """Runtimes without a head node have nobody to tell of a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Rank, device, clock and the ways to the others. ``brain`` is there on rank zero only.

    ``hold`` is called on every rank after the checkpoint of a resize was written; it does not return.
    ``report_checkpoint`` is called on every rank after any other checkpoint.
    """

    collective: Collective
    device: torch.device
    brain: Brain | None
    runtime: str
    now: Callable[[], float] = time.perf_counter
    wall_time: Callable[[], float] = time.time
    hold: Callable[[str], None] = _cannot_hold
    report_checkpoint: Callable[[str], None] = _report_nothing
    resize_cost_s: float | None = None  # of the resize that led here, if one did
    folder_ready: bool = False  # the launcher has made or checked the run's folder
    own_process: bool = False  # a launcher has started this process for the run, which pays for it from its start
    trackers: Callable[[], tuple[Tracker, ...]] = tuple  # that follow the run besides those of the config; rank zero's
    membership: Membership | None = None  # where the group may change while training goes on,
    groups: Groups | None = None  # and what forms it

    @property
    def rank(self) -> int:
        return self.collective.rank

    @property
    def world_size(self) -> int:
        return self.collective.world_size

    @property
    def controller(self) -> Brain:
        """Rank zero's way to the controller."""
        assert self.brain is not None, "only rank zero talks to the controller"
        return self.brain

    @property
    def workers_stay(self) -> bool:
        """Whether the fleet is what it is: only under Ray can workers come and go."""
        return self.runtime != "ray"


def local_worker(config: RunConfig, *, device: torch.device | None = None) -> Worker:
    """The worker of this process: one of a ``torch.distributed`` group if that is initialised, else alone."""
    collective: Collective = ProcessGroupCollective() if dist.is_initialized() else Solo()
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Worker(
        collective=collective,
        device=device,
        brain=LocalBrain(config, workers_stay=True) if collective.rank == 0 else None,
        runtime="torchrun" if dist.is_initialized() else "local",
    )
