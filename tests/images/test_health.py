"""The health check of the image judges Ray nodes by their agent, and leaves anything else alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "health.sh"


@contextmanager
def process(command: str) -> Iterator[int]:
    """The id of a process that is called like a container's first one, and waits."""
    called = ["tini", "-c", "read -r line", "--", *command.split()]
    started = subprocess.Popen(called, executable="/bin/sh", stdin=subprocess.PIPE)
    yield started.pid
    started.communicate()


def judge(folder: Path, *arguments: str, answer: int) -> tuple[int, str]:
    """The exit code, and what wget was called with, which ends with ``answer``."""
    asked, wget = folder / "asked", folder / "wget"
    wget.write_text(f'#!/bin/sh\necho "$@" > {asked}\nexit {answer}\n')
    wget.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([str(SCRIPT), *arguments], env={**os.environ, "PATH": path}, capture_output=True)
    return done.returncode, asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize("command", ["ray start --head --block", "ray start --address=head:6379 --block"])
@pytest.mark.parametrize(("answer", "code"), [(0, 0), (4, 1), (8, 1)])
def test_a_node_is_as_well_as_its_agent_says(tmp_path: Path, command: str, answer: int, code: int) -> None:
    with process(command) as pid:
        seen, asked = judge(tmp_path, str(pid), answer=answer)
        assert seen == code
        assert asked.split()[-1] == "http://127.0.0.1:52365/api/healthz"
        assert judge(tmp_path, str(pid), "1234", answer=0)[1].split()[-1] == "http://127.0.0.1:1234/api/healthz"


@pytest.mark.parametrize("command", ["groundswell run digits", "ray status"])
def test_what_is_no_node_is_well_while_it_runs(tmp_path: Path, command: str) -> None:
    with process(command) as pid:
        assert judge(tmp_path, str(pid), answer=4) == (0, "")
    assert judge(tmp_path, str(pid), answer=0) == (1, "")


def test_what_has_ended_unnoticed_is_not_well(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # its id stays taken until someone waits for it
    assert judge(tmp_path, str(ended.pid), answer=0) == (1, "")
    ended.wait()
