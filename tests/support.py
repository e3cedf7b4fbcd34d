"""What several tests share: small configs, small tasks, and fleets of real processes."""

from __future__ import annotations

import multiprocessing
import queue
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from orchestrator.config import RunConfig

# One server that has imported torch; its children begin in milliseconds and inherit no process group.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "torch.distributed", "orchestrator.session", "orchestrator.train"])
_PATIENCE_S = 120.0

# A controller that follows the measured noise scale several times in a short run: it believes half an interval.
EAGER: dict[str, Any] = {
    "policy": "noise_scale",
    "every_samples": 128,
    "cooldown_samples": 0,
    "half_life_samples": 1024,
    "confidence": 0.5,
    "deadband": 1.1,
}


def config(folder: Path | str, **sections: Any) -> RunConfig:
    """A small valid config; each section given is merged over the defaults below."""
    base: dict[str, Any] = {
        "run": {"name": "run", "dir": str(folder), "seed": 0},
        "task": {"name": "digits"},
        "train": {"samples": 640},
        "batch": {"initial": 32, "micro_batch": 8, "max": 32},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "controller": {"policy": "fixed", "every_samples": 128},
    }
    for name, given in sections.items():
        base[name] = {**base.get(name, {}), **given} if isinstance(given, dict) else given
    return RunConfig.model_validate(base)


def blobs(size: int = 256, *, features: int = 20, classes: int = 4, seed: int = 1) -> TensorDataset:
    """Points around class centres."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    centres = torch.randn(classes, features, generator=generator)
    return TensorDataset(centres[labels] + torch.randn(size, features, generator=generator), labels)


def mlp(features: int = 20, classes: int = 4, width: int = 32, *, seed: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes)
    )


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def run_fleet(function: Callable[..., Any], world_size: int, *args: Any, expect_failure: bool = False) -> list[Any]:
    """Run ``function(rank, *args)`` in ``world_size`` processes of one gloo group; their results by rank.

    A rank that raises fails the call with its traceback; with ``expect_failure`` the exceptions are returned instead.
    """
    results: Any = _FORKS.Queue()
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            _FORKS.Process(target=_member, args=(function, rank, world_size, f"{scratch}/store", args, results))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        try:
            while len(found) < world_size:
                try:
                    rank, result, failure = results.get(timeout=_PATIENCE_S)
                except queue.Empty:
                    raise AssertionError(f"only ranks {sorted(found)} of {world_size} answered") from None
                if failure is not None and not expect_failure:
                    raise AssertionError(f"rank {rank} failed:\n{failure}")
                found[rank] = result if failure is None else failure
            for process in processes:
                process.join(_PATIENCE_S)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    return [found[rank] for rank in range(world_size)]


def _member(
    function: Callable[..., Any], rank: int, world_size: int, store: str, args: tuple[Any, ...], results: Any
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        results.put((rank, function(rank, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def free_port() -> int:
    """One of this machine's that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
