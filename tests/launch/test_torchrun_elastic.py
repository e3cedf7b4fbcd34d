"""Real agents on this machine: one joins late and becomes rank zero, one is given notice, one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import RunConfig, to_yaml
from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify
from orchestrator.runtime.worker import local_worker
from orchestrator.train import train
from tests import support

ROOT = Path(__file__).resolve().parents[2]
RAMP = [[256, 64], [768, 96], [1280, 48]]
QUICK = ["last_call_timeout=1", "keep_alive_interval=1", "keep_alive_max_attempt=3", "read_timeout=20"]
pytestmark = [pytest.mark.timeout(300), pytest.mark.dist]


def config(place: Path, **options: Any) -> RunConfig:
    return support.config(
        place,
        task={"name": "tests.launch.small_task:make", "options": options},
        train={"samples": 19200},
        batch={"max": 96, "min": 16},
        controller={"policy": "schedule", "every_samples": 128, "ramp": RAMP, "shrink": True},
        checkpoint={"every_samples": 128},
        recovery={"max_failures": 2},
        ledger=True,
    )


class Agents:
    """Starts ``groundswell torchrun`` for one rendezvous, and leaves nothing behind."""

    def __init__(self, place: Path, settings: RunConfig) -> None:
        self._place = place
        self._file = place / "given.yaml"
        self._file.write_text(to_yaml(settings))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        self._started: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, address: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "launch.cli", "torchrun", str(self._file), "--nnodes", "1:2"]
        command += ["--nproc-per-node", "1", "--rdzv-endpoint", self._endpoint, "--rdzv-id", "one-launch"]
        command += ["--local-addr", address, *(part for setting in QUICK for part in ("--rdzv-conf", setting))]
        with (self._place / f"{name}.log").open("w") as log:
            self._started[name] = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=log, stderr=log, text=True)
        return self._started[name]

    def said(self, name: str) -> str:
        return (self._place / f"{name}.log").read_text()

    def workers(self, agent: subprocess.Popen[str]) -> list[int]:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return [int(line.split()[0]) for line in listed.splitlines() if int(line.split()[1]) == agent.pid]

    def kill(self, agent: subprocess.Popen[str]) -> None:
        workers = self.workers(agent)
        for process in (agent.pid, *workers):
            os.kill(process, signal.SIGKILL)
        agent.wait()
        until(lambda: not any(runs(worker) for worker in workers), lambda: f"of {workers} some live on")

    def end(self) -> None:
        for agent in self._started.values():
            if agent.poll() is None:
                self.kill(agent)


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    (tmp_path / "slow").touch()
    started = Agents(tmp_path, config(tmp_path, sleep_s=0.05, sleep_while=str(tmp_path / "slow")))
    yield started
    started.end()


def events(place: Path, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(place / "run" / folder.EVENTS) if row["kind"] in kinds]


def runs(process: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return listed.stdout.strip()[:1] not in ("", "Z")


def newest_checkpoint(place: Path) -> dict[str, Any]:
    newest = max((place / "run" / "checkpoints").glob("step-*"), key=lambda path: path.name)
    read: dict[str, Any] = json.loads((newest / "meta.json").read_text())
    return read


def until(there: Callable[[], object], said: Callable[[], str], *, patience_s: float = 90.0) -> None:
    end_s = time.monotonic() + patience_s
    while not there():
        assert time.monotonic() < end_s, said()
        time.sleep(0.05)


def groups(place: Path) -> list[dict[str, Any]]:
    return events(place, "started", "resumed")


def test_agents_that_join_leave_and_die_change_the_layout_and_nothing_else(agents: Agents, tmp_path: Path) -> None:
    def trains(attempt: int, workers: int, *names: str) -> dict[str, Any]:
        def there() -> bool:
            begun = groups(tmp_path)
            steps = [row for row in folder.rows(tmp_path / "run" / folder.METRICS) if row["attempt"] == attempt]
            return len(begun) == attempt and begun[-1]["world_size"] == workers and len(steps) > 2

        until(there, lambda: "\n".join(f"-- {name}\n{agents.said(name)}" for name in names))
        return groups(tmp_path)[-1]

    # The lowest address is rank zero, so that it moves with every one that joins.
    first = agents.start("first", "127.0.0.3")
    trains(1, 1, "first")
    late = agents.start("late", "127.0.0.2")
    joined = trains(2, 2, "first", "late")
    assert joined["samples_seen"] == events(tmp_path, "stopped")[-1]["samples_seen"], "a join loses no step"
    assert "resumed at" in agents.said("late"), "rank zero has moved"

    late.terminate()
    left = trains(3, 1, "first", "late")
    assert left["samples_seen"] == events(tmp_path, "stopped")[-1]["samples_seen"], "notice loses no step"
    assert late.wait(30) == 130
    assert "Traceback" not in agents.said("late")

    other = agents.start("other", "127.0.0.1")
    trains(4, 2, "first", "other")
    agents.kill(other)
    # The checkpoint, and not the event that tells of it: rank zero may die between the two.
    saved = newest_checkpoint(tmp_path)
    died = trains(5, 1, "first", "other")
    assert died["samples_seen"] == saved["samples_seen"]

    (tmp_path / "slow").unlink()
    assert first.wait(90) == 0, agents.said("first")
    assert verify(tmp_path / "run").text.startswith("exactly once: 19200 positions")
    alone = tmp_path / "alone"
    settings = config(alone)
    assert train(settings, local_worker(settings), resume=False)
    steps, expected = (folder.surviving(place / "run" / folder.METRICS) for place in (tmp_path, alone))
    assert [(s["samples_seen"], s["global_batch"]) for s in steps] == [
        (s["samples_seen"], s["global_batch"]) for s in expected
    ]
    assert {s["global_batch"] for s in steps} >= {32, 64, 96, 48}
    assert {s["world_size"] for s in steps} == {1, 2}
