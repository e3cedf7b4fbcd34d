"""Fifty faults by seed, at least ten each of kills, hangs, nodes that go and nodes that come: the weights are those of
a run left in peace.

Run with -s to see the schedule and what became of each fault.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import check_against_peace, run_in_chaos


@pytest.mark.benchmark
@pytest.mark.ray
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [7])
def test_fifty_faults_leave_no_trace_in_the_weights(tmp_path: Path, seed: int) -> None:
    run = run_in_chaos(tmp_path / "chaos", seed=seed, rounds=10)
    check_against_peace(run, tmp_path / "peace", rounds=10)
