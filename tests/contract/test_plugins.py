"""What is not built in goes through the same suites, by the options of ``conftest``: it passes, or it is found out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.contract.example_plugins"


def contract(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/contract", "-k", "example_plugins", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_ten_lines_of_ones_own_pass_the_suites() -> None:
    options = ("--policy", "half"), ("--rule", "cube_root"), ("--estimator", "plain"), ("--optimizer", "SignSGD")
    result = contract(*(word for kind, name in options for word in (kind, f"{HERE}:{name}")))
    assert result.returncode == 0, result.stdout
    passed = int(result.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1])
    assert passed >= 20, result.stdout


@pytest.mark.parametrize(
    ("option", "name", "caught_by"),
    [
        ("--policy", "bold", "test_without_a_signal_the_batch_is_kept"),
        ("--rule", "beyond", "test_rules_lie_between_one_and_the_ratio"),
        ("--estimator", "doubled", "test_readings_are_unbiased"),
        ("--optimizer", "Tidy", "test_gradients_are_left_as_they_are"),
    ],
)
def test_one_that_breaks_a_promise_is_found_out(option: str, name: str, caught_by: str) -> None:
    result = contract(option, f"{HERE}:{name}")
    assert result.returncode == 1, result.stdout
    assert f"FAILED tests/contract/test_{option[2:].removesuffix('y')}" in result.stdout
    assert caught_by in result.stdout
