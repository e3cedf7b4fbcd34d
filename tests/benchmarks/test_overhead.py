"""What measuring on every step costs: step time over plain DDP of the same model, two gloo processes, paired blocks.

Run with -s to see the figures. The plain side picks its samples out of stored tensors by index, which is faster than a
DataLoader, so that nothing but the loop and the measurement is compared. Blocks alternate within one run and only their
ratios count, since other work on the machine slows both sides alike. Where the two sides' memory lies favours one of
them for the life of a process, so the blocks are those of several fleets, and which side is built first alternates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from orchestrator.session import Session
from tests.support import config, cross_entropy, run_fleet

FLEETS, BLOCKS, MICRO, WORLD = 4, 12, 64, 2


def convnet() -> nn.Module:
    """3 x 32 x 32 images; three convolutions of 24, 48 and 96 channels; 0.1 million parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.GroupNorm(4, 24), nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.GroupNorm(8, 48), nn.ReLU(),
        nn.Conv2d(48, 96, 3, padding=1), nn.GroupNorm(8, 96), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1536, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """784 -> 900 -> 320 -> 10; 0.998 million parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 900), nn.ReLU(), nn.Linear(900, 320), nn.ReLU(), nn.Linear(320, 10))


# Model, shape of a sample, steps in a block: multiples of those between two decisions, so that all blocks are alike.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "convnet": (convnet, (3, 32, 32), 8),
    "mlp": (mlp, (784,), 16),
}


def images(shape: tuple[int, ...]) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(2048, *shape, generator=generator), torch.randint(10, (2048,), generator=generator)
    )


def plain_steps(model: nn.Module, data: TensorDataset, accumulation: int) -> Iterator[None]:
    ddp: nn.Module = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    while True:
        batches = torch.randperm(len(data)).split(MICRO)
        for first in range(0, len(batches), accumulation):
            for i in range(accumulation):
                inputs, labels = (tensor[batches[first + i]] for tensor in data.tensors)
                if i < accumulation - 1:
                    with ddp.no_sync():  # type: ignore[operator]  # DDP's method
                        (nn.functional.cross_entropy(ddp(inputs), labels) / accumulation).backward()
                else:
                    (nn.functional.cross_entropy(ddp(inputs), labels) / accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def library_steps(model: nn.Module, data: TensorDataset, accumulation: int, folder: str) -> Iterator[None]:
    batch = MICRO * WORLD * accumulation
    settings = config(
        folder,
        train={"samples": 10_000 * batch},
        batch={"initial": batch, "micro_batch": MICRO, "max": 2048},
        optimizer={"lr": 1e-3},
        controller={"mode": "advise", "policy": "noise_scale", "every_samples": 8 * batch},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with Session(settings, model=model, optimizer=optimizer, dataset=data) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            yield


def ratios(rank: int, name: str, accumulation: int, folder: str, library_first: bool) -> list[float]:
    build, shape, steps = MODELS[name]
    data = images(shape)
    sides = {}
    for side in ("library", "plain") if library_first else ("plain", "library"):
        if side == "library":
            sides[side] = library_steps(build(), data, accumulation, folder)
        else:
            sides[side] = plain_steps(build(), data, accumulation)
        for _ in range(4):
            next(sides[side])
    found = []
    for block in range(BLOCKS):
        took = {}
        # Which side goes first alternates too: the second finds warmer caches.
        for which in ("plain", "library") if block % 2 else ("library", "plain"):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                next(sides[which])
            dist.barrier()
            took[which] = time.perf_counter() - began
        found.append(took["library"] / took["plain"])
    return found


@pytest.mark.benchmark
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("name", "bound"), [("convnet", 1.05), ("mlp", 1.10)])
def test_measuring_every_step_costs_little(tmp_path: Path, name: str, bound: float, accumulation: int) -> None:
    fleets = [
        run_fleet(ratios, WORLD, name, accumulation, str(tmp_path / str(fleet)), fleet % 2 == 0)[0]
        for fleet in range(FLEETS)
    ]
    found = np.concatenate(fleets)
    draws = np.random.default_rng(0).choice(found, size=(4000, len(found)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    median = float(np.median(found))
    print(
        f"\n{name}, micro-batch {MICRO}, accumulation {accumulation}: median paired ratio {median:.3f}, "
        f"95 % bootstrap interval [{low:.3f}, {high:.3f}] over {len(found)} blocks of {FLEETS} fleets, bound {bound}"
    )
    assert low <= bound
