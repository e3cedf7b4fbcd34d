"""Branches on several ranks: all train them alike, and what they find does not depend on the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.runtime import folder
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from tests.support import EAGER, blobs, config, cross_entropy, mlp, run_fleet

pytestmark = pytest.mark.dist
BRANCHED: dict[str, Any] = {
    **EAGER,
    "policy": "branched",
    "branch_every_samples": 256,
    "branch_samples": 256,
    "branch_tolerance": 0.05,
}


def member(rank: int, path: Path) -> list[Tensor]:
    return trained(path)


def trained(path: Path) -> list[Tensor]:
    settings = config(
        path, batch={"initial": 16, "micro_batch": 4, "max": 128}, train={"samples": 800}, controller=BRANCHED
    )
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    worker = local_worker(settings)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), worker=worker) as session:
        for step in session:
            for samples in step:
                session.backward(lambda samples=samples: cross_entropy(session.model, samples))
            session.step()
    return [p.detach() for p in model.parameters()]


def rounds(path: Path) -> list[list[list[float]]]:
    return [row["losses"] for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] == "branches"]


def targets(path: Path) -> list[int]:
    return [row["target_batch"] for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] == "decision"]


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    alone = trained(tmp_path / "one")
    together = run_fleet(member, 2, tmp_path / "two")
    for mine, theirs in zip(*together, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(alone, together[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)
    assert targets(tmp_path / "two") == targets(tmp_path / "one")
    assert max(targets(tmp_path / "one")) > 16
    one, two = rounds(tmp_path / "one"), rounds(tmp_path / "two")
    assert len(one) == len(two) >= 2
    for mine, theirs in zip(one, two, strict=True):
        assert [batch for batch, _ in mine] == [batch for batch, _ in theirs]
        assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], rel=1e-4)
