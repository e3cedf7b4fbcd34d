"""The calibration of norm_layers is one and the same on all ranks, and on any layout of a micro-batch list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.core import calibration
from orchestrator.runtime import folder
from orchestrator.runtime.calibration import Calibration
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp, run_fleet

BATCH, STEPS, SWITCH = 32, 16, 10


def train(rank: int, path: str) -> list[Any]:
    """What this rank's calibration keeps at the end."""
    calibration.WIDEST = float("inf")  # ten steps tell no slope well, and the layout is what this is about
    calibration.CONFIDENCE = 0.1
    settings = config(
        path,
        train={"samples": STEPS * BATCH},
        batch={"initial": BATCH, "micro_batch": 8, "max": BATCH},
        measure={"estimator": "norm_layers", "calibration_samples": SWITCH * BATCH},
    )
    kept: list[Any] = []
    conclude = Calibration.conclude

    def seen(self: Calibration, *given: Any, **more: Any) -> None:
        conclude(self, *given, **more)
        kept.append(self.memory())

    Calibration.conclude = seen  # type: ignore[method-assign]
    model = nn.Sequential(nn.LayerNorm(20), mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    return kept


@pytest.mark.dist
def test_every_rank_fits_alike_and_every_layout_to_float_summation_error(tmp_path: Path) -> None:
    found = {}
    for world_size in (1, 2, 3):  # accumulation 4; 2 and 2; 2, 1 and 1
        path = tmp_path / str(world_size)
        first, *others = run_fleet(train, world_size, str(path))
        assert len(first) == 1
        assert all(other == first for other in others)  # to the last bit
        (event,) = (row for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] == "calibration")
        assert event["step"] == SWITCH - 1
        assert event["problem"] is None
        rows = folder.surviving(path / "run" / folder.METRICS)
        found[world_size] = (event, rows)
    alone, alone_rows = found[1]
    for event, rows in found.values():
        for key in ("grad_sq_ratio", "trace_cov_ratio", "slope"):
            assert event[key] == pytest.approx(alone[key], rel=2e-5)
        for mine, theirs in zip(rows, alone_rows, strict=True):
            scale = abs(theirs["grad_sq"]) + abs(theirs["trace_cov"])
            for key in ("grad_sq", "trace_cov"):
                assert mine[key] == pytest.approx(theirs[key], abs=5e-5 * scale)
