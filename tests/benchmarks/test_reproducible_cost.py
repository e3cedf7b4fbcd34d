"""What ``train.reproducible`` costs: step time over the same run without it, two gloo processes, paired blocks.

Run with -s to see the figures. Blocks alternate within one run and only their ratios count, since other work on the
machine slows both sides alike; they are those of several fleets, and which side is built first alternates, as in
``test_overhead``, whose models these are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from orchestrator.session import Session
from tests.benchmarks.test_overhead import BLOCKS, FLEETS, MICRO, MODELS, WORLD, images
from tests.support import config, cross_entropy, run_fleet


def steps(name: str, accumulation: int, folder: str, reproducible: bool) -> Iterator[None]:
    build, shape, _ = MODELS[name]
    batch = MICRO * WORLD * accumulation
    settings = config(
        f"{folder}/{reproducible}",
        train={"samples": 10_000 * batch, "reproducible": reproducible},
        batch={"initial": batch, "micro_batch": MICRO, "max": 2048},
        optimizer={"lr": 1e-3},
        controller={"mode": "advise", "policy": "noise_scale", "every_samples": 8 * batch},
    )
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with Session(settings, model=model, optimizer=optimizer, dataset=images(shape)) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            yield


def ratios(rank: int, name: str, accumulation: int, folder: str, first: bool) -> list[float]:
    count = MODELS[name][2]
    sides = {}
    for reproducible in (first, not first):
        sides[reproducible] = steps(name, accumulation, folder, reproducible)
        for _ in range(4):
            next(sides[reproducible])
    found = []
    for block in range(BLOCKS):
        took = {}
        for reproducible in (False, True) if block % 2 else (True, False):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(count):
                next(sides[reproducible])
            dist.barrier()
            took[reproducible] = time.perf_counter() - began
        found.append(took[True] / took[False])
    return found


@pytest.mark.benchmark
@pytest.mark.parametrize("accumulation", [1, 4, 3])  # of three micro-batches a rank is left with two blocks
@pytest.mark.parametrize(("name", "bound"), [("convnet", 1.15), ("mlp", 1.6)])
def test_the_same_bits_cost_little(tmp_path: Path, name: str, bound: float, accumulation: int) -> None:
    fleets = [
        run_fleet(ratios, WORLD, name, accumulation, str(tmp_path / str(fleet)), fleet % 2 == 0)[0]
        for fleet in range(FLEETS)
    ]
    found = np.concatenate(fleets)
    draws = np.random.default_rng(0).choice(found, size=(4000, len(found)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    print(
        f"\n{name}, micro-batch {MICRO}, accumulation {accumulation}: median paired ratio {np.median(found):.3f}, "
        f"95 % bootstrap interval [{low:.3f}, {high:.3f}] over {len(found)} blocks of {FLEETS} fleets, bound {bound}"
    )
    assert low <= bound
