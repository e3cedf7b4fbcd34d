"""A run printed as lines of JSON says to who reads them what its folder says to the run itself."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from rich.console import Console

from launch import live
from launch.json_rows import JsonRows, read_line
from launch.progress import Progress
from launch.ray_jobs.log import LogRows, LogText
from launch.run_command import run
from launch.sources import News
from tests import support
from tests.launch.test_live import EVENT, ROW, START, Clock

TASK = "tests.launch.small_task:make"


class Given:
    """A source that a test fills."""

    name, behind = "given", False

    def __init__(self) -> None:
        self.news = News()

    def read(self) -> News:
        news, self.news = self.news, News()
        return news


def follow(lines: list[str], *, live_: bool = False) -> Progress:
    rows = LogRows("run", live=live_)
    rows.add(lines)
    progress = Progress(rows, clock=rows.clock)
    live.show_plain(progress, going=lambda: rows.behind)
    return progress


def test_a_run_that_prints_rows_reads_as_one_that_prints_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: dict[str, list[str]] = {}
    for log_format in ("text", "json"):
        config = support.config(
            tmp_path / log_format,
            task={"name": TASK, "options": {}},
            train={"samples": 1280},
            batch={"max": 64},
            controller={"policy": "schedule", "every_samples": 128, "ramp": [[256, 64]]},
            evaluation={"every_samples": 640},
        )
        code = run(config, runtime="local", resume=False, address="local", command=None, log_format=log_format)
        assert code == 0
        said[log_format] = capfd.readouterr().out.splitlines()
    assert all(json.loads(line)["groundswell"] for line in said["json"])
    kinds = [json.loads(line)["groundswell"] for line in said["json"]]
    assert {"event", "metrics", "eval", "told"} == set(kinds)
    assert kinds.count("eval") == 2
    metrics = [json.loads(line) for line in said["json"] if '"metrics"' in line[:30]]
    assert metrics[-1]["samples_seen"] == 1280

    progress = follow(said["json"])
    read = capfd.readouterr().out.splitlines()

    def told(lines: list[str]) -> list[str]:
        """Without what depends on a clock or a folder."""
        return [
            line
            for line in lines
            if "samples/s" not in line and not line.startswith(("Finished", "run: ", "Pic", "Cur", "Dec"))
        ]

    assert told(read) == told(said["text"])
    assert len(told(read)) >= 4
    assert progress.ended is not None
    assert progress.ended["kind"] == "finished"


def test_of_metrics_the_newest_is_printed_once_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    source, clock = Given(), Clock()
    rows = JsonRows(source, clock=clock)
    for tick in range(41):
        clock.now_s = tick / 4
        source.news = News(metrics=[{**ROW, "step": 2 * tick}, {**ROW, "step": 2 * tick + 1}])
        rows.read()
    rows.print_newest()
    rows.print_newest()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["step"] for row in printed] == [1 + 8 * second for second in range(11)]
    assert [row["at_s"] for row in printed] == [float(second) for second in range(11)]


def test_in_a_run_of_hours_metrics_are_printed_once_in_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    source, clock = Given(), Clock()
    rows = JsonRows(source, clock=clock)
    for second in range(7200, 7300):
        clock.now_s = float(second)
        source.news = News(metrics=[{**ROW, "step": second}])
        rows.read()
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.parametrize(
    "line",
    [
        "plain words",
        "",
        "{}",
        '{"loss": 1}',
        '{"groundswell": "event", "at_s": 1.0',
        '{"groundswell": "event", "kind": "started"}',
        '{"groundswell": "weather", "at_s": 1.0}',
    ],
)
def test_what_is_no_row_is_a_line_of_text(line: str) -> None:
    assert read_line(line) is None
    rows = LogRows("run", live=False)
    rows.add([line])
    assert rows.read() == News(lines=[line])


def test_what_ray_says_before_the_entrypoint_is_left_out() -> None:
    rows = LogRows("run", live=False)
    rows.add(
        [
            "2026-11-21 19:26:35,171\tINFO job_manager.py:581 -- Runtime env is setting up.",
            "Running entrypoint for job groundswell-run-1: exec python -m launch.cli run",
            "mine",
        ]
    )
    assert rows.read() == News(lines=["mine"])
    assert not rows.behind


STACK = """[2026-11-21 19:40:06,788 E 3998 3998] logging.cc:474: *** {signal} received at time=1795290006 on cpu 1 ***
[2026-11-21 19:40:06,788 E 3998 3998] logging.cc:474: PC: @     0x7f5312aed545  (unknown)  clock_nanosleep
[2026-11-21 19:40:06,789 E 3998 3998] logging.cc:474:     @     0x7f5312a5a050  (unknown)  (unknown)
*** {signal} received at time=1795290006 on cpu 1 ***
PC: @     0x7f5312aed545  (unknown)  clock_nanosleep
    @     0x7f5312a5a050  (unknown)  (unknown)
    @ ... and at least 4 more frames
