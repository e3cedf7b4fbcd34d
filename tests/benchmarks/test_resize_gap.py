"""How long does training stand still when workers come or go, and what do those who train pay while others warm up?

Run with -s to see the figures. One run grows and shrinks between one and four workers without stopping, another does
the same with ``workers.resize: restart``, which is Ray Train's own way: all workers end, and others go on from a
checkpoint. Both are on one cluster, one after the other.

The gap is the longest time between two consecutive steps, out of those next to a change. The start of interpreters is
left out: without stopping it happens beside training, and of a restart's gap the time is taken off in which the
interpreter of any new worker was starting. What is printed beside it takes off the imports as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.runtime.ledger import verify
from tests.benchmarks.resizing import Process, Taken, Times, operated, order, ray_cluster, settings, warm_up_alone

ROUNDS, RESTART_ROUNDS, LOADS = 10, 2, 5
DOWN_AND_UP = (2, 1, 2, 4)
CHANGES = ((4, 2), (2, 1), (1, 2), (2, 4))
NEAR = 5  # steps on either side of a change
BEFORE = 15  # steps between two changes
LOOKS_EVERY_S = "0.5"  # Ray Train's controller; by default every 2 s, which would make a restart longer


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(4, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=LOOKS_EVERY_S):
        yield


def change_sizes(run: Path, times: Times, rounds: int) -> None:
    times.wait_for(4, steps=BEFORE)
    for _ in range(rounds):
        for size in DOWN_AND_UP:
            order(run, "cap", max_workers=size)
            times.wait_for(size, steps=BEFORE)


def gaps(steps: list[Taken]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """When each longest gap around a change began and ended, by the workers before and after."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = {change: [] for change in CHANGES}
    for i in range(1, len(steps)):
        change = steps[i - 1].world_size, steps[i].world_size
        if change in found:
            near = range(max(1, i - NEAR), min(len(steps), i + NEAR + 1))
            found[change].append(
                max(((steps[k - 1].at_s, steps[k].at_s) for k in near), key=lambda gap: gap[1] - gap[0])
            )
    return found


def without(gap: tuple[float, float], starts: list[tuple[float, float]]) -> float:
    """The length of ``gap`` less all that lies within any of ``starts`` [s]."""
    left, at_s = 0.0, gap[0]
    for begin, end in sorted(starts):
        left += max(0.0, min(begin, gap[1]) - at_s)
        at_s = max(at_s, min(end, gap[1]))
    return left + max(0.0, gap[1] - at_s)


def test_what_is_left_of_a_gap() -> None:
    assert without((10.0, 20.0), []) == 10.0
    assert without((10.0, 20.0), [(5.0, 11.0), (12.0, 15.0), (13.0, 14.0), (14.0, 16.0), (19.0, 30.0)]) == 4.0
    assert without((10.0, 20.0), [(0.0, 5.0), (25.0, 26.0)]) == 10.0


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_nobody_waits_for_those_who_come_or_go(cluster: None, tmp_path: Path) -> None:
    live = operated(
        settings(tmp_path / "live", workers={"resize": "live"}),
        lambda run, times: change_sizes(run, times, ROUNDS),
    )
    restarted = operated(
        settings(tmp_path / "restart", workers={"resize": "restart"}),
        lambda run, times: change_sizes(run, times, RESTART_ROUNDS),
    )
    ours, theirs = gaps(live.of_rank_zero), gaps(restarted.of_rank_zero)
    up = [(one.created_s, one.up_s) for one in restarted.processes]
    imported = [(one.created_s, one.imported_s) for one in restarted.processes]
    start_s = statistics.median(one.up_s - one.created_s for one in restarted.processes)
    print(
        f"\ngap between steps, {ROUNDS} rounds without stopping, {RESTART_ROUNDS} with a restart; "
        f"an interpreter's start, left out: median {start_s:.2f} s"
    )
    for change in CHANGES:
        assert len(ours[change]) == ROUNDS
        assert len(theirs[change]) == RESTART_ROUNDS
        live_s = [end - begin for begin, end in ours[change]]
        whole_s = statistics.median(end - begin for begin, end in theirs[change])
        restart_s = [without(gap, up) for gap in theirs[change]]
        imported_s = statistics.median(without(gap, imported) for gap in theirs[change])
        median_s = statistics.median(live_s)
        ratio = median_s / statistics.median(restart_s)
        print(
            f"{change[0]} to {change[1]} workers: {1e3 * median_s:.0f} ms (worst {1e3 * max(live_s):.0f}) against "
            f"{statistics.median(restart_s):.1f} s (worst {max(restart_s):.1f}; {whole_s:.1f} with interpreters, "
            f"{imported_s:.1f} without imports): ratio 1/{1 / ratio:.0f}, 1/{imported_s / median_s:.0f} without imports"
        )
        assert ratio <= 1 / 8
        assert max(live_s) < 1.0
    for name in ("live", "restart"):
        report = verify(tmp_path / name / "run")
        assert report.violation is None, report.text


def rate(times: Times, window: tuple[float, float]) -> float:
    """Steps per second within it."""
    return sum(window[0] <= one.at_s < window[1] for one in times.of_rank_zero) / (window[1] - window[0])


def warming(processes: list[Process], asked_s: float) -> tuple[float, float]:
    """From when the first of them was there, or was asked for if it was there already, until the last was warm."""
    return max(asked_s, min(one.created_s for one in processes)), max(one.warm_s for one in processes)


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_newcomers_cost_what_any_load_does(cluster: None, tmp_path: Path) -> None:
    import ray

    alone = ray.remote(max_calls=1, num_cpus=1)(warm_up_alone)
    joining: list[tuple[float, float]] = []
    beside: list[tuple[float, float]] = []
    quiet: list[tuple[float, float]] = []

    def operate(run: Path, times: Times) -> None:
        times.wait_for(4, steps=BEFORE)
        for number in range(LOADS):
            order(run, "cap", max_workers=2)
            times.wait_for(2, steps=BEFORE)
            began_s = time.monotonic()
            time.sleep(1.0)
            quiet.append((began_s, time.monotonic()))

            loads = [tmp_path / f"load{number}-{one}" for one in range(2)]
            asked_s = time.monotonic()
            each = [
                settings(load, train={"samples": 32}, workers={"initial": 1, "max": 1}).model_dump(mode="json")
                for load in loads
            ]
            ray.get([alone.remote(one) for one in each])
            beside.append(warming([one for load in loads for one in Times(load).look().processes], asked_s))

            known = len(times.look().processes)
            asked_s = order(run, "cap", max_workers=4)
            times.wait_for(4, steps=BEFORE)
            joining.append(warming(times.processes[known:], asked_s))

    times = operated(settings(tmp_path / "run", workers={"resize": "live"}), operate)
    pairs = [(rate(times, here), rate(times, there)) for here, there in zip(joining, beside, strict=True)]
    ratios = [here / there for here, there in pairs]
    undisturbed = statistics.median(rate(times, window) for window in quiet)
    print(
        f"\nsteps per second of two workers, medians of {LOADS}: {undisturbed:.1f} by themselves, "
        f"{statistics.median(here for here, _ in pairs):.1f} while two newcomers warm up, "
        f"{statistics.median(there for _, there in pairs):.1f} beside two processes that warm up and join nobody; "
        f"paired ratio {statistics.median(ratios):.2f} ({', '.join(f'{one:.2f}' for one in sorted(ratios))})"
    )
    assert len(ratios) == LOADS
    assert statistics.median(ratios) >= 0.8
