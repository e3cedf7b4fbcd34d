"""Whose run is it, and who may stop it? The note in a run's folder, and notice, without torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.launched import belongs_to, goes_on, write_note
from orchestrator.errors import RunFolderError
from orchestrator.runtime import folder

LISTEN = """
import signal, sys, time
from pathlib import Path
from launch.notice import Notice
notice = Notice(Path(sys.argv[1]), is_current=lambda: sys.argv[2] == "current")
notice.listen()
if sys.argv[3] == "after":
    notice.training_is_over()
print("listening", flush=True)
sys.exit(0 if notice.wait(20.0) and not sys.stdin.readline() else 1)
"""


def begin(path: Path) -> None:
    (path / folder.CONFIG).touch()
    (path / folder.EVENTS).write_text('{"attempt": 1, "kind": "started"}\n')


def test_a_launch_goes_on_with_its_own_run_and_another_must_be_told_to(tmp_path: Path) -> None:
    assert not goes_on(tmp_path, launch="a", resume=False, auto_resume=True)
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        goes_on(tmp_path, launch="a", resume=True, auto_resume=False)
    write_note(tmp_path, launch="a")
    # A node that joins before the first step: there is nothing to go on with yet.
    assert not goes_on(tmp_path, launch="a", resume=False, auto_resume=False)
    begin(tmp_path)
    assert goes_on(tmp_path, launch="a", resume=False, auto_resume=False)
    with pytest.raises(RunFolderError, match="already holds a run; pass --resume"):
        goes_on(tmp_path, launch="b", resume=False, auto_resume=False)
    assert goes_on(tmp_path, launch="b", resume=True, auto_resume=False)
    assert goes_on(tmp_path, launch="b", resume=False, auto_resume=True)


def test_a_group_is_current_until_another_takes_over(tmp_path: Path) -> None:
    first = write_note(tmp_path, launch="a")
    assert first.is_current(tmp_path)
    second = write_note(tmp_path, launch="a")
    assert second.is_current(tmp_path)
    assert not first.is_current(tmp_path)
    assert belongs_to(tmp_path, "a")
    (tmp_path / "launched.by").write_text("torn")
    assert second.is_current(tmp_path), "what cannot be read says nothing of another group"
    assert not belongs_to(tmp_path, "a")


def listener(path: Path, group: str, when: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LISTEN, str(path), group, when]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).resolve().parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


@pytest.mark.parametrize(
    ("group", "when", "signals", "asked", "code"),
    [
        ("current", "training", [signal.SIGTERM, signal.SIGTERM], True, 0),
        ("current", "training", [signal.SIGINT], True, 0),
        ("current", "training", [signal.SIGINT, signal.SIGTERM], True, 128 + signal.SIGTERM),
        ("left behind", "training", [signal.SIGTERM], False, 128 + signal.SIGTERM),
        ("current", "after", [signal.SIGTERM], False, 0),
    ],
)
def test_notice_asks_for_a_stop_of_its_own_group_only(
    tmp_path: Path, group: str, when: str, signals: list[int], asked: bool, code: int
) -> None:
    with listener(tmp_path, group, when) as process:
        for number in signals:
            process.send_signal(number)
            if len(signals) > 1:
                _until_there(tmp_path / folder.STOP_REQUEST)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == code
    assert (tmp_path / folder.STOP_REQUEST).exists() == asked


def test_a_request_of_the_year_1970_makes_notice_end_the_process(tmp_path: Path) -> None:
    request = tmp_path / folder.STOP_REQUEST
    with listener(tmp_path, "current", "training") as process:
        request.touch()
        os.utime(request, (0, 0))
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM


def _until_there(path: Path) -> None:
    end_s = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end_s
        time.sleep(0.01)
