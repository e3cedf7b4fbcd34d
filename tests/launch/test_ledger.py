"""``groundswell ledger verify``: a real run passes; of a ledger that was tampered with the first violation is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launch.ledger_command import ledger_group
from orchestrator.runtime.worker import local_worker
from orchestrator.train import train
from tests import support

Rows = list[dict[str, Any]]


def verify(run: Path) -> Result:
    return CliRunner().invoke(ledger_group, ["verify", str(run)])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2.5 epochs of 256 samples with a batch that grows, in one process."""
    folder = tmp_path_factory.mktemp("ledger")
    config = support.config(
        folder,
        task={"name": "tests.launch.small_task:make"},
        batch={"max": 64},
        controller={"policy": "schedule", "every_samples": 128, "ramp": [[256, 64]]},
        ledger=True,
    )
    assert train(config, local_worker(config), resume=False)
    return folder / "run"


def tampered(real: Path, tmp_path: Path, change: Callable[[Rows], None]) -> Path:
    run = tmp_path / "run"
    shutil.copytree(real, run)
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    change(rows)
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_real_run_used_every_position_once(real: Path) -> None:
    result = verify(real)
    assert result.exit_code == 0
    steps = len((real / "ledger.jsonl").read_text().splitlines())
    assert steps < 640 / 32  # the batch did grow
    assert result.output == f"exactly once: 640 positions in {steps} steps, none missing, none twice\n"


def _drop_step(rows: Rows) -> None:
    del rows[3]


def _drop_first_step(rows: Rows) -> None:
    del rows[0]


def _double(rows: Rows) -> None:
    rows[2]["ranks"][0].append(rows[2]["ranks"][0][1])


def _drop_position(rows: Rows) -> None:
    first, size = rows[2]["ranks"][0][1]
    rows[2]["ranks"][0][1] = [first, size - 1]


def _drop_last_micro_batch(rows: Rows) -> None:
    rows[2]["ranks"][0].pop()


def _used_before(rows: Rows) -> None:
    rows[4]["ranks"][0][0] = rows[1]["ranks"][0][0]


def _two_violations(rows: Rows) -> None:
    _drop_position(rows)
    _used_before(rows)


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        (_drop_step, "step 3 is missing: the ledger goes on with step 4"),
        (_drop_first_step, "step 0 is missing: the ledger goes on with step 1"),
        (_double, "step 2: position 72, used before, was used again by rank 0"),
        (_drop_position, "step 2: positions 79 to 79 were used by no rank"),
        (_drop_last_micro_batch, "step 2: it says 96 samples were seen, and 88 were used"),
        (_used_before, "step 4: position 32, used before, was used again by rank 0"),
        (_two_violations, "step 2: positions 79 to 79 were used by no rank"),
    ],
)
def test_the_first_violation_is_named(
    real: Path, tmp_path: Path, change: Callable[[Rows], None], violation: str
) -> None:
    result = verify(tampered(real, tmp_path, change))
    assert result.exit_code == 1
    assert result.output == f"VIOLATION: {violation}\n"


def test_a_step_that_a_recovery_undid_may_come_again(real: Path, tmp_path: Path) -> None:
    def recover(rows: Rows) -> None:
        rows[5:] = rows[5:7] + [{**row, "attempt": 2} for row in rows[5:]]

    assert verify(tampered(real, tmp_path, recover)).exit_code == 0


def test_without_a_ledger_the_command_says_how_to_keep_one(real: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(real, run)
    (run / "ledger.jsonl").unlink()
    result = verify(run)
    assert result.exit_code == 2
    assert "run with ledger: true" in result.stderr


def test_a_ledger_with_a_broken_line_is_refused(real: Path, tmp_path: Path) -> None:
    run = tampered(real, tmp_path, lambda rows: None)
    path = run / "ledger.jsonl"
    path.write_text("not json\n" + path.read_text())
    result = verify(run)
    assert result.exit_code == 2
    assert "line 1 is not JSON" in result.stderr


def test_a_ledger_that_ends_before_training_did_is_a_violation(real: Path, tmp_path: Path) -> None:
    result = verify(tampered(real, tmp_path, lambda rows: rows.pop()))
    assert result.exit_code == 1
    assert "training went on to 640" in result.output


def test_a_step_written_twice_by_one_attempt_is_a_violation(real: Path, tmp_path: Path) -> None:
    result = verify(tampered(real, tmp_path, lambda rows: rows.insert(5, rows[5])))
    assert result.exit_code == 1
    assert "step 5 was written twice by attempt 1" in result.output
