"""``groundswell run --runtime local`` as its user meets it: what is printed, how it ends, how it goes on."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from launch.cli import main
from launch.ledger_command import ledger_group
from launch.run_command import run
from orchestrator.config import RunConfig
from orchestrator.errors import RunFolderError
from orchestrator.runtime import folder
from orchestrator.runtime.control_requests import write_request
from tests import support

ROOT = Path(__file__).resolve().parents[2]
TASK = "tests.launch.small_task:make"


def config(place: Path, **sections: Any) -> RunConfig:
    options = sections.pop("options", {})
    return support.config(place, task={"name": TASK, "options": options}, ledger=True, **sections)


def start(settings: RunConfig, *, resume: bool = False) -> int:
    return run(settings, runtime="local", resume=resume, address="local", command="groundswell run mine")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def events(place: Path) -> list[dict[str, Any]]:
    return list(folder.rows(place / "run" / folder.EVENTS))


def test_a_run_in_the_home_folder_lies_there_for_all_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = config(tmp_path, run={"dir": "~/runs"})
    assert start(settings) == 0
    assert folder.exists(home / "runs" / "run")
    assert start(settings, resume=True) == 0, "what is finished there is found there"
    assert list(Path.cwd().iterdir()) == []
    ended = call("control", "run", "hold", "--run-dir", "~/runs").stderr
    assert f"{home}/runs/run is not running: it has finished" in ended


def when(there: Callable[[], bool], do: Callable[[], None]) -> threading.Thread:
    """Do something, in a thread, as soon as a condition holds."""

    def wait() -> None:
        until_s = time.monotonic() + 60
        while not there() and time.monotonic() < until_s:
            time.sleep(0.02)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def has_steps(place: Path, count: int = 3) -> Callable[[], bool]:
    metrics = place / "run" / folder.METRICS
    return lambda: metrics.exists() and metrics.read_text().count("\n") >= count


def test_a_run_says_what_it_did_and_where_to_look(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = start(
        config(
            tmp_path,
            train={"samples": 2560},
            batch={"max": 64},
            controller={"policy": "schedule", "every_samples": 128, "ramp": [[256, 64]]},
            evaluation={"every_samples": 1280},
        )
    )
    said = capfd.readouterr()
    assert code == 0
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0] == f"run: task {TASK}, runtime local, folder {tmp_path / 'run'}"
    assert lines[1] == "started: 2,560 samples, 10 epochs of 256; batch 32 on 1 worker (cpu)"
    assert "batch 32 -> 64 at 256 samples: the ramp says 64 from 256 samples on" in lines
    assert sum(line.startswith("held out at ") for line in lines) == 2
    assert not any("keep" in line for line in lines)
    ending = "\n".join(lines[-5:])
    assert "2,560 samples in 46 steps, batch 32 to 64, 1 worker." in ending
    assert "Held out: loss " in ending
    assert f"groundswell plot {tmp_path / 'run'}" in ending
    assert f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}" in ending


def test_a_finished_run_is_not_run_again_but_may_be_made_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(config(tmp_path)) == 0
    before = events(tmp_path)
    capsys.readouterr()
    assert start(config(tmp_path), resume=True) == 0
    assert "is finished; for a longer run raise train.samples or train.epochs." in capsys.readouterr().out
    assert events(tmp_path) == before
    assert start(config(tmp_path, train={"samples": 1280}), resume=True) == 0
    assert events(tmp_path)[-1]["samples_seen"] == 1280
    assert CliRunner().invoke(ledger_group, ["verify", str(tmp_path / "run")]).exit_code == 0


def test_auto_resume_waits_for_those_who_still_write_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert start(settings) == 0
    run_folder = tmp_path / "run"
    left_over = folder.RunWriter(run_folder)
    began_s = time.monotonic()
    threading.Timer(1.5, left_over.close).start()
    done = call("run", str(file), "--runtime", "local", "--auto-resume", "--set", "train.samples=1280")
    assert done.exit_code == 0, done.output
    assert time.monotonic() - began_s > 1.5
    assert f"{run_folder} is still being written" in done.output
    assert events(tmp_path)[-1]["samples_seen"] == 1280
    assert not folder.is_written(run_folder)


def test_a_second_command_is_refused_at_once_also_while_nobody_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(config(tmp_path)) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    with folder.launching(tmp_path / "run"), pytest.raises(RunFolderError, match="being written by another process"):
        start(config(tmp_path, train={"samples": 1280}), resume=True)
    assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()} == before
    assert "task tests.launch" not in capsys.readouterr().out.split("Decisions")[-1]


def test_auto_resume_begins_and_goes_on_by_one_command(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config(tmp_path).model_dump(mode="json")))
    command = ("run", str(file), "--runtime", "local", "--auto-resume")
    assert call(*command).exit_code == 0
    assert call(*command, "--set", "train.samples=1280").exit_code == 0
    kinds = [event["kind"] for event in events(tmp_path) if event["kind"] in ("started", "resumed", "finished")]
    assert kinds == ["started", "finished", "resumed", "finished"]
    assert "is finished" in call(*command, "--set", "train.samples=1280").stdout


def test_ctrl_c_saves_and_prints_the_command_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "it's here $HOME"
    file = tmp_path / "run.yaml"
    settings = config(place, options={"sleep_s": 0.02})
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude={"run"})))
    arguments = ["run", str(file), "--set", "task.options={sleep_s: 0.02}", "--runtime", "local"]
    arguments += ["--run-dir", str(place)]
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda code: left.append(code))  # else it would end the tests as well
    thread = when(has_steps(place), lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = call(*arguments)
    thread.join()
    assert left == [130]
    assert "stopping after this step" in stopped.stdout
    last = events(place)[-2:]
    assert [event["kind"] for event in last] == ["checkpoint", "stopped"]
    assert 0 < last[0]["samples_seen"] == last[1]["samples_seen"] < 640
    assert f"Stopped at {last[1]['samples_seen']} samples" in stopped.stderr
    assert not (place / "run" / folder.STOP_REQUEST).exists()

    command = shlex.split(stopped.stderr.splitlines()[-1])
    assert command == ["groundswell", *arguments, "--resume"]
    went_on = call(*command[1:])
    assert went_on.exit_code == 0
    assert f"resumed at {last[1]['samples_seen']} samples of 640" in went_on.stdout
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    verified = call("ledger", "verify", str(place / "run"))
    assert verified.output == "exactly once: 640 positions in 20 steps, none missing, none twice\n"


def test_ctrl_c_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config(tmp_path).model_dump(mode="json")))
    command = [sys.executable, "-m", "launch.cli", "run", str(file), "--runtime", "local"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("run: task")
        time.sleep(0.2)  # torch takes seconds to load
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=3)
    assert process.returncode == 130
    again = f"groundswell run {file} --runtime local"
    assert err == f"Stopped before the first step.\nNothing was saved yet; to begin again:\n  {again}\n"
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(tmp_path: Path) -> None:
    settings = config(
        tmp_path, train={"samples": 64000}, data={"loader_workers": 2}, options={"sleep_s": 20.0, "sleep_from": 30}
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "launch.cli", "run", str(file), "--runtime", "local"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        when(has_steps(tmp_path), lambda: None).join()
        time.sleep(0.5)
        # To the whole group, as a terminal does: the loader processes must not die of it either.
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1.0)
        assert process.poll() is None
        assert group(process.pid) > 1
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "stopping after this step" in out
    assert "Stopped at once." in err
    assert "Traceback" not in out + err
    until_s = time.monotonic() + 5
    while group(process.pid) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert group(process.pid) == 0


def group(leader: int) -> int:
    """How many living processes are in the process group of ``leader``."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return sum(int(line.split()[0]) == leader and "Z" not in line.split()[1] for line in listed.splitlines())


