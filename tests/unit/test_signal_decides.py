"""Promise 10, in whole runs: the measured noise decides, not a timer and not chance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from orchestrator.core.policies import POLICIES, PolicySettings
from orchestrator.core.policy_inputs import Policy
from orchestrator.runtime import folder
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from orchestrator.train import train
from orchestrator.types import NoiseStats, Verdict
from tests.support import config, cross_entropy


def batches(run: Path) -> list[int]:
    return [row["global_batch"] for row in folder.surviving(run / "run" / folder.METRICS)]


def last_batch(run: Path) -> int:
    """Of the last step that was not cut short by the end of the run."""
    return batches(run)[-2]


def same_sample(size: int, flipped: float) -> TensorDataset:
    """``size`` times one input of class 1, a fraction of the labels flipped to class 0."""
    labels = torch.ones(size, dtype=torch.long)
    labels[: round(flipped * size)] = 0
    return TensorDataset(torch.ones(size, 6), labels)


def grow_on(tmp_path: Path, flipped: float) -> int:
    settings = config(
        tmp_path,
        train={"samples": 10000},
        batch={"initial": 4, "micro_batch": 1, "max": 1024},
        optimizer={"lr": 1e-9, "momentum": 0.0},
        lr_rule={"name": "constant"},
        controller={
            "policy": "noise_scale",
            "every_samples": 250,
            "cooldown_samples": 250,
            "half_life_samples": 4000,
            "deadband": 1.2,
        },
    )
    model = nn.Linear(6, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with Session(settings, model=model, optimizer=optimizer, dataset=same_sample(4000, flipped)) as session:
        for step in session:
            for batch in step:
                session.backward(cross_entropy(session.model, batch))
            session.step()
    return last_batch(tmp_path)


def test_identical_samples_grow_nothing_and_label_noise_grows_what_the_closed_form_says(tmp_path: Path) -> None:
    """At weights zero both classes have probability 1/2, so a sample's gradient is (1/2 - y) x and, with a fraction p
    of the labels flipped, tr(Sigma) / |G|^2 = p (1 - p) / (1/2 - p)^2."""
    found = {}
    for flipped in (0.0, 0.1, 0.35, 0.42):
        found[flipped] = grow_on(tmp_path / str(flipped), flipped)
        exact = flipped * (1 - flipped) / (0.5 - flipped) ** 2
        print(f"labels flipped {flipped:.0%}: noise scale {exact:.1f}, the batch went from 4 to {found[flipped]}")
    assert found[0.0] == found[0.1] == 4
    assert 0.5 * 10.1 <= found[0.35] <= 1.5 * 10.1
    assert 0.5 * 38.1 <= found[0.42] <= 1.5 * 38.1


def constant_noise(settings: PolicySettings) -> Policy:
    """``noise_scale`` with the measurement replaced by a constant below the floor."""
    inner = POLICIES["noise_scale"](settings)
    planted = NoiseStats(verdict=Verdict.MEASURED, noise_scale=10.0, low=9.0, high=11.0)
    return lambda inputs: inner(replace(inputs, stats=planted))


def unbounded_noise(settings: PolicySettings) -> Policy:
    """``noise_scale`` with an interval that has no upper end, however high its lower one."""
    inner = POLICIES["noise_scale"](settings)
    planted = NoiseStats(verdict=Verdict.TOO_NOISY, noise_scale=5000.0, low=1000.0)
    return lambda inputs: inner(replace(inputs, stats=planted))


def on_digits(tmp_path: Path, policy: str) -> Any:
    return config(
        tmp_path,
        train={"samples": None, "epochs": 3},
        batch={"initial": 16, "micro_batch": 8, "max": 512},
        controller={"policy": policy, "every_samples": 256, "cooldown_samples": 256},
    )


@pytest.mark.parametrize("planted", ["constant_noise", "unbounded_noise"])
def test_digits_with_its_noise_scale_replaced_ends_with_the_batch_it_began_with(tmp_path: Path, planted: str) -> None:
    settings = on_digits(tmp_path, f"{__name__}:{planted}")
    assert train(settings, local_worker(settings), resume=False)
    assert set(batches(tmp_path)[:-1]) == {16}
    decisions = [row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "decision"]
    assert len(decisions) >= 10
    assert {row["target_batch"] for row in decisions} == {16}
