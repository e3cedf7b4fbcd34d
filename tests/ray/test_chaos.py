"""Five faults in mid-run on a cluster of several nodes: the run finishes, with the weights of one left in peace."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.chaos import KINDS, check_against_peace, run_in_chaos, schedule


def test_the_schedule_is_repeatable_by_its_seed_and_holds_every_kind() -> None:
    for seed in range(20):
        faults = schedule(seed, rounds=10)
        assert faults == schedule(seed, rounds=10)
        assert [sum(fault.kind == kind for fault in faults) for kind in KINDS] == [10, 10, 10, 5, 5, 5, 5]
        assert [fault.at_samples for fault in faults] == sorted(fault.at_samples for fault in faults)
        nodes = [{"remove": -1, "remove after notice": -1, "add": 1}.get(fault.kind, 0) for fault in faults]
        assert {sum(nodes[:i]) for i in range(len(nodes) + 1)} == {-1, 0}
    assert schedule(1, rounds=1) != schedule(2, rounds=1)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_five_faults_leave_no_trace_in_the_weights(tmp_path: Path) -> None:
    began_s = time.monotonic()
    run = run_in_chaos(tmp_path / "chaos", seed=1, rounds=1)
    print(f"five faults in {time.monotonic() - began_s:.0f} s")
    check_against_peace(run, tmp_path / "peace", rounds=1)
