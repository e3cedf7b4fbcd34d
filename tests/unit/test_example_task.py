"""The README's example task is complete: it builds, fits the protocol and learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.core.cursor import Stream
from orchestrator.runtime.loader import PositionLoader
from orchestrator.tasks.protocol import Task, build_task, check_task, collate_of

EXAMPLE = Path(__file__).with_name("example_task.py")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    return build_task("example_task:diabetes", {"width": 8}, seed=3)


def test_the_example_is_about_thirty_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 34


def test_options_and_seed_reach_the_factory(task: Task) -> None:
    assert task.model()[0].out_features == 8
    same, other = (build_task("example_task:diabetes", seed=seed) for seed in (3, 4))
    assert same.train_set.indices == task.train_set.indices != other.train_set.indices


def test_the_example_learns(task: Task) -> None:
    torch.manual_seed(0)
    model = task.model()
    check_task(task, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = PositionLoader(
        task.train_set, collate_of(task), index_of=Stream(size=len(task.train_set), seed=0).indices, seed=0
    )
    held_out = collate_of(task)([task.eval_set[i] for i in range(len(task.eval_set))])
    for step in range(200):
        optimizer.zero_grad()
        task.loss(model, loader.take(32 * step, 32)).backward()
        optimizer.step()
    with torch.no_grad():
        unexplained = float(task.metrics(model, held_out)["unexplained_variance"])
    guess = np.var(held_out[1].numpy())
    assert unexplained < 0.75 * guess, f"{unexplained} of {guess}"
