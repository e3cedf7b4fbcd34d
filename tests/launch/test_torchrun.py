"""The torchrun entry, under a real torchrun: the same decisions, recovery, notice, and errors one can read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import launch.torchrun
from launch.jobs import WorkersError
from launch.launched import write_note
from launch.run_command import run
from launch.spawn import _failure, said_line
from orchestrator.config import RunConfig, to_yaml
from orchestrator.errors import RunFolderError, SessionError
from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify
from orchestrator.runtime.preparation import prepare
from orchestrator.runtime.worker import local_worker
from orchestrator.train import train
from tests import support

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(120)
TASK = "tests.launch.small_task:make"


def config(place: Path, **sections: Any) -> RunConfig:
    options = sections.pop("options", {})
    base: dict[str, Any] = {"workers": {"initial": 2, "max": 2}, "ledger": True}
    return support.config(place, task={"name": TASK, "options": options}, **{**base, **sections})


def torchrun(settings: RunConfig, place: Path, *arguments: str) -> subprocess.Popen[str]:
    file = place / "given.yaml"
    file.write_text(to_yaml(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    command += ["-m", "launch.torchrun", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)


def events(place: Path, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(place / "run" / folder.EVENTS) if row["kind"] in kinds]


def until(there: Callable[[], object], *, patience_s: float = 60.0) -> None:
    end_s = time.monotonic() + patience_s
    while not there():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.05)


def children(parent: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(pid) for pid, ppid, args in rows if int(ppid) == parent and "launch.torchrun" in args]


@pytest.mark.dist
def test_torchrun_takes_the_decisions_of_one_process(tmp_path: Path) -> None:
    ramp = [[256, 64], [768, 96], [1280, 48]]
    decided = []
    for name in ("torchrun", "local"):
        place = tmp_path / name
        place.mkdir()
        settings = config(
            place,
            train={"samples": 2048},
            batch={"max": 96, "min": 16},
            controller={"policy": "schedule", "every_samples": 128, "ramp": ramp, "shrink": True},
            evaluation={"every_samples": 1024},
        )
        if name == "local":
            assert train(settings, local_worker(settings), resume=False)
        else:
            with torchrun(settings, tmp_path) as process:
                said, _ = process.communicate(timeout=90)
            assert process.returncode == 0, said
        decided.append([(e["samples_seen"], e["target_batch"], e["reason"]) for e in events(place, "decision")])
        steps = folder.surviving(place / "run" / folder.METRICS)
        assert steps[0]["world_size"] == (2 if name == "torchrun" else 1)
        assert verify(place / "run").text.startswith("exactly once: 2048 positions")
    assert len({target for _, target, _ in decided[0]}) >= 4
    assert decided[0] == decided[1]
    lines = said.splitlines()
    assert "started: 2,048 samples, 8 epochs of 256; batch 32 on 2 workers (cpu)" in lines
    assert sum(line.startswith("batch ") for line in lines) == 3
    assert any(line.startswith("Finished in ") for line in lines)


@pytest.mark.dist
def test_a_killed_worker_costs_nothing_and_notice_is_heeded(tmp_path: Path) -> None:
    settings = config(
        tmp_path, train={"samples": 640000}, checkpoint={"every_samples": 128}, options={"sleep_s": 0.002}
    )
    with torchrun(settings, tmp_path, "--max-restarts=1") as agent:
        try:
            until(lambda: events(tmp_path, "checkpoint"))
            os.kill(children(agent.pid)[1], signal.SIGKILL)
            until(lambda: events(tmp_path, "resumed"))
            resumed = events(tmp_path, "resumed")[0]["samples_seen"]
            assert resumed > 0
            assert resumed % 128 == 0
            until(lambda: events(tmp_path, "checkpoint")[-1]["samples_seen"] > resumed)
        finally:
            agent.terminate()
        said, _ = agent.communicate(timeout=60)
    last = events(tmp_path, "checkpoint", "stopped")[-2:]
    assert [event["kind"] for event in last] == ["checkpoint", "stopped"]
    assert last[0]["samples_seen"] == last[1]["samples_seen"]
    assert "the same command with --resume goes on" in said
    report = verify(tmp_path / "run")
    assert report.violation is None
    assert report.samples == last[1]["samples_seen"]


@pytest.mark.dist
def test_groundswell_run_recovers_and_at_the_second_ctrl_c_leaves_no_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(
        tmp_path, train={"samples": 640000}, checkpoint={"every_samples": 128}, options={"sleep_s": 0.002}
    )
    seen: list[int] = []

    def agents() -> list[int]:
        return children(os.getpid())

    def disturb() -> None:
        until(lambda: events(tmp_path, "checkpoint"))
        seen.extend([*agents(), *children(agents()[0])])
        os.kill(seen[-1], signal.SIGKILL)
        until(lambda: events(tmp_path, "resumed"))
        seen.extend([*agents(), *children(agents()[0])])
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # another one, for two alike may be delivered as one

    thread = threading.Thread(target=disturb)
    thread.start()
    code = run(settings, runtime="torchrun", resume=False, address="local", command="groundswell run mine")
    thread.join()
    said = capsys.readouterr()
    assert code == 130
    assert "a worker failed (ended from outside with SIGKILL;" in said.out
    assert "going on" not in said.err
    assert "Stopped at once." in said.err
    assert len(set(seen)) == 6
    until(lambda: not any(alive(process) for process in seen), patience_s=5.0)
    assert verify(tmp_path / "run").violation is None


def alive(process: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return listed.stdout.strip() not in ("", "Z", "Zs", "Zsl", "Zl")


@pytest.mark.dist
def test_a_bug_is_shown_once_and_not_tried_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path, options={"bug_at": 1}, workers={"initial": 1, "max": 1})
    assert run(settings, runtime="torchrun", resume=False, address="local", command="groundswell run mine") == 1
    said = capsys.readouterr()
    assert said.err.count("Traceback (most recent call last)") == 1
    assert "small_task.py" in said.err
    assert """The run failed: KeyError: "a bug in the user's task\"""" in said.err
    assert len(events(tmp_path, "started", "resumed")) == 1


