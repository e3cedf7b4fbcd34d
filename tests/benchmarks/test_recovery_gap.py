"""How long until the others have taken a step, when one of three workers is killed?

Run with -s to see the figures. One run loses a worker ten times, each rank in turn, and gets a replacement each time.
Counted from the signal until a whole step was begun and taken by the two that are left.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import time
from collections import Counter
from pathlib import Path

import pytest

from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify
from tests.benchmarks.resizing import MICRO, Times, operated, ray_cluster, settings

KILLS = 10
RESTARTS = 3
EVERY = 20  # steps from checkpoint to checkpoint, where nobody is left
SURELY_OVER_S = 1.0  # after a kill, what was taken before it is written down


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_the_others_go_on_at_once(tmp_path: Path) -> None:
    killed: list[tuple[int, float]] = []
    moment = random.Random(0)

    def operate(run: Path, times: Times) -> None:
        for number in range(KILLS):
            times.wait_for(3, steps=15)
            time.sleep(moment.uniform(0.0, 0.2))  # anywhere within a step
            rank = number % 3
            pid = times.pid_of(rank)
            killed.append((rank, time.monotonic()))
            os.kill(pid, signal.SIGKILL)
            times.wait_for(2, steps=5)
        times.wait_for(3, steps=15)

    workers = {"resize": "live", "initial": 3, "max": 3}
    batch = {"initial": 6 * MICRO, "micro_batch": MICRO, "max": 6 * MICRO}
    with ray_cluster(4):
        times = operated(settings(tmp_path, workers=workers, batch=batch), operate)

    by_two = [one for one in times.of_rank_zero if one.world_size == 2]
    took = [min(one.at_s for one in by_two if one.at_s > at_s) - at_s for _, at_s in killed]
    for rank in range(3):
        of_rank = [took[i] for i, (lost, _) in enumerate(killed) if lost == rank]
        print(f"\nrank {rank} killed: " + ", ".join(f"{one:.2f}" for one in of_rank) + " s", end="")
    again = sum(count > 1 for count in Counter(times.begun).values())
    print(
        f"\nfrom the kill of one of three to the next step taken: median {statistics.median(took):.2f} s, "
        f"worst {max(took):.2f} s of {KILLS}"
    )
    assert statistics.median(took) < 2.0
    assert max(took) < 5.0

    report = verify(tmp_path / "run")
    assert report.violation is None, report.text
    resumed = [row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "resumed"]
    assert not any(row["checkpoint"] for row in resumed), "no checkpoint was needed"
    # Two are left of each broken step, and they alone have begun it twice.
    assert again <= 2 * KILLS


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_where_nobody_is_left_the_run_goes_on_from_its_checkpoint_soon(tmp_path: Path) -> None:
    killed: list[float] = []

    def operate(run: Path, times: Times) -> None:
        since_s = 0.0
        for _ in range(RESTARTS):
            times.wait_for_more(2 * EVERY, since_s=since_s)
            pids = [times.pid_of(rank) for rank in range(2)]
            killed.append(time.monotonic())
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # it went with the one before
                    os.kill(pid, signal.SIGKILL)
            since_s = killed[-1] + SURELY_OVER_S
        times.wait_for_more(2 * EVERY, since_s=since_s)

    workers = {"resize": "live", "initial": 2, "max": 2}
    batch = {"initial": 2 * MICRO, "micro_batch": MICRO, "max": 2 * MICRO}
    every = {"every_samples": EVERY * 2 * MICRO}
    with ray_cluster(4):
        times = operated(settings(tmp_path, workers=workers, batch=batch, checkpoint=every), operate)
    took = [min(one.at_s for one in times.of_rank_zero if one.at_s > at_s + SURELY_OVER_S) - at_s for at_s in killed]
    print(f"\nfrom the kill of all to the next step taken: {', '.join(f'{one:.1f}' for one in took)} s")
    assert max(took) < 20.0
    report = verify(tmp_path / "run")
    assert report.violation is None, report.text
    resumed = [row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "resumed"]
    assert sum(bool(row["checkpoint"]) for row in resumed) == RESTARTS
