"""What is shown of a run: told from written folders and a clock that the test turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import live
from launch.progress import Progress
from launch.sources import FolderRows, Tail

ROOT = Path(__file__).resolve().parents[2]
START = {
    "attempt": 1, "time": 0.0, "kind": "started", "step": 0, "samples_seen": 0, "reason": "the run begins",
    "runtime": "local", "device": "cpu", "world_size": 2, "global_batch": 32, "dataset_size": 1000,
    "total_samples": 10000,
}  # fmt: skip
EVENT = {"attempt": 1, "time": 0.0, "step": 1, "samples_seen": 1024, "reason": "why"}
ROW = {
    "attempt": 1, "step": 0, "samples_seen": 32, "epoch": 0.032, "loss": 2.0, "lr": 0.05, "global_batch": 32,
    "micro_batch": 8, "accum_steps": 2, "world_size": 2, "noise_scale": 41.2, "noise_low": 26.4, "noise_high": 77.7,
    "verdict": "measured", "samples_per_s": 999.0,
}  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Run:
    """A run's folder that a test writes line by line, and the progress made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, Clock()
        self.progress = Progress(FolderRows(folder), clock=self.clock)

    def event(self, kind: str, **rest: Any) -> list[str]:
        base = START if kind in ("started", "resumed") else EVENT
        self._add("events.jsonl", {**base, "kind": kind, **rest})
        return self.progress.update()

    def row(self, at_s: float, **rest: Any) -> list[str]:
        self.clock.now_s = at_s
        self._add("metrics.jsonl", {**ROW, **rest})
        return self.progress.update()

    def evaluation(self, **rest: Any) -> list[str]:
        self._add("evals.jsonl", {"attempt": 1, "step": 9, "samples_seen": 2000, **rest})
        return self.progress.update()

    def _add(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def panel(self, *, width: int = 100, events: int = 5) -> list[str]:
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(live.panel(self.progress, events=events))
        return console.export_text().splitlines()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_decision_is_told_only_where_it_changes_the_batch(run: Run) -> None:
    run.event("started")
    assert run.event("decision", target_batch=32, reason="keep 32") == []
    grown = run.event("decision", target_batch=64, reason="noise", effective_step=9)
    assert grown == ["batch 32 -> 64 at 1,024 samples: noise"]
    assert run.event("decision", target_batch=32, reason="keep 32: batch 64 takes effect at step 9") == []
    assert run.event("decision", target_batch=64, reason="keep 64") == []
    less = run.event("decision", target_batch=48, reason="less", effective_step=19)
    assert less == ["batch 64 -> 48 at 1,024 samples: less"]


def test_advice_is_told_when_it_changes(run: Run) -> None:
    run.event("started")
    said = [run.event("decision", target_batch=32, reason="wish", wished_batch=w) for w in (64, 64, 128)]
    assert [len(lines) for lines in said] == [1, 0, 1]
    assert said[2] == ["batch 32 stays, 128 is advised at 1,024 samples: wish"]


@pytest.mark.parametrize("kind", ["plan", "checkpoint", "finished", "stopped"])
def test_what_follows_from_something_else_is_not_told(run: Run, kind: str) -> None:
    run.event("started")
    assert run.event(kind, global_batch=64) == []


def test_a_growth_is_told_from_the_batch_that_was_trained_last(run: Run) -> None:
    run.event("started")
    run.event("decision", target_batch=64, reason="more", effective_step=9)
    run.event("resumed")  # before that took effect
    run.event("plan", global_batch=64)
    more = run.event("decision", target_batch=128, reason="more", effective_step=19)
    assert more == ["batch 64 -> 128 at 1,024 samples: more"]


def test_nothing_is_lost_by_an_end_that_was_said_or_that_came_right_after_a_checkpoint(run: Run) -> None:
    run.event("started")
    assert run.progress.saved_samples is None
    run.row(0.0, samples_seen=1024)
    run.event("checkpoint", samples_seen=1024)
    assert run.progress.saved_samples == 1024
    run.row(1.0, samples_seen=1056)
    assert run.progress.saved_samples is None
    run.event("stopped", samples_seen=1056)
    assert run.progress.saved_samples == 1056


@pytest.mark.parametrize(
    ("kind", "rest", "line"),
    [
        ("resize", {"from_workers": 1, "to_workers": 2}, "workers 1 -> 2 at 1,024 samples: why"),
        ("fault", {}, "fault at 1,024 samples: why"),
        ("plan_rejected", {}, "plan rejected at 1,024 samples: why"),
        ("checkpoint_failed", {}, "checkpoint failed at 1,024 samples: why"),
        ("checkpoint_passed_over", {"samples_seen": None}, "checkpoint passed over: why"),
        ("warning", {}, "warning at 1,024 samples: why"),
    ],
)
def test_what_happens_to_a_run_is_told(run: Run, kind: str, rest: dict[str, Any], line: str) -> None:
    run.event("started")
    assert run.event(kind, **rest) == [line]


def test_an_order_is_told_with_its_answer(run: Run) -> None:
    none: dict[str, Any] = {"held": False, "max_batch": None, "max_workers": None}
    given = none | {"request": "1-a", "order": "hold", "accepted": True, "held": True}
    assert run.event("control", **given) == ["control hold at 1,024 samples: why"]
    assert run.event("control", **(given | {"accepted": False})) == ["control hold refused at 1,024 samples: why"]
    begun = none | {"request": None, "order": None, "accepted": True}
    assert run.event("control", **(begun | {"max_batch": 64})) == ["control at 1,024 samples: why"]
    assert run.event("control", **begun) == []


def test_a_long_fault_is_told_in_short(run: Run) -> None:
    (line,) = run.event("fault", reason="RuntimeError: " + "gloo says a lot " * 50)
    assert len(line) < 160
    assert line.endswith(" ...")


def test_workers_are_wanted_only_where_somebody_can_bring_them(run: Run) -> None:
    run.event("started", runtime="torchrun")
    assert run.event("workers_wanted", num_workers=2) == []
    run.event("resumed", runtime="ray")
    assert run.event("workers_wanted", num_workers=2) == ["2 workers wanted: why"]


def test_a_resumed_run_shows_only_what_is_new(tmp_path: Path) -> None:
    before = Run(tmp_path)
    before.event("started")
    before.event("fault")
    before.row(0.0)
    before.evaluation(loss=1.0)
    run = Run(tmp_path)
    assert run.progress.update() == []
    assert run.progress.now is None
    assert run.event("resumed", samples_seen=5000, world_size=1) == [
        "resumed at 5,000 samples of 10,000; batch 32 on 1 worker (cpu)"
    ]


def test_a_torn_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    with path.open("w") as file:
        file.write('{"a": 1}\n{"a":')
        file.flush()
        assert tail.read() == [{"a": 1}]
        file.write(" 2}\n")
    assert tail.read() == [{"a": 2}]


def test_time_left_follows_the_speed_of_the_last_half_minute(run: Run) -> None:
    run.event("started")
    assert run.progress.time_left_s is None
    for second in range(101):
        run.row(float(second), samples_seen=10 * second)
    assert run.progress.samples_per_s == pytest.approx(10.0)
    assert run.progress.time_left_s == pytest.approx(900.0)
    for second in range(101, 141):  # ten times as fast
        run.row(float(second), samples_seen=1000 + 100 * (second - 100))
    assert run.progress.samples_per_s == pytest.approx(100.0, rel=0.05)
    assert run.progress.time_left_s == pytest.approx(50.0, rel=0.05)
    run.event("resumed", samples_seen=2000)  # what was reached before counts no more
    assert run.progress.time_left_s is None


def test_the_panel_names_every_number(run: Run) -> None:
    run.event("started")
    run.row(0.0)
    run.row(2.0, samples_seen=2000, epoch=2.0, loss=1.25, lr=0.0123)
    run.evaluation(accuracy=0.9417, loss=0.1425)
    text = "\n".join(run.panel())
    for part in (
        "20%, 0:08 left",
        "2,000 of 10,000 (epoch 2.0 of 10)",
        "loss  1.2500",
        "accuracy 0.9417, loss 0.1425 (at 2,000 samples)",
        "41 [26, 78]",
        "32 = 2 x 2 x 8  (workers x accumulation x micro-batch)",
        "0.0123",
        "samples/s  984",
        "started: 10,000 samples, 10 epochs of 1,000; batch 32 on 2 workers (cpu)",
    ):
        assert part in text, part


def test_the_panel_shows_a_step_whose_loss_is_not_known(run: Run) -> None:
    run.event("started")
    run.row(0.0)
    run.row(1.0, samples_seen=64, loss=None)
    assert "loss  ?" in "\n".join(run.panel())


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_panel_keeps_its_frame_and_its_height_at_any_width(run: Run, width: int) -> None:
    assert len(run.panel(width=width)) == 3
    run.event("started")
    run.row(0.0)
    run.row(1.0, samples_seen=2000)
    run.event("fault", reason="a very long reason " * 30)
    lines = run.panel(width=width)
    assert {len(line) for line in lines} == {width}
    assert len(lines) == 2 + 1 + 6 + 2


def test_the_panel_shows_only_the_last_events_and_says_when_nothing_moves(run: Run) -> None:
    run.event("started")
    run.row(0.0)
    run.row(1.0, samples_seen=64)
    for i in range(9):
        run.event("warning", reason=f"number {i}")
    run.clock.now_s = 13.0
    lines = run.panel(events=2)
    assert [f"number {i}" in "\n".join(lines) for i in range(9)] == [False] * 7 + [True] * 2
    assert any("no step for 0:12" in line for line in lines)


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        ({}, "41 [26, 78]"),
        ({"noise_high": None}, "41 [26, no upper end]"),
        ({"noise_scale": None, "noise_high": None}, "above 26"),
        ({"noise_scale": None, "noise_low": None, "noise_high": None, "verdict": "too noisy"}, "not known (too noisy)"),
        ({"noise_scale": 0.31, "noise_low": 0.123, "noise_high": 4321.0}, "0.31 [0.12, 4,321]"),
    ],
)
def test_the_noise_scale_is_shown_with_what_is_known_of_it(rest: dict[str, Any], text: str) -> None:
    assert live.noise_text({**ROW, **rest}) == text


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        ({}, "32 = 2 x 2 x 8"),
        ({"global_batch": 23, "world_size": 1, "accum_steps": 3}, "23 = 1 x 3 x 8 - 1"),
        ({"world_size": 3}, "32 = 3 x 2 x 8 - 16"),
    ],
)
def test_the_batch_is_shown_as_a_sum_that_is_right(rest: dict[str, Any], text: str) -> None:
    shown = live.batch_text({**ROW, **rest})
    assert shown == text
    left, right = shown.split(" = ")
    assert eval(right.replace("x", "*")) == int(left)


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (0.0, "0:00"), (59.6, "1:00"), (3723.0, "1 h 02 min")])
def test_durations(seconds: float | None, text: str) -> None:
    assert live.duration(seconds) == text


def test_plain_lines_end_with_the_last_numbers_and_never_repeat_them(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.event("started")
    turns = iter([True, True, False])

    def going() -> bool:
        run.clock.now_s += 1.0
        on = next(turns)
        if on:
            run.row(run.clock.now_s, samples_seen=int(1000 * run.clock.now_s))
        return on

    live.show_plain(run.progress, going=going)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0] == (
        "2,000/10,000 (20%)  loss 2.0000  noise scale 41 [26, 78]  batch 32 = 2 x 2 x 8  lr 0.05  1,000 samples/s  "
        "0:08 left"
    )


def test_a_reader_that_went_away_does_not_end_the_run() -> None:
    code = "from launch.live import say; say('one'); input(); say('two'); say('three'); import sys; sys.exit(7)"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"one\n"
    child.stdout.close()
    child.stdin.write(b"\n")
    child.stdin.close()
    assert child.wait(timeout=30) == 7
