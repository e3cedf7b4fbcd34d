"""The noise scale by group depends on the micro-batch list, not on which rank computed what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.runtime import folder
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, run_fleet

NUMBERS = ("grad_sq", "trace_cov", "noise_scale", "noise_low", "noise_high", "signal_to_noise", "diversity")


class Odd(nn.Module):
    """Dropout, a frozen bias, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 4))
        self.unused = nn.Linear(3, 3)
        self.body[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def train(rank: int, place: str, sections: dict[str, Any]) -> None:
    base: dict[str, Any] = {
        "train": {"samples": 80 * 32, "max_grad_norm": 0.3, "find_unused_parameters": True},
        # 32 = 12 + 12 + 8: uneven, and of four ranks one takes none.
        "batch": {"initial": 32, "micro_batch": 12, "max": 32},
        "measure": {"groups": "layers"},
        "controller": {"policy": "fixed", "every_samples": 256, "half_life_samples": 1024, "confidence": 0.8},
    }
    settings = config(place, **(base | sections))
    model = Odd()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.05)
    if settings.optimizer.name == "adam":
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()


def lines(place: Path) -> list[dict[str, Any]]:
    return folder.surviving(place / "run" / folder.GROUPS)


def assert_alike(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    worst, compared = 0.0, 0
    for a, b in zip(mine, theirs, strict=True):
        assert (a["step"], list(a["groups"])) == (b["step"], list(b["groups"]))
        for name in a["groups"]:
            one, other = a["groups"][name], b["groups"][name]
            assert one["verdict"] == other["verdict"]
            size = max(abs(other["grad_sq"] or 0.0), abs(other["trace_cov"] or 0.0))
            for key in NUMBERS:
                assert (one[key] is None) == (other[key] is None), (name, key)
                if one[key] is not None and size:
                    scale = size if key in ("grad_sq", "trace_cov") else abs(other[key])
                    worst = max(worst, abs(one[key] - other[key]) / (scale or 1.0))
                    compared += 1
    print(f"largest relative difference between layouts, of {compared} numbers: {worst:.2g}")
    assert compared > 80
    # The weights differ in their last bits between layouts, and a noise scale is a ratio with a small denominator.
    assert worst < 1e-5


@pytest.mark.dist
def test_groups_agree_on_one_two_and_four_ranks_one_of_which_has_nothing_to_do(tmp_path: Path) -> None:
    for world_size in (1, 2, 4):
        run_fleet(train, world_size, str(tmp_path / str(world_size)), {})
    alone = lines(tmp_path / "1")
    assert len(alone) == 9
    assert list(alone[0]["groups"]) == ["body.0", "body.3", "unused"]
    assert alone[-1]["groups"]["unused"]["trace_cov"] == 0.0
    assert alone[-1]["groups"]["body.3"]["verdict"] == "measured"
    for world_size in (2, 4):
        assert_alike(lines(tmp_path / str(world_size)), alone)


@pytest.mark.dist
def test_a_run_with_adam_has_one_preconditioned_noise_scale_on_one_rank_and_on_two(tmp_path: Path) -> None:
    sections = {
        "optimizer": {"name": "adam", "lr": 1e-3, "momentum": None},
        "measure": {"groups": "layers", "preconditioned": True},
    }
    for world_size in (1, 2):
        run_fleet(train, world_size, str(tmp_path / str(world_size)), sections)
    alone = lines(tmp_path / "1")
    found = [row["groups"]["preconditioned"] for row in alone]
    # The state is settled from step 50 on; decisions are taken at steps 7, 15, 23, ...
    assert [entry["trace_cov"] is not None for entry in found] == [row["step"] >= 50 for row in alone]
    for entry in found[6:]:
        assert math.isfinite(entry["trace_cov"])
        assert entry["trace_cov"] > 0
    assert found[-1]["noise_scale"] > 0
    assert found[-1]["verdict"] == "measured"  # by the 30 readings there are
    assert_alike(lines(tmp_path / "2"), alone)
