"""The language model on real text: its noise scale rises by itself, and the batch follows it.

Run with -s to see the figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.bundled import find_config
from orchestrator.config import RunConfig, load_config
from orchestrator.runtime import folder
from orchestrator.runtime.worker import local_worker
from orchestrator.train import train

SAMPLES = 9000


def settings(tmp_path: Path, seed: int, **controller: Any) -> RunConfig:
    overrides = {
        "run.dir": str(tmp_path),
        "run.seed": seed,
        "train.samples": SAMPLES,
        "batch.initial": 32,
        "batch.micro_batch": 8,
        "schedule.name": "constant",
        "schedule.final_fraction": "null",
        "evaluation.every_samples": 1500,
        "checkpoint.every_samples": "null",
        "workers.max": 1,
        "controller.every_samples": 256,
        "controller.half_life_samples": 1024,
    } | {f"controller.{key}": value for key, value in controller.items()}
    return load_config(find_config("char_lm"), [f"{key}={value}" for key, value in overrides.items()])


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    assert train(config, local_worker(config), resume=False)
    return folder.surviving(Path(config.run.dir) / config.run.name / folder.METRICS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_at_a_fixed_batch_the_last_quarters_lower_bound_is_above_the_first_quarters_upper(
    tmp_path: Path, seed: int
) -> None:
    rows = rows_of(settings(tmp_path, seed, mode="advise"))
    assert {row["global_batch"] for row in rows[:-1]} == {32}  # so no ratchet can explain the rise
    bounded = [row for row in rows if row["verdict"] == "measured"]
    first = [row["noise_high"] for row in bounded if row["samples_seen"] <= SAMPLES / 4]
    last = [row["noise_low"] for row in bounded if row["samples_seen"] > SAMPLES * 3 / 4]
    assert len(first) > 10
    assert len(last) > 10
    highest, lowest = sorted(first)[len(first) // 2], sorted(last)[len(last) // 2]
    print(
        f"\nseed {seed}: first quarter's upper bound {highest:.1f}, last quarter's lower bound {lowest:.1f} (medians)"
    )
    print(f"  worst case: {max(first):.1f} and {min(last):.1f}")
    assert lowest > highest


def test_the_batch_follows_the_noise_scale_and_the_held_out_loss_falls(tmp_path: Path) -> None:
    config = load_config(
        find_config("char_lm"),
        [
            f"run.dir={tmp_path}", "run.name=growing", f"train.samples={SAMPLES}", "batch.initial=8",
            "batch.micro_batch=4", "workers.max=1", "evaluation.every_samples=1500", "schedule.warmup_samples=512",
            "controller.every_samples=256", "controller.half_life_samples=1024", "controller.cooldown_samples=1024",
        ],
    )  # fmt: skip
    rows = rows_of(config)
    batches = [row["global_batch"] for row in rows[:-1]]
    losses = [row["loss"] for row in folder.surviving(tmp_path / "growing" / folder.EVALS)]
    print(f"\nbatch {batches[0]} to {max(batches)}; held-out loss {', '.join(f'{loss:.3f}' for loss in losses)}")
    assert max(batches) >= 2 * batches[0]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 2.6
