"""What was read ahead is used after a change of plan, off the course nothing hangs, and a lost process is an error."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.cursor import steps
from orchestrator.errors import GroundswellError
from orchestrator.runtime.loader import PositionLoader
from tests.unit.loading import ANY_CORES, TOTAL, Counted, identity, plan

pytestmark = ANY_CORES


def test_a_plan_change_uses_what_was_read_for_the_old_plan(tmp_path: Path) -> None:
    dataset = Counted(tmp_path / "reads")
    loader = PositionLoader(dataset, index_of=identity, seed=0, loader_workers=2, prefetch=4)
    loader.set_course(steps(plan(8, 4), 0, position=0, total_samples=TOTAL))
    loader.take(0, 4)  # two processes, four micro-batches of four each: 32 to 36 samples are read or being read
    loader.set_course([(4, 28)])

    assert loader.take(4, 28).tolist() == list(range(4, 32))
    loader.close()
    assert set(dataset.reads().values()) == {1}


def test_a_course_that_ended_may_be_followed_by_another() -> None:
    loader = PositionLoader(list(range(100)), index_of=identity, seed=0, loader_workers=2)
    loader.set_course([(0, 4)])
    loader.take(0, 4)
    loader.set_course([])
    loader.set_course([(4, 4), (8, 50)])
    assert loader.take(4, 4).tolist() == [4, 5, 6, 7]
    assert loader.take(8, 50).tolist() == list(range(8, 58))
    loader.close()


@pytest.mark.parametrize(("course", "span"), [([(0, 4)], (4, 4)), ([(0, 4), (8, 4)], (4, 4)), ([], (0, 1))])
def test_a_span_off_the_course_is_refused_and_no_hang(course: list[tuple[int, int]], span: tuple[int, int]) -> None:
    loader = PositionLoader(list(range(100)), index_of=identity, seed=0, loader_workers=1)
    loader.set_course(course)
    with pytest.raises(ValueError, match="not on the course"):
        loader.take(*span)
    loader.close()


def test_a_span_off_the_course_may_be_read_here_and_now_and_the_course_goes_on() -> None:
    loader = PositionLoader(list(range(100)), index_of=identity, seed=0, loader_workers=1)
    loader.set_course([(0, 4), (4, 4)])
    assert loader.take(0, 4).tolist() == [0, 1, 2, 3]
    assert loader.take(0, 4, off_course=True).tolist() == [0, 1, 2, 3]
    assert loader.take(4, 4).tolist() == [4, 5, 6, 7]
    loader.close()


@pytest.mark.parametrize("course", [[(0, 4), (2, 4)], [(0, 4), (4, 0)]])
def test_a_course_that_does_not_rise_is_refused(course: list[tuple[int, int]]) -> None:
    loader = PositionLoader(list(range(100)), index_of=identity, seed=0, loader_workers=1)
    with pytest.raises(ValueError, match="must rise"):
        loader.set_course(course)
    loader.close()


def test_an_endless_course_is_drawn_from_only_as_needed() -> None:
    drawn = []

    def course() -> Iterator[tuple[int, int]]:
        for number in range(10**9):
            drawn.append(number)
            yield 4 * number, 4

    loader = PositionLoader(range(10**6), index_of=identity, seed=0, loader_workers=2, prefetch=2)
    loader.set_course(course())
    for number in range(10):
        loader.take(4 * number, 4)
    loader.close()
    assert max(drawn) <= 10 + 2 * 2


def test_what_a_rank_no_longer_wants_is_let_go() -> None:
    loader = PositionLoader(list(range(100)), index_of=identity, seed=0, loader_workers=1, prefetch=4)
    loader.set_course([(0, 4), (4, 4), (8, 4), (12, 4), (16, 4)])
    loader.take(0, 4)
    loader.set_course([(16, 8), (24, 4)])  # another rank has what lies between
    loader.take(16, 8)
    loader.take(24, 4)
    with pytest.raises(ValueError, match="not on the course"):
        loader.take(8, 4)
    loader.close()


class Deadly:
    def __getitem__(self, index: int) -> int:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_loader_process_raises() -> None:
    loader = PositionLoader(Deadly(), index_of=identity, seed=0, loader_workers=1, prefetch=1)
    loader.set_course([(4, 4)])
    # Usually ours; torch's own where its signal handler is quicker.
    with pytest.raises((GroundswellError, RuntimeError), match="DataLoader worker"):
        loader.take(4, 4)
    loader.close()


def test_close_ends_the_loader_processes() -> None:
    class Pid:
        def __getitem__(self, index: int) -> int:
            return os.getpid()

    loader = PositionLoader(Pid(), index_of=identity, seed=0, loader_workers=2)
    loader.set_course([(0, 1), (1, 1)])
    pids = {int(loader.take(0, 1)), int(loader.take(1, 1))}
    assert len(pids) == 2
    loader.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
