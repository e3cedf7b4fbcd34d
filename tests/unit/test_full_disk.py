"""A full disk costs checkpoints and no training; the older ones stay, and the run can be resumed."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import Result

from orchestrator.errors import GroundswellError
from orchestrator.runtime import folder
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp, run_fleet
from tests.unit.broken_tasks import KINDS, model_of
from tests.unit.small_runs import (
    BATCH,
    STEPS,
    assert_readable,
    events,
    groundswell,
    rows_of,
    saved_steps,
    settings_of,
    trained,
)

ROOM = 200_000  # bytes: enough for every file but the tensors


def limited(limit: int, function: Callable[[], Any]) -> Any:
    """``function`` with no file growing beyond ``limit`` bytes: the writes really fail."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        return function()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))


def wide(path: str, steps: int, full_from: int, mended_from: int, limit: int) -> bool:
    """A run whose checkpoints take a megabyte, on storage that is full from one step to another."""
    sections: dict[str, Any] = {
        "train": {"samples": steps * BATCH},
        # Written in the step that they are of, which is what settles whether the disk is full.
        "checkpoint": {"every_samples": 2 * BATCH, "keep": 2, "asynchronous": False},
        "ledger": True,
    }
    model = mlp(width=300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Session(config(path, **sections), model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            full = full_from <= session.step_number < mended_from
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if full else resource.RLIM_INFINITY, hard))
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    return session.finished


def member(rank: int, function: Callable[..., Any], *args: Any) -> Any:
    """For a child process: what ``function`` returns, or its error's kind and words."""
    try:
        return function(*args)
    except GroundswellError as error:
        return type(error).__name__, str(error)


def test_a_full_disk_costs_checkpoints_and_no_training_and_the_older_ones_stay(tmp_path: Path) -> None:
    # Saves after steps 1, 3, 5, 7; those of 3 and 5 fail.
    assert run_fleet(member, 1, wide, str(tmp_path), 9, 3, 6, ROOM) == [True]
    failed = events(tmp_path, "checkpoint_failed")
    assert [e["step"] for e in failed] == [4, 6]
    assert all("older checkpoints are untouched" in e["reason"] and "Errno 27" in e["reason"] for e in failed)
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [2, 8, 9]
    assert [step for (step,) in rows_of(tmp_path, "step")] == list(range(9))
    assert_readable(tmp_path)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if "partial" in p.name] == []


def test_when_the_last_checkpoint_fails_on_a_full_disk_the_run_fails_and_the_older_one_can_be_resumed(
    tmp_path: Path,
) -> None:
    ((kind, told),) = run_fleet(member, 1, wide, str(tmp_path), 7, 3, 100, ROOM)
    assert kind == "CheckpointError"
    assert "checkpoint of step 7 was not written" in told
    assert saved_steps(tmp_path) == [2]
    assert events(tmp_path, "finished") == []
    assert events(tmp_path, "fault")
    assert_readable(tmp_path)
    trained(tmp_path, resume=True, model=mlp(width=300), sections={"train": {"samples": 7 * BATCH}, "ledger": True})
    assert [e["step"] for e in events(tmp_path, "resumed", "finished")] == [2, 7]
    assert_readable(tmp_path)


def command_on_full_disk(path: str, limit: int) -> tuple[int, str]:
    KINDS["wide"] = model_of(lambda: mlp(width=300))
    settings = settings_of(Path(path), "wide", checkpoint={"every_samples": BATCH})
    result: Result = limited(limit, lambda: groundswell(settings))
    return result.exit_code, result.output


def test_the_command_ends_with_an_error_when_the_last_checkpoint_was_not_written(tmp_path: Path) -> None:
    ((exit_code, output),) = run_fleet(member, 1, command_on_full_disk, str(tmp_path), ROOM)
    assert exit_code == 1
    assert f"checkpoint of step {STEPS} was not written" in output
    assert "Traceback" not in output
    assert [step for (step,) in rows_of(tmp_path, "step")] == list(range(STEPS))
    assert_readable(tmp_path)


def test_a_disk_too_full_for_a_line_of_metrics_costs_no_training_and_the_end_is_an_error(tmp_path: Path) -> None:
    # Room for the resolved config and some lines.
    ((kind, told),) = run_fleet(member, 1, wide, str(tmp_path), 40, 0, 100, 5_000)
    assert kind == "CheckpointError"
    assert "checkpoint of step 40 was not written" in told
    list(folder.rows(tmp_path / "run" / folder.METRICS))  # a torn last line is left out
    trained(tmp_path, resume=True, model=mlp(width=300), sections={"train": {"samples": 40 * BATCH}, "ledger": True})
    assert_readable(tmp_path)


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(tmp_path: Path) -> None:
    assert run_fleet(member, 1, wide, str(tmp_path), 60, 0, 50, 5_000) == [True]
    assert [step for (step,) in rows_of(tmp_path, "step")] == list(range(60))
    assert_readable(tmp_path)
    first, *others = [e["reason"] for e in events(tmp_path, "warning")]
    assert "File too large" in first
    assert "lines are kept in memory, and training goes on" in first
    assert "the storage takes lines again" in others[-1]
    assert [e["step"] for e in events(tmp_path, "checkpoint")][-1] == 60
