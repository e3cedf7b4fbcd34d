"""A run whose model has parameters without a gradient so far can be lost and resumed like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.late_expert import MAKERS, trained
from tests.unit.small_runs import events


@pytest.mark.parametrize("saved_at", [4, 6], ids=["before the first use", "after it"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_with_parameters_without_a_gradient_is_the_whole_run(
    tmp_path: Path, name: str, saved_at: int
) -> None:
    whole = trained(0, str(tmp_path / "whole"), name, saved_at, False, False)
    trained(0, str(tmp_path / "parts"), name, saved_at, True, False)
    resumed = trained(0, str(tmp_path / "parts"), name, saved_at, False, True)
    assert [event["step"] for event in events(tmp_path / "parts", "resumed")] == [saved_at]
    assert resumed == whole
    with_state = {key.split(".")[0] for key in whole if key.endswith((".momentum_buffer", ".exp_avg"))}
    assert with_state == {"body", "expert"}  # the unused layer has none, whatever torch made up in between