def _lines(rank: int, whose: str, text: str) -> str:
    return "".join(said_line(rank, whose, line) + "\n" for line in text.splitlines())


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (_lines(0, "| ", "lost") + _lines(1, "refused: ", "bad\ntask") + "noise", SessionError, "bad\ntask"),
        (_lines(1, "| ", "Traceback\nKeyError") + _lines(0, "| ", "lost"), WorkersError, "Traceback\nKeyError"),
        (
            _lines(0, "| ", "lost") + "Signal 15 (SIGTERM) received by PID 1\nSignal 9 (SIGKILL) received by PID 2",
            WorkersError,
            "ended from outside with SIGKILL; where that is SIGKILL, memory may have run out",
        ),
        ("\n".join(map(str, range(40))), WorkersError, "\n".join([*map(str, range(25, 40)), "torchrun ended with 1"])),
    ],
)
def test_of_all_that_workers_say_the_cause_is_told(said: str, kind: type[Exception], told: str) -> None:
    error = _failure(said, 1)
    assert type(error) is kind
    assert str(error).replace("exit code ", "") == told


@pytest.mark.parametrize("entry", ["torchrun", "run"])
def test_who_goes_on_with_a_run_that_is_written_leaves_it_as_it_is(
    tmp_path: Path, entry: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_lock = folder.take_lock
    monkeypatch.setattr(folder, "take_lock", lambda path, *, patience_s: take_lock(path, patience_s=patience_s / 1000))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another-launch")
    settings = config(tmp_path)
    path = prepare(settings, resume=False)
    group = write_note(path, launch="this-launch")
    writer = folder.RunWriter(path)
    writer.append(folder.EVENTS, {"kind": "started"})
    (path / folder.STOP_REQUEST).touch()
    before = (path / folder.CONFIG).read_bytes()
    other = config(tmp_path, batch={"max": 48})

    def go_on() -> None:
        if entry == "torchrun":
            launch.torchrun._prepare(other, path, resume=True, auto_resume=False, patient=True)
        else:
            train(other, local_worker(other), resume=True)

    with pytest.raises(RunFolderError, match="is being written by another process"):
        go_on()
    assert group.is_current(path)
    assert (path / folder.CONFIG).read_bytes() == before
    assert (path / folder.STOP_REQUEST).exists()
    assert ("waiting up to 120 s" in capsys.readouterr().out) == (entry == "torchrun")
    writer.close()
    assert launch.torchrun._prepare(other, path, resume=True, auto_resume=False, patient=True).number == 2
    assert not group.is_current(path)
    assert b"max: 48" in (path / folder.CONFIG).read_bytes()


def test_without_torchrun_the_entry_says_how_it_is_started() -> None:
    env = {key: value for key, value in os.environ.items() if key != "RANK"}
    command = [sys.executable, "-m", "launch.torchrun", "digits"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torchrun --nproc-per-node=2 -m launch.torchrun CONFIG" in done.stderr
    assert "Traceback" not in done.stderr
