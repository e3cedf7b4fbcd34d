"""Parameters without a gradient so far are no hindrance to losing and resuming a run on several ranks either."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import run_fleet
from tests.unit.late_expert import trained
from tests.unit.small_runs import events


@pytest.mark.dist
def test_two_ranks_resume_before_the_first_use_of_a_parameter(tmp_path: Path) -> None:
    whole = run_fleet(trained, 2, str(tmp_path / "whole"), "adamw", 4, False, False)
    run_fleet(trained, 2, str(tmp_path / "parts"), "adamw", 4, True, False)
    resumed = run_fleet(trained, 2, str(tmp_path / "parts"), "adamw", 4, False, True)
    assert [event["step"] for event in events(tmp_path / "parts", "resumed")] == [4]
    assert resumed == whole
    assert resumed[0] == resumed[1]
    assert any(key.startswith("expert.weight.") for key in whole[0])
    assert not any(key.startswith("unused.weight.") for key in whole[0])
