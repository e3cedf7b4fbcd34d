"""Every runtime decides alike: Ray, with and without a late controller, and torchrun, on two fixed workers each."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.config import to_yaml
from orchestrator.runtime import folder
from orchestrator.runtime.replay import recomputed, recorded
from tests.support import config

ROOT = Path(__file__).resolve().parents[2]


def settings(folder_of_runs: Path, name: str, **train: Any) -> Any:
    return config(
        folder_of_runs,
        run={"name": name, "seed": 3},
        task={"name": "digits"},
        train=train or {"samples": 14000},
        batch={"initial": 16, "micro_batch": 8, "max": 256},
        optimizer={"lr": 0.02},
        controller={
            "policy": "noise_scale",
            "every_samples": 500,
            "cooldown_samples": 500,
            "half_life_samples": 3000,
            "deadband": 1.1,
            "max_growth": 1.5,
            "lag_steps": 3,
        },
        workers={"initial": 2, "min": 2, "max": 2},
    )


def under_ray(chosen: Any, **options: Any) -> None:
    from orchestrator.ray_train.trainer import AdaptiveTrainer

    AdaptiveTrainer(chosen, **options).fit()


def under_torchrun(chosen: Any, scratch: Path) -> None:
    path = scratch / f"{chosen.run.name}.yaml"
    path.write_text(to_yaml(chosen))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "launch.torchrun", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_ray_and_torchrun_write_the_same_decisions_and_the_folder_gives_them_again(
    cluster: None, tmp_path: Path
) -> None:
    under_torchrun(settings(tmp_path, "torchrun"), tmp_path)
    under_ray(settings(tmp_path, "ray"))
    under_ray(settings(tmp_path, "late"), answer_delay_s=0.3)
    found = {name: recorded(tmp_path / name) for name in ("torchrun", "ray", "late")}
    targets = [decided.target_batch for decided in found["torchrun"]]
    changes = sum(a != b for a, b in pairwise(targets))
    print(f"{len(targets)} decisions, {changes} changes, batch {targets[0]} to {targets[-1]}")
    assert changes >= 3
    assert found["ray"] == found["torchrun"]
    assert found["late"] == found["torchrun"]
    for name, decided in found.items():
        again = recomputed(tmp_path / name)
        assert again[: len(decided)] == decided, name
        assert len(again) - len(decided) == 0, name


def steps_s(run: Path) -> np.ndarray:
    rows = folder.surviving(run / folder.METRICS)
    # The first steps warm up; the last may be cut short.
    return np.array([row["step_time_s"] for row in rows[20:-1]])


@pytest.mark.ray
@pytest.mark.benchmark
@pytest.mark.timeout(290)
def test_a_step_under_ray_takes_no_longer_than_under_torchrun(cluster: None, tmp_path: Path) -> None:
    pairs = []
    for turn in range(2):
        under_torchrun(settings(tmp_path, f"torchrun-{turn}", samples=10000), tmp_path)
        under_ray(settings(tmp_path, f"ray-{turn}", samples=10000))
        pairs.append((steps_s(tmp_path / f"ray-{turn}"), steps_s(tmp_path / f"torchrun-{turn}")))
    # The same steps in the same order with the same batches: paired by step.
    ratios = np.concatenate([ray / torchrun for ray, torchrun in pairs])
    draws = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    print(f"\nstep time, Ray over torchrun: median {np.median(ratios):.3f}, 95 % interval [{low:.3f}, {high:.3f}]")
    assert low <= 1.05
