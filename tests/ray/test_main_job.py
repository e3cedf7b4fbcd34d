"""The README's first command: the digits run under Ray Train, as a newcomer starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.config import load_config
from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify

ROOT = Path(__file__).resolve().parents[2]
METRICS = [
    "step",
    "samples_seen",
    "epoch",
    "loss",
    "lr",
    "global_batch",
    "micro_batch",
    "accum_steps",
    "world_size",
    "grad_sq",
    "trace_cov",
    "noise_scale",
    "noise_low",
    "noise_high",
    "verdict",
    "step_time_s",
    "samples_per_s",
    "attempt",
]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_main_job_grows_its_batch_and_its_workers_and_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "run", "digits", "--run-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=390)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = tmp_path / "digits"
    rows = folder.surviving(run / folder.METRICS)
    events = list(folder.rows(run / folder.EVENTS))
    evaluations = folder.surviving(run / folder.EVALS)
    batches = [row["global_batch"] for row in rows[:-1]]
    grown = max(batches) / batches[0]
    took_s = events[-1]["time"] - events[0]["time"]
    accuracy = evaluations[-1]["accuracy"]
    print(f"\n{took_s:.0f} s, batch {batches[0]} to {max(batches)} ({grown:g} times), accuracy {accuracy:.4f}")
    assert grown >= 8
    assert accuracy >= 0.97

    # One growth by accumulation alone: the batch changed within an attempt and the workers did not.
    accumulated = [
        (before, after)
        for before, after in pairwise(rows)
        if after["global_batch"] > before["global_batch"]
        and after["world_size"] == before["world_size"]
        and after["attempt"] == before["attempt"]
        and after["accum_steps"] > before["accum_steps"]
    ]
    assert accumulated
    resizes = [event for event in events if event["kind"] == "resize"]
    assert resizes
    assert resizes[0]["to_workers"] > resizes[0]["from_workers"]
    assert resizes[0]["cost_s"] > 0
    assert {row["world_size"] for row in rows} == {1, 2}

    assert {name.name for name in run.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "evals.jsonl", "events.jsonl", "tensorboard", "checkpoints",
    }  # fmt: skip
    assert set(rows[0]) == set(METRICS)
    assert load_config(run / "config.yaml").run.name == "digits"
    assert all("reason" in event and "time" in event for event in events)
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["noise_low"] is None
    assert verify(run).violation is None