mine"""


@pytest.mark.parametrize(("signal", "kept"), [("SIGTERM", 1), ("SIGSEGV", 8)])
def test_the_stack_of_a_process_that_was_asked_to_stop_is_left_out_and_that_of_a_crash_is_not(
    signal: str, kept: int
) -> None:
    rows = LogRows("run", live=False)
    rows.add(STACK.format(signal=signal).split("\n"))
    lines = []
    while rows.behind:
        lines += rows.read().lines
    assert len(lines) == kept
    assert lines[-1] == "mine"


def test_a_log_that_arrives_at_once_is_shown_in_the_runs_own_time(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"groundswell": "event", "at_s": 0.0, **START})]
    lines += [
        json.dumps({"groundswell": "metrics", "at_s": float(second), **ROW, "samples_seen": 100 * second})
        for second in range(1, 31)
    ]
    lines += ["a print of the task", json.dumps({"groundswell": "event", "at_s": 30.0, **EVENT, "kind": "warning"})]
    progress = follow(lines)
    said = capsys.readouterr().out.splitlines()
    assert progress.samples_per_s == pytest.approx(100.0)
    shown = [line.split("/")[0] for line in said if "samples/s" in line]
    assert shown == ["200", "700", "1,200", "1,700", "2,200", "2,700", "3,000"]
    assert said.index("a print of the task") < said.index("warning at 1,024 samples: why")


@pytest.mark.parametrize("live_", [True, False])
def test_a_run_that_goes_on_grows_older_and_one_that_ended_does_not(live_: bool) -> None:
    now = Clock()
    rows = LogRows("run", live=live_, now=now)
    rows.add([json.dumps({"groundswell": "told", "at_s": 7.0, "line": "one\ntwo"})])
    assert rows.read() == News(lines=["one", "two"])
    now.now_s = 3.0
    assert rows.clock() == (10.0 if live_ else 7.0)


def pieces(text: str, draw: Callable[[int], int]) -> list[str]:
    found = []
    while text:
        cut = draw(len(text))
        found.append(text[:cut])
        text = text[cut:]
    return found


@given(text=st.text(alphabet="ab\n", max_size=60), seed=st.integers(0, 2**16), breaks=st.integers(0, 4))
def test_a_stream_that_breaks_loses_no_line_and_repeats_none(text: str, seed: int, breaks: int) -> None:
    random_ = random.Random(seed)
    log = LogText()
    lines: list[str] = []

    def feed(part: str) -> None:
        for piece in pieces(part, lambda left: random_.randint(1, left)):
            lines.extend(log.take(piece))

    for _ in range(breaks):
        feed(text[: random_.randint(0, len(text))])
        log.begin_again()
    feed(text)
    lines += log.last()
    assert lines == text.removesuffix("\n").split("\n") if text else not lines
    rest: Any = log.last()
    assert rest == []


def test_on_a_terminal_lines_that_are_no_rows_stand_above_the_panel() -> None:
    rows = LogRows("wave", live=False)
    rows.add([json.dumps({"groundswell": "event", "at_s": 0.0, **START})])
    for second in range(1, 4):
        rows.add([json.dumps({"groundswell": "metrics", "at_s": float(second), **ROW, "samples_seen": 100 * second})])
        rows.add([f"print {second} of the task"])
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=40)
    progress = Progress(rows, clock=rows.clock)
    live.show(progress, going=lambda: rows.behind, console=console)
    shown = screen.getvalue()
    assert [shown.count(f"print {second} of the task") for second in (1, 2, 3)] == [1, 1, 1]
    assert "300 of 10,000" in shown
    assert "samples/s  100" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "100 of 10,000" not in shown  # what was long ago is passed over
