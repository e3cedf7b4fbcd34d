"""A run that was stopped, in copies to be damaged, and the same run undisturbed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.small_runs import readings_of, saved_steps, trained


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped with the checkpoints of steps 4, 6 and 7."""
    path = tmp_path_factory.mktemp("stopped")
    trained(path, stop_in_step=6)
    assert saved_steps(path) == [4, 6, 7]
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The readings of that run when nothing stops it."""
    path = tmp_path_factory.mktemp("whole")
    trained(path)
    return readings_of(path)


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"
