"""A run with a budget ends within it, as counted from outside, in order, and is not begun again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.config import to_yaml
from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify
from tests import support
from tests.worker_time import WorkerTime

ROOT = Path(__file__).resolve().parents[2]


def call(file: Path, run: Path, *, watch: WorkerTime | None = None, limit_s: float | None = None) -> str:
    """``groundswell run`` under torchrun, which must end with exit code 0; what it said."""
    command = [sys.executable, "-m", "launch.cli", "run", str(file), "--runtime", "torchrun", "--auto-resume"]
    command += ["--set", f"run.name={run.name}"]
    command += ["--set", "train.samples=64"] if limit_s is None else ["--set", f"budget.worker_hours={limit_s / 3600}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (run.parent / "said").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT, env=environment)
        until_s = time.monotonic() + 250
        while process.poll() is None and time.monotonic() < until_s:
            if watch is not None:
                watch.look()
            time.sleep(0.05)
        process.kill()
    text = (run.parent / "said").read_text()
    assert process.returncode == 0, text
    return text


def test_a_run_ends_within_its_budget_and_a_job_runner_does_not_repeat_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    settings = support.config(
        tmp_path,
        task={"name": "tests.ray.tasks:slow", "options": {"step_s": 0.02, "pids": str(pids)}},
        train={"samples": 10_000_000},
        workers={"initial": 2, "max": 2},
        ledger=True,
    )
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(to_yaml(settings))
    began_s = time.monotonic()
    call(file, tmp_path / "trial")
    # Twice what this machine takes at the moment to begin and to end, and some time to train and to keep.
    limit_s = 2 * (2 * (time.monotonic() - began_s) + 20)
    paid = WorkerTime(pids)
    text = call(file, run, watch=paid, limit_s=limit_s)
    print(f"{paid.total_s:.1f} of {limit_s:.1f} worker-seconds")
    assert paid.workers == 2
    assert paid.total_s <= limit_s
    events = list(folder.rows(run / folder.EVENTS))
    assert events[-1]["kind"] == "stopped"
    assert "the budget of" in events[-1]["reason"]
    assert events[-2]["kind"] == "budget"
    assert [row["kind"] for row in events if row["kind"] in ("checkpoint", "fault")] == ["checkpoint"]
    assert verify(run).violation is None
    assert "Ended at " in text
    assert f"Used:      {events[-2]['reason']}." in text
    assert "does not suffice" in text
    # What was said to be used is what was used, and a little that is kept for the end.
    assert abs(events[-2]["used_worker_hours"] * 3600 - paid.total_s) <= 5 * 2 + 0.1 * paid.total_s

    again = call(file, run, limit_s=limit_s)
    assert "Nothing was started: the budget of" in again
    assert list(folder.rows(run / folder.EVENTS)) == events
