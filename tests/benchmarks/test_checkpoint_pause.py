"""What a regular checkpoint costs: how long training stands still for the copy, and its longest step with and without.

Run with -s to see the figures. The machine's other work only lengthens steps, so each kind is measured in several runs
that alternate, and of their longest steps the shortest is shown. While the writer's thread has work, steps share the
cores with it, by as much as there are too few of them; what is bounded is the pause.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from orchestrator.runtime import folder
from orchestrator.session import Session
from tests.support import config, cross_entropy

BATCH, STEPS, RUNS = 64, 25, 3
BOUND_S = 0.15


def model_of_10_million() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1024, 2200), nn.ReLU(), nn.Linear(2200, 2200), nn.ReLU(), nn.Linear(2200, 1300), nn.ReLU(),
        nn.Linear(1300, 10),
    )  # fmt: skip


def measure(path: Path, **checkpoint: Any) -> tuple[float, float, list[dict[str, Any]]]:
    """The longest step, the median one, and the events of checkpoints. The first quarter warms up."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(512, 1024, generator=generator), torch.randint(10, (512,), generator=generator))
    model = model_of_10_million()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    settings = config(
        path,
        train={"samples": STEPS * BATCH},
        batch={"initial": BATCH, "micro_batch": BATCH // 2, "max": BATCH},
        checkpoint=checkpoint,
    )
    took_s = []
    with Session(settings, model=model, optimizer=optimizer, dataset=data) as session:
        last_s = time.perf_counter()
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            if session.step_number == STEPS - 1:
                break  # the last one saves the end
            session.step()
            now_s = time.perf_counter()
            took_s.append(now_s - last_s)
            last_s = now_s
        session.close()
    saved = [row for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] == "checkpoint"]
    steady = took_s[STEPS // 4 :]
    return max(steady), statistics.median(steady), saved


@pytest.mark.benchmark
def test_a_step_that_begins_a_checkpoint_costs_only_the_copy(tmp_path: Path) -> None:
    every = {"every_samples": 8 * BATCH}
    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "asynchronous": every,
        "synchronous": every | {"asynchronous": False},
    }
    longest: dict[str, list[float]] = {kind: [] for kind in kinds}
    usual: list[float] = []
    paused: list[float] = []
    took: list[float] = []
    for run in range(RUNS):
        for kind, section in kinds.items():
            most_s, median_s, saved = measure(tmp_path / f"{kind}{run}", **section)
            longest[kind].append(most_s)
            usual.append(median_s)
            if kind == "asynchronous":
                paused += [row["paused_s"] for row in saved]
                took += [row["duration_s"] for row in saved]
    parameters = sum(p.numel() for p in model_of_10_million().parameters())
    found = {kind: min(values) for kind, values in longest.items()}
    print(
        f"\n{parameters / 1e6:.1f} million parameters with momentum, a checkpoint each 8 steps of "
        f"{statistics.median(usual):.3f} s: longest step {found['none']:.3f} s without, "
        f"{found['asynchronous']:.3f} s asynchronous, {found['synchronous']:.3f} s synchronous; training stood still "
        f"{statistics.median(paused):.3f} s (at most {max(paused):.3f} s, bound {BOUND_S} s), and the writing took "
        f"{statistics.median(took):.3f} s beside it"
    )
    assert max(paused) <= BOUND_S
    assert found["asynchronous"] < found["synchronous"]
