"""``groundswell control`` on a running job of this machine: each order is answered, and acts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launch.cli import main
from launch.run_command import seems_written
from orchestrator.config import RunConfig
from orchestrator.runtime import folder
from orchestrator.runtime.checkpoints import CheckpointStore, verify
from orchestrator.runtime.control_requests import CONTROL
from orchestrator.runtime.replay import recomputed, recorded
from orchestrator.runtime.worker import local_worker
from orchestrator.train import train
from tests import support

EVERY = 64
BETWEEN = 128  # samples, from one decision to the next, at most: a batch
TASK = "tests.launch.small_task:make"


def config(place: Path, **sections: Any) -> RunConfig:
    """Grows from 32 to 128 by a ramp, taking about 5 ms a micro-batch of 8."""
    base: dict[str, Any] = {
        "task": {"name": TASK, "options": {"sleep_s": 0.005}},
        "train": {"samples": 100_000},
        "batch": {"initial": 32, "micro_batch": 8, "min": 16, "max": 128},
        "controller": {"policy": "schedule", "every_samples": EVERY, "ramp": [[4 * EVERY, 64], [12 * EVERY, 96]]},
    }
    return support.config(place, **{name: {**base.get(name, {}), **sections.get(name, {})} for name in base | sections})


@contextmanager
def running(settings: RunConfig, *, resume: bool = False) -> Iterator[Path]:
    """A run in a thread, which is stopped by an order in the end."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            train(settings, local_worker(settings), resume=resume)
        except BaseException as error:
            failed.append(error)

    run = Path(settings.run.dir) / settings.run.name
    before = sum(1 for _ in folder.rows(run / folder.METRICS))
    thread = Thread(target=work)
    thread.start()
    try:
        until(lambda: sum(1 for _ in folder.rows(run / folder.METRICS)) > before)
        yield run
    finally:
        if thread.is_alive():
            order(run, "stop")
        thread.join(60)
        assert not failed, failed


