"""``groundswell torchrun`` around an agent that is played: what is started at all, and what an end means."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launch import torchrun_command
from launch.cli import main
from orchestrator.config import to_yaml
from orchestrator.runtime import folder
from tests import support

ROOT = Path(__file__).resolve().parents[2]
Agent = Callable[[list[str]], int]
ENDED = {"kind": "stopped", "reason": "the budget of 0.5 worker-hours is used up", "samples_seen": 640, "time": 1800.0}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Give the command with an agent that does as told."""
    for name in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # the command sets them for good
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(support.config(tmp_path, budget={"worker_hours": 0.5})))

    def given(agent: Agent, *arguments: str) -> Result:
        monkeypatch.setattr(torchrun_command, "_run_agent", agent)
        return CliRunner().invoke(main, ["torchrun", str(file), *arguments])

    return given


def ends(run: Path, **last: Any) -> Agent:
    """An agent whose workers train until ``last``."""

    def agent(_: list[str]) -> int:
        run.mkdir(exist_ok=True)
        (run / folder.CONFIG).touch()
        writer = folder.RunWriter(run)
        started = {"kind": "started", "time": 0.0, "workers_since": 0.0, "world_size": 1, "dataset_size": 256}
        writer.append(folder.EVENTS, started, {**ENDED, **last})
        writer.close()
        return 0

    return agent


def test_a_run_that_its_budget_ended_has_ended_well_and_is_not_begun_again(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    done = call(ends(tmp_path / "run", budget_worker_hours=0.5))
    assert done.exit_code == 0
    assert "--resume goes on" not in done.output

    def agent(_: list[str]) -> int:
        raise AssertionError("no agent is to begin")

    again = call(agent, "--resume")
    assert again.exit_code == 0, again.output
    assert "Nothing was started: the budget of 0.5 worker-hours is used up; to go on with" in again.stdout
    # A larger one pays for more.
    more = call(ends(tmp_path / "run"), "--resume", "--set", "budget.worker_hours=2")
    assert more.exit_code == 130
    assert "Stopped; the same command with --resume goes on" in more.stderr


def test_a_folder_with_a_broken_line_is_refused_without_an_agent(call: Callable[..., Result], tmp_path: Path) -> None:
    assert call(ends(tmp_path / "run")).exit_code == 130
    with (tmp_path / "run" / folder.EVENTS).open("a") as events:
        events.write("torn\n{}\n")
    done = call(lambda _: 0, "--resume")
    assert done.exit_code == 2
    assert "events.jsonl: line 3 is not JSON of a run" in done.stderr


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_what_rank_zero_refuses_no_agent_tries_again(tmp_path: Path) -> None:
    settings = support.config(tmp_path, workers={"initial": 2, "max": 2})
    (tmp_path / "run" / folder.CONFIG).mkdir(parents=True)  # where a file is to be written
    (tmp_path / "run.yaml").write_text(to_yaml(settings))
    command = [sys.executable, "-m", "launch.cli", "torchrun", str(tmp_path / "run.yaml"), "--max-restarts=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("cannot write") == 1
    assert done.stderr.startswith(f"cannot write {tmp_path}/run/config.yaml: ")
    assert "restart" not in done.stderr
