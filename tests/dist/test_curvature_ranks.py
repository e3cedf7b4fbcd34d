"""The curvature is measured by all ranks together: the same readings on any number of them, or a refusal by all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from orchestrator.runtime import folder
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp, run_fleet

KEYS = ("hessian_noise_scale", "hessian_noise_low", "epsilon_max", "trace_hessian_cov", "grad_hessian_grad", "grad_sq")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def train(rank: int, place: str, broken_rank: int | None, every: int | None) -> list[Any]:
    settings = config(place, measure={"curvature_every_samples": every}, train={"samples": 320})
    model = nn.Sequential(mlp(), nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loss_of(module: nn.Module, batch: Any) -> Tensor:
        loss = cross_entropy(module, batch)
        return Once.apply(loss * loss) if rank == broken_rank else loss

    found: list[Any] = []
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for batch in step:
                session.backward(cross_entropy(session.model, batch))
            session.step()
            if session.curvature_due:
                found.append(session.measure_curvature(loss_of))
    return [*found, *(p.detach().tolist() for p in model.parameters())]


def events(place: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(place / "run" / folder.EVENTS) if row["kind"] == kind]


@pytest.mark.dist
def test_one_and_three_ranks_read_the_same_and_train_on_as_without(tmp_path: Path) -> None:
    run_fleet(train, 1, str(tmp_path / "1"), None, 128)
    ranks = run_fleet(train, 3, str(tmp_path / "3"), None, 128)
    assert all(found == ranks[0] for found in ranks)
    assert ranks[0][2:] == run_fleet(train, 3, str(tmp_path / "off"), None, None)[0]
    alone, shared = (events(tmp_path / world_size, "curvature") for world_size in ("1", "3"))
    assert [row["samples_seen"] for row in alone] == [128, 256]
    for mine, theirs in zip(shared, alone, strict=True):
        # The weights differ in their last bits between layouts.
        assert [mine[key] for key in KEYS] == pytest.approx([theirs[key] for key in KEYS], rel=1e-4)


@pytest.mark.dist
def test_all_ranks_refuse_when_one_cannot_and_the_reason_is_that_ranks(tmp_path: Path) -> None:
    ranks = run_fleet(train, 2, str(tmp_path), 1, 128)
    assert [found[0] for found in ranks] == [None, None]
    assert [len(found) for found in ranks] == [7, 7]  # asked once, then six parameters
    (event,) = events(tmp_path, "curvature_refused")
    assert "once_differentiable" in event["reason"]
    assert events(tmp_path, "finished")