def test_a_task_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    settings = support.config(tmp_path, task={"name": "tests.launch.small_task:mak"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    result = call("run", str(tmp_path / "run.yaml"), "--runtime", "local")
    assert result.exit_code == 2
    assert "has no mak" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_bug_in_the_task_is_shown_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path, checkpoint={"every_samples": 64}, options={"bug_at": 20})
    assert start(settings) == 1
    said = capsys.readouterr()
    assert "small_task.py" in said.err
    lines = said.err.splitlines()
    assert lines[-3] == """The run failed: KeyError: "a bug in the user's task\""""
    assert lines[-2:] == ["To go on from the last checkpoint:", "  groundswell run mine --resume"]
    assert "fault at 128 samples" in said.out


def test_a_loss_that_is_not_a_number_fails_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(config(tmp_path, options={"nan_at": 9})) == 1
    said = capsys.readouterr().err
    assert "The run failed: step 2: the loss is not finite" in said
    assert "Traceback" not in said
    assert said.endswith("groundswell run mine --resume\n")


def test_sigterm_stops_like_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path, train={"samples": 64000}, options={"sleep_s": 0.005})
    thread = when(has_steps(tmp_path), lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert start(settings) == 130
    thread.join()
    assert events(tmp_path)[-1]["kind"] == "stopped"


def test_a_stop_by_order_is_a_planned_end_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, train={"samples": 64000}, options={"sleep_s": 0.005})
    thread = when(has_steps(tmp_path), lambda: write_request(tmp_path / "run", "stop", caps={}, timeout_s=60.0))
    assert start(settings) == 0
    thread.join()
    stopped = next(row for row in events(tmp_path) if row["kind"] == "stopped")
    assert stopped["ordered"] is True
    said = capsys.readouterr()
    assert f"Ended at {stopped['samples_seen']:,} samples: by order." in said.out
    assert said.err.endswith("groundswell run mine --resume\n")


def test_on_a_terminal_there_is_a_panel_and_no_library_speaks(tmp_path: Path) -> None:
    config_file = tmp_path / "norm.yaml"
    settings = {
        "task": {"name": "digits", "options": {"model": "batchnorm"}},
        "train": {"samples": 1600},
        "batch": {"initial": 32, "micro_batch": 8},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "controller": {"policy": "fixed", "every_samples": 256},
        "data": {"pin_memory": True},
        "run": {"dir": str(tmp_path)},
    }
    config_file.write_text(json.dumps(settings))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "launch.cli", "run", str(config_file), "--runtime", "local"]
    env = {**os.environ, "TERM": "xterm-256color"}
    env.pop("PYTHONWARNINGS", None)
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    shown = b""
    try:
        while process.poll() is None or select.select([ours], [], [], 0.1)[0]:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 65536)
        echoes = bool(termios.tcgetattr(theirs)[3] & termios.ECHOCTL)
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    text = shown.decode()
    assert process.returncode == 0, text
    for part in ("starting ...", "global batch", "noise scale", "100%, done", "Finished in ", "BatchNorm"):
        assert part in text, part
    assert "Warning" not in text
    assert "Traceback" not in text
    assert echoes
