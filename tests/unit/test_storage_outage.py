"""A folder that goes away while a run trains costs no step and no line, and ends the run only after a stated time."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import CheckpointError, StorageError
from orchestrator.runtime import checkpoints, folder
from orchestrator.runtime.folder import RunWriter
from orchestrator.runtime.patient_file import Outage, PatientFile
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp
from tests.unit.small_runs import BATCH, assert_readable, events, rows_of, saved_steps, trained

# TensorBoard writes in a thread of its own, which ends with the error where its folder is gone; it is then dropped.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
LINES = [(json.dumps({"line": number, "text": "x" * (number % 7)}) + "\n").encode() for number in range(12)]


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes: a write that would is cut short, and the next one fails."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))


# One file


@pytest.mark.parametrize("reopened", [False, True], ids=["the same handle", "opened anew"])
def test_wherever_the_disk_was_full_each_line_is_there_once_in_the_end(tmp_path: Path, reopened: bool) -> None:
    whole = b"".join(LINES)
    refusals = 0
    for limit in range(len(whole) + 1):
        path = tmp_path / f"{limit}.jsonl"
        file = PatientFile(path)
        with full_at(limit):
            for first in range(0, 9, 3):
                try:
                    file.append(LINES[first : first + 3])
                except OSError:
                    refusals += 1
        if reopened:
            file.close()
        file.append(LINES[9:])
        assert file.waiting == 0
        assert path.read_bytes() == whole, limit
        file.close()
    assert refusals > len(whole)


def test_a_file_that_went_away_is_waited_for_and_not_made_anew(tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    file = PatientFile(place / "a.jsonl")
    file.append(LINES[:3])
    place.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            file.append(LINES[3:4])
    place.mkdir()  # what a network path leaves behind
    with pytest.raises(FileNotFoundError):
        file.append(())
    assert list(place.iterdir()) == []
    assert file.waiting == 2
    place.rmdir()
    (tmp_path / "away").rename(place)
    file.append(LINES[4:6])
    assert (place / "a.jsonl").read_bytes() == b"".join([*LINES[:4], LINES[3], *LINES[4:6]])
    file.close()


def test_an_outage_is_told_once_and_timed_from_its_first_refusal() -> None:
    clock = [0.0]
    outage = Outage(lambda: clock[0])
    assert (outage.over(), outage.lasted_s, outage.tries_again(0.0)) == (False, 0.0, False)
    assert outage.failed("first")
    clock[0] = 3.0
    assert not outage.failed("second")
    assert (outage.why, outage.lasted_s) == ("second", 3.0)
    clock[0] = 4.0
    assert not outage.tries_again(2.0)
    clock[0] = 5.0
    assert outage.tries_again(2.0)
    assert not outage.tries_again(2.0)
    assert outage.over()
    assert (outage.lasted_s, outage.over(), outage.failed("again")) == (0.0, False, True)


# A run's files


def test_lines_that_are_lost_are_named_when_the_writer_is_closed(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.append(folder.EVENTS, {"kind": "started"})
    with full_at(4):
        writer.append(folder.METRICS, {"step": 0}, {"step": 1})
        assert (writer.waiting, writer.is_full) == (2, False)
        with pytest.raises(StorageError, match=r"2 lines of .*metrics\.jsonl .*File too large.*resume the run"):
            writer.close()
    assert list(folder.rows(tmp_path / folder.METRICS)) == []
    RunWriter(tmp_path, patience_s=0.05).close()  # the folder is let go of


def test_more_than_can_be_kept_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MOST_WAITING_BYTES", 100)
    writer = RunWriter(tmp_path)
    writer.append(folder.EVENTS, {"kind": "started"})
    with full_at(4):
        for step in range(9):
            writer.append(folder.METRICS, {"step": step})
        assert writer.is_full
    writer.close()
    assert [row["step"] for row in folder.rows(tmp_path / folder.METRICS)] == list(range(9))


def test_a_folder_that_takes_no_first_line_is_refused_at_once(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    with full_at(4), pytest.raises(StorageError, match=r"cannot write .*events\.jsonl.*then resume the run"):
        writer.append(folder.EVENTS, {"kind": "started"})


# Runs


def steps_of(path: Path, *, steps: int, **sections: Any) -> Iterator[Session]:
    base: dict[str, Any] = {"train": {"samples": steps * BATCH}, "checkpoint": {"every_samples": 2 * BATCH}}
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Session(
        config(path, ledger=True, **(base | sections)), model=model, optimizer=optimizer, dataset=blobs()
    ) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            yield session


def test_a_path_that_is_away_for_a_while_costs_no_line_and_no_step(tmp_path: Path) -> None:
    away = tmp_path / "away"
    for session in steps_of(tmp_path, steps=12):
        if session.step_number == 3:
            (tmp_path / "run").rename(away)
        elif session.step_number == 7:
            assert not (tmp_path / "run").exists()  # nothing was made in its place
            away.rename(tmp_path / "run")
    assert session.finished
    assert [step for (step,) in rows_of(tmp_path, "step")] == list(range(12))
    assert_readable(tmp_path)
    gone, back = events(tmp_path, "warning")
    assert "No such file or directory" in gone["reason"]
    assert "that waited are written" in back["reason"]
    assert 4 in [e["step"] for e in events(tmp_path, "checkpoint_failed")]
    assert [e["step"] for e in events(tmp_path, "checkpoint")][-1] == 12


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_path_that_stays_away_ends_the_run_which_can_be_resumed_when_it_is_back(
    tmp_path: Path, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sections: dict[str, Any] = {
        "recovery": {"storage_patience_s": 0.3},
        "checkpoint": {"every_samples": 2 * BATCH, "asynchronous": asynchronous},
    }
    away, taken, last = tmp_path / "away", 0, 0
    with pytest.raises(CheckpointError, match=r"was not written to .*No such file or directory"):  # noqa: PT012
        for session in steps_of(tmp_path, steps=100_000, **sections):
            taken = session.step_number
            if not last and saved_steps(tmp_path):
                (tmp_path / "run").rename(away)
                last = taken
    assert 2 <= last < taken < 100_000
    assert not (tmp_path / "run").exists()
    assert "could not be written: " in caplog.text
    assert "lines of" in caplog.text
    away.rename(tmp_path / "run")
    newest = saved_steps(tmp_path)[-1]
    assert newest <= last
    trained(tmp_path, resume=True, sections={"train": {"samples": (newest + 4) * BATCH}, "ledger": True})
    assert [e["step"] for e in events(tmp_path, "resumed")] == [newest]
    assert_readable(tmp_path)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_path_that_goes_away_within_a_save_does_not_come_back_empty(
    tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, away = checkpoints._make_empty, tmp_path / "away"

    def gone_once_made(path: Path) -> None:
        make(path)
        if not away.exists():
            (tmp_path / "run").rename(away)

    monkeypatch.setattr(checkpoints, "_make_empty", gone_once_made)
    every = {"every_samples": 2 * BATCH, "asynchronous": asynchronous}
    with pytest.raises(CheckpointError, match="No such file or directory"):  # noqa: PT012
        for _ in steps_of(tmp_path, steps=100_000, checkpoint=every, recovery={"storage_patience_s": 0.3}):
            assert not (away.exists() and (tmp_path / "run").exists())
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_failed_is_tried_again_before_the_next_is_due(tmp_path: Path) -> None:
    place = tmp_path / "run" / "checkpoints"
    every = {"checkpoint": {"every_samples": 100 * BATCH}, "recovery": {"storage_patience_s": 8.0}}
    for session in steps_of(tmp_path, steps=100_000, **every):
        if session.step_number == 1:
            place.write_text("something else")
        if session.step_number == 150:
            place.unlink()
        if session.step_number > 150 and saved_steps(tmp_path):
            session.request_stop("it was saved")
    assert events(tmp_path, "checkpoint_failed")[0]["step"] == 100
    (first, *_) = events(tmp_path, "checkpoint")
    assert 150 < first["step"] < 100_000
    assert [e["reason"] for e in events(tmp_path, "stopped")] == ["it was saved"]


def test_checkpoints_that_fail_for_too_long_end_the_run_while_its_lines_are_written(tmp_path: Path) -> None:
    every = {"checkpoint": {"every_samples": 2 * BATCH}, "recovery": {"storage_patience_s": 0.3}}
    with pytest.raises(CheckpointError, match="make room or mend the storage"):  # noqa: PT012
        for session in steps_of(tmp_path, steps=100_000, **every):
            if session.step_number == 1:
                (tmp_path / "run" / "checkpoints").write_text("something else")
    steps = [step for (step,) in rows_of(tmp_path, "step")]
    assert 2 < len(steps) < 100_000
    assert steps == list(range(len(steps)))
    assert events(tmp_path)[-1]["kind"] == "fault"
