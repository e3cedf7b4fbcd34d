"""A run's decisions follow from its record, also where a line does not know all of a step."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.runtime import folder
from orchestrator.runtime.replay import recomputed, recorded
from tests.unit.small_runs import trained


def test_a_step_whose_rank_was_lost_before_it_told_its_part_is_replayed(tmp_path: Path) -> None:
    sections = {
        "train": {"samples": 512},
        "batch": {"initial": 8, "micro_batch": 4, "max": 32},
        "controller": {"policy": "schedule", "ramp": [[64, 16], [200, 32]], "every_samples": 32},
    }
    trained(tmp_path, sections=sections)
    lines = tmp_path / "run" / folder.METRICS
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    rows[3] |= {"loss": None, "grad_sq": None, "trace_cov": None}
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    decided = recorded(tmp_path / "run")
    assert {each.target_batch for each in decided} == {8, 16, 32}
    assert recomputed(tmp_path / "run") == decided
