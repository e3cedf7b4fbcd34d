"""The head of a cluster dies in mid-run: the job ends and says so, and the next attempt goes on on another head."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import to_yaml
from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify
from tests.support import config, free_port

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 2400


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled"}


def processes_of(place: str) -> list[int]:
    """Those of a cluster, by the folder that all of its processes are given."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and place.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def kill(place: str) -> None:
    for pid in processes_of(place):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@contextmanager
def head() -> Iterator[tuple[str, str]]:
    """A cluster of one node of its own: its address, and the folder that its processes are known by."""
    place, port = tempfile.mkdtemp(prefix="gh-", dir="/tmp"), free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={place}", "--include-dashboard=false"]
    command += [f"--min-worker-port={20000 + port % 10000}", f"--max-worker-port={20200 + port % 10000}"]
    with open(f"{place}.log", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment())
        try:
            until(lambda: answers(port), what=lambda: Path(f"{place}.log").read_text())
            yield f"127.0.0.1:{port}", place
        finally:
            process.kill()
            kill(place)
            process.wait()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
    except OSError:
        return False
    return True


def until(there: Callable[[], Any], *, what: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + 200
    while not there():
        assert time.monotonic() < deadline_s, what()
        time.sleep(0.1)


@contextmanager
def running(file: Path, address: str, said: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "launch.cli", "run", str(file), "--auto-resume", "--address", address]
    with said.open("w") as out:
        process = subprocess.Popen(
            [*command, "--head-patience", "5"], stdout=out, stderr=out, env=environment(), cwd=ROOT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_killed_head_ends_the_job_and_the_next_attempt_repeats_only_what_was_not_saved(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    settings = config(
        tmp_path,
        task={
            "name": "tests.ray.tasks:slow",
            "options": {"size": 400, "step_s": 0.01, "pids": str(tmp_path / "pids")},
        },
        train={"samples": SAMPLES},
        batch={"initial": 8, "micro_batch": 4, "max": 32},
        controller={"policy": "schedule", "ramp": [[400, 16], [1800, 32]], "every_samples": 100},
        checkpoint={"every_samples": 200},
        ledger=True,
    )
    file, run, said = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "said"
    file.write_text(to_yaml(settings))

    def saved() -> list[dict[str, Any]]:
        return [row for row in folder.rows(run / folder.EVENTS) if row["kind"] == "checkpoint"]

    with head() as (address, place), running(file, address, said) as job:
        until(lambda: len(saved()) >= 3 or job.poll() is not None, what=said.read_text)
        assert job.poll() is None, said.read_text()
        kill(place)
        killed_s = time.monotonic()
        code = job.wait(120)
        ended_s = time.monotonic() - killed_s
    print(f"the job ended {ended_s:.1f} s after its head")
    assert code == 1, said.read_text()
    assert "the head of the Ray cluster at " in said.read_text()
    assert "--resume" in said.read_text()
    last, reached = saved()[-1], list(folder.rows(run / folder.METRICS))[-1]["samples_seen"]
    assert reached < SAMPLES

    with head() as (address, _), running(file, address, said) as job:
        assert job.wait(250) == 0, said.read_text()
    resumed = [row for row in folder.rows(run / folder.EVENTS) if row["kind"] == "resumed"]
    assert [row["samples_seen"] for row in resumed] == [last["samples_seen"]]
    print(f"went on from {last['samples_seen']} of {reached} samples")
    report = verify(run)
    assert report.violation is None
    assert report.samples == SAMPLES