def until(there: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline_s, "nothing happened"
        time.sleep(0.01)


def order(run: Path | str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["control", str(run), *arguments])


def answers(run: Path) -> list[dict[str, Any]]:
    return [row for row in folder.rows(run / folder.EVENTS) if row["kind"] == "control"]


def batches_after(run: Path, step: int) -> list[int]:
    """The batches from the third decision after ``step`` to the seventh."""

    def rows() -> list[dict[str, Any]]:
        rows = [row for row in folder.surviving(run / folder.METRICS) if row["step"] >= step]
        return [row for row in rows if row["samples_seen"] > rows[0]["samples_seen"] + 2 * BETWEEN]

    until(lambda: bool(rows()) and rows()[-1]["samples_seen"] > rows()[0]["samples_seen"] + 4 * BETWEEN)
    return [row["global_batch"] for row in rows()]


def test_hold_cap_checkpoint_and_stop_act_and_are_answered_and_the_run_replays(tmp_path: Path) -> None:
    with running(config(tmp_path)) as run:
        held = order(run, "hold")
        assert held.exit_code == 0, held.output
        assert "batch and workers are held" in held.output
        at = answers(run)[-1]
        kept = batches_after(run, at["step"])
        assert len(set(kept)) == 1

        assert order(run, "cap", "--max-batch", "48").exit_code == 0
        assert order(run, "release").exit_code == 0
        assert set(batches_after(run, answers(run)[-1]["step"])) == {48}

        refused = order(run, "cap", "--max-batch", "8")
        assert refused.exit_code == 1
        assert "below the floor of the batch, 16" in refused.output
        refused = order(run, "cap", "--max-workers", "2")
        assert refused.exit_code == 1
        assert answers(run)[-1]["max_batch"] == 48

        before = time.monotonic()
        saved = order(run, "checkpoint")
        assert saved.exit_code == 0, saved.output
        assert time.monotonic() - before < 5
        path = Path(answers(run)[-1]["path"])
        assert str(path) in saved.output
        assert verify(path) is None

        assert order(run, "cap", "--max-batch", "none").exit_code == 0
        assert set(batches_after(run, answers(run)[-1]["step"])) == {96}
        stopped = order(run, "stop")
        assert stopped.exit_code == 0, stopped.output
    events = list(folder.rows(run / folder.EVENTS))
    assert [(row["kind"], row["reason"]) for row in events if row["kind"] == "stopped"] == [("stopped", "by order")]
    assert list((run / CONTROL).iterdir()) == []
    decided = recorded(run)
    assert any("held by order" in one.reason for one in decided)
    assert any("at most 48 by order" in one.reason for one in decided)
    assert recomputed(run)[: len(decided)] == decided


def test_standing_orders_outlive_a_crash_and_a_resume(tmp_path: Path) -> None:
    broken = config(tmp_path, task={"name": TASK, "options": {"sleep_s": 0.005, "bug_at": 400}})
    run = tmp_path / "run"
    thread = Thread(target=_fails, args=(broken,))
    thread.start()
    until(lambda: (run / folder.METRICS).exists())
    saved = order(run, "checkpoint")
    assert saved.exit_code == 0, saved.output
    capped = order(run, "cap", "--max-batch", "40")
    assert capped.exit_code == 0, capped.output
    thread.join(60)
    assert [row["kind"] for row in folder.rows(run / folder.EVENTS)][-1] == "fault"
    # The checkpoint from before the order knows nothing of it.
    with running(config(tmp_path, recovery={"accept_changed": ["task.options"]}), resume=True):
        resumed = next(row for row in folder.rows(run / folder.EVENTS) if row["kind"] == "resumed")
        assert resumed["step"] <= next(row["step"] for row in answers(run) if row["order"] == "cap")
        still = next(row for row in answers(run) if row["attempt"] == resumed["attempt"])
        assert (still["request"], still["max_batch"]) == (None, 40)
        # Past what the ramp says: only the order keeps the batch there.
        until(lambda: folder.surviving(run / folder.METRICS)[-1]["samples_seen"] > 16 * EVERY)
        after = [
            row["global_batch"] for row in folder.surviving(run / folder.METRICS) if row["samples_seen"] > 8 * EVERY
        ]
        assert set(after) == {40}
    decided = recorded(run)
    assert recomputed(run)[: len(decided)] == decided


def _fails(settings: RunConfig) -> None:
    with pytest.raises(KeyError):
        train(settings, local_worker(settings), resume=False)


def test_what_is_no_request_is_set_aside_and_the_run_goes_on(tmp_path: Path) -> None:
    with running(config(tmp_path)) as run:
        place = run / CONTROL
        place.mkdir(exist_ok=True)
        bad = ["{", "[]", '{"order": "jump"}', '{"order": "hold", "max_batch": 3}', '{"order": "cap", "max_batch": 0}',
               '{"order": "cap"}', '{"order": "cap", "max_workers": true}', "\udcff",
               "[" * 60_000, '{"order": "hold"}' + " " * 70_000]  # fmt: skip
        for number, text in enumerate(bad):
            (place / f"{number}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        until(lambda: len(answers(run)) == len(bad))
        assert not any(row["accepted"] for row in answers(run))
        assert sorted(path.name for path in place.iterdir()) == sorted(
            f"{number}.refused" for number in range(len(bad))
        )
        assert order(run, "hold").exit_code == 0


def test_an_order_that_was_taken_is_not_said_to_be_withdrawn_and_one_that_nobody_waits_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = CheckpointStore.save
    slow_from_here: list[float] = []

    def slow(store: CheckpointStore, *args: Any, **more: Any) -> Path:
        time.sleep(1.5 if slow_from_here else 0.0)
        return save(store, *args, **more)

    monkeypatch.setattr(CheckpointStore, "save", slow)
    with running(config(tmp_path)) as run:
        (run / CONTROL).mkdir(exist_ok=True)
        (run / CONTROL / "1-a.json").write_text(json.dumps({"order": "stop", "expires_s": time.time() - 60}))
        (run / CONTROL / "1-b.taken").write_text(json.dumps({"order": "hold", "expires_s": time.time() - 60}))
        until(lambda: len(answers(run)) == 2)
        assert [(row["request"], row["accepted"], row["held"]) for row in answers(run)] == [
            ("1-a", False, False),
            ("1-b", False, False),
        ]
        assert all("nobody has waited for it" in row["reason"] for row in answers(run))
        slow_from_here.append(1.0)
        late = order(run, "checkpoint", "--timeout", "0.8")
        assert late.exit_code == 1
        assert "the order was taken, and is not done yet" in late.output
        until(lambda: answers(run)[-1]["order"] == "checkpoint")
        assert list((run / CONTROL).iterdir()) == []


def test_a_command_that_is_ended_withdraws_its_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / folder.EVENTS).write_text(json.dumps({"attempt": 1, "kind": "started"}) + "\n")
    command = [sys.executable, "-m", "launch.cli", "control", str(run), "stop"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[2])
    until(lambda: list(run.glob(f"{CONTROL}/*.json")) != [])
    process.terminate()
    assert process.wait(30) == 143
    assert list((run / CONTROL).iterdir()) == []


def test_a_run_that_is_not_running_says_so_and_keeps_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, train={"samples": 800})
    train(settings, local_worker(settings), resume=False)
    run = tmp_path / "run"
    done = order(run, "hold")
    assert done.exit_code == 1
    assert f"{run} is not running: it has finished" in done.output
    # A run that died left no word of its end.
    lines = (run / folder.EVENTS).read_text().splitlines(keepends=True)
    (run / folder.EVENTS).write_text("".join(line for line in lines if json.loads(line)["kind"] == "started"))
    done = order("run", "hold", "--run-dir", str(tmp_path), "--timeout", "0.2")
    assert done.exit_code == 1
    assert "no answer" in done.output
    assert "it is not running" in done.output
    assert list((run / CONTROL).iterdir()) == []

    def unknown(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(folder.FileLock, "acquire", unknown)
    assert folder.is_written(run) is None
    done = order(run, "hold", "--timeout", "0.2")
    assert "written by no process" not in done.output
    assert "whether it is running is not known" in done.output
    # Then --auto-resume goes by the time of the last line.
    assert seems_written(run)
    for name in (folder.EVENTS, folder.METRICS):
        os.utime(run / name, (time.time() - 60, time.time() - 60))
    assert not seems_written(run)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "hold"], "is the folder of a run"),
        (["run", "cap"], "cap needs --max-batch"),
        (["run", "hold", "--max-batch", "3"], "hold takes no caps"),
        (["run", "cap", "--max-batch", "0"], "neither a whole number"),
        (["run", "hold", "--address", "http://127.0.0.1:1"], "nobody answers at http://127.0.0.1:1"),
    ],
)
def test_what_is_not_understood_is_refused(arguments: list[str], said: str) -> None:
    done = order(*arguments)
    assert done.exit_code in (1, 2)
    assert said in done.output
