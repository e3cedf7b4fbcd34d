"""Starts torchrun on this machine for ``groundswell run``, and again after a failure that may pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.jobs import WorkersError
from orchestrator.config import RunConfig, to_yaml
from orchestrator.errors import SessionError
from orchestrator.runtime import folder
from orchestrator.runtime.preparation import run_folder

OURS, OTHERS = "refused: ", "| "  # whose error a failing worker prints
_SAID = re.compile(rf"rank (\d+) ({re.escape(OTHERS)}|{OURS})(.*)")
_END_PATIENCE_S = 15.0


def said_line(rank: int, whose: str, line: str) -> str:
    """How a failing worker prints each line of its error."""
    return f"rank {rank} {whose}{line}"


def spawn(
    config: RunConfig,
    *,
    resume: bool,
    on_start: Callable[[Callable[[], None]], None],
    tell: Callable[[str], None],
) -> None:
    """Run ``workers.initial`` processes of this entry on this machine, and again after a failure that may pass.

    ``on_start`` is given a function that ends them. Raises ``SessionError`` with what a worker refused, and
    ``WorkersError`` when they failed before their first step, or more often than ``recovery.max_failures``.
    """
    path = run_folder(config)
    process: subprocess.Popen[Any] | None = None
    ending = False

    def started(new: subprocess.Popen[Any]) -> None:
        nonlocal process
        process = new
        if ending:
            _end(new, path)

    def kill() -> None:
        nonlocal ending
        ending = True
        if process is not None:
            _end(process, path)

    on_start(kill)
    reached = _reached(path)
    for failures in range(config.recovery.max_failures + 1):
        try:
            return _spawn_once(config, resume=resume or failures > 0, started=started)
        except WorkersError as error:
            before, reached = reached, _reached(path)
            # What fails before its first step, or twice at one place, would fail there again.
            if ending or failures == config.recovery.max_failures or reached == before:
                raise
            tell(f"a worker failed ({str(error).splitlines()[-1]}); beginning again from the last checkpoint, if any")


def _spawn_once(config: RunConfig, *, resume: bool, started: Callable[[subprocess.Popen[Any]], None]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={config.workers.initial}", "-m", "launch.torchrun", f"--for-process={os.getpid()}"]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+", errors="replace") as said:
        path = Path(scratch) / f"{config.run.name}.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        command += [*(["--resume"] if resume else []), "--", str(path)]
        # A session of its own: Ctrl-C is for the parent, which lets the workers finish their step.
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        started(process)
        code = process.wait()
        if code != 0:
            said.seek(0)
            raise _failure(said.read(), code)


def _end(process: subprocess.Popen[Any], path: Path) -> None:
    """End torchrun and its workers now; they live in sessions of their own, and only torchrun knows them all."""
    with suppress(OSError):
        (path / folder.STOP_REQUEST).touch()
        os.utime(path / folder.STOP_REQUEST, (0, 0))  # long asked for: the next notice ends the workers
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_PATIENCE_S)


def _failure(said: str, code: int) -> Exception:
    """What the first worker to fail said, or what ended it."""
    lines = [m for m in map(_SAID.match, said.splitlines()) if m]
    ours = [line for line in lines if line[2] == OURS]
    spoken = ours or lines
    text = "\n".join(line[3] for line in spoken if line[1] == spoken[0][1])
    if ours:
        return SessionError(text)
    # Before what the others say, for they only lost a peer. SIGTERM is what torchrun itself ends those with.
    killed = re.search(r"Signal \d+ \((?!SIGTERM)(\w+)\) received", said)
    if killed:
        return WorkersError(f"ended from outside with {killed[1]}; where that is SIGKILL, memory may have run out")
    if lines:
        return WorkersError(text)
    rest = "\n".join([line for line in said.splitlines() if line.strip()][-15:])
    return WorkersError(f"{rest}\ntorchrun ended with exit code {code}")


def _reached(path: Path) -> int | None:
    """The samples seen at the last step that the run's folder knows of."""
    last = deque(folder.rows(path / folder.METRICS), maxlen=1)
    return int(last[0]["samples_seen"]) if last else None
