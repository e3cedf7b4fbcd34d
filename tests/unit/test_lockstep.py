"""All ranks exchange shards in one order: found out in the first pass, played on by who gives up, held to after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from orchestrator.errors import SessionError
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.lockstep import Exchange, Lockstep

GATHERS = [Exchange(kind="gather", unit=unit) for unit in range(3)]
PASS = [*GATHERS, *(Exchange(kind="reduce", unit=unit, length=8) for unit in (2, 1, 0))]


class Threads:
    """The exchanges of ``Collective`` between threads, one a rank."""

    def __init__(self, rank: int, box: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self._box, self._barrier = rank, len(box), box, barrier

    def _all(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(20)
        found = list(self._box)
        self._barrier.wait(20)
        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self._all(values), strict=True)]

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        found = self.sum(values)
        return lambda: found

    def sum_tensor(self, tensor: Tensor) -> None:
        raise NotImplementedError

    def share(self, value: Any) -> Any:
        return self._all(value)[0]

    def gather(self, value: Any) -> list[Any]:
        found = self._all(value)
        return found if self.rank == 0 else []


def play(lockstep: Lockstep, exchanges: Sequence[Exchange], *, gives_up: bool) -> list[Exchange]:
    """One pass of a rank; what it took part in."""
    lockstep.begin_pass()
    done = []
    for exchange in exchanges:
        lockstep.about_to(exchange)
        done.append(exchange)
    if gives_up:
        return done + list(lockstep.rest())
    lockstep.end_pass()
    return done


def on_ranks(work: Sequence[Callable[[Lockstep], Any]]) -> list[Any]:
    """``work`` by rank; its results, or what it raised."""
    box: list[Any] = [None] * len(work)
    barrier, results = threading.Barrier(len(work)), list(box)

    def run(rank: int) -> None:
        try:
            results[rank] = work[rank](Lockstep(Threads(rank, box, barrier)))
        except SessionError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank was left waiting"
    return results


@pytest.mark.parametrize("done", range(len(PASS) + 1))
def test_a_rank_that_gives_up_in_the_first_pass_takes_part_in_all_of_it_and_knows_the_next(done: int) -> None:
    def gives_up(lockstep: Lockstep) -> list[list[Exchange]]:
        first = play(lockstep, PASS[:done], gives_up=True)
        return [first, play(lockstep, PASS[:1], gives_up=True), play(lockstep, PASS, gives_up=False)]

    def goes_on(lockstep: Lockstep) -> list[list[Exchange]]:
        return [play(lockstep, PASS, gives_up=False) for _ in range(3)]

    assert on_ranks([goes_on, gives_up]) == on_ranks([gives_up, goes_on]) == [[PASS] * 3] * 2
    assert on_ranks([gives_up, goes_on, gives_up]) == [[PASS] * 3] * 3


def test_where_all_give_up_in_the_first_pass_the_one_that_came_furthest_says_how_far_and_the_next_finds_out() -> None:
    def gives_up_after(count: int) -> Callable[[Lockstep], list[list[Exchange]]]:
        def run(lockstep: Lockstep) -> list[list[Exchange]]:
            return [play(lockstep, PASS[:count], gives_up=True), play(lockstep, PASS, gives_up=False)]

        return run

    assert on_ranks([gives_up_after(n) for n in (1, 4, 0)]) == [[PASS[:4], PASS]] * 3


def test_ranks_of_different_orders_are_refused_alike() -> None:
    found = on_ranks([lambda own: play(own, PASS, gives_up=False), lambda own: play(own, PASS[::-1], gives_up=False)])
    told = {str(error) for error in found}
    assert len(told) == 1
    assert "the weights of sharded module 0" in told.pop()


def test_a_pass_that_ends_before_the_others_do_is_refused_on_all() -> None:
    shorter = [lambda own: play(own, PASS, gives_up=False), lambda own: play(own, PASS[:-1], gives_up=False)]
    assert [type(error) for error in on_ranks(shorter)] == [SessionError] * 2


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ([PASS[1]], "the weights of sharded module 1 came next, and the weights of sharded module 0 before"),
        ([*PASS, PASS[0]], "the weights of sharded module 0 came next, and nothing more before"),
        (PASS[:4], "a pass ended where a gradient of 8 entries of sharded module 1 came before"),
        ([*PASS[:3], Exchange(kind="reduce", unit=2, length=4)], "a gradient of 4 entries"),
    ],
)
def test_an_order_that_changes_later_is_refused_with_what_came_and_what_was_expected(
    later: list[Exchange], words: str
) -> None:
    lockstep = Lockstep(Solo())
    play(lockstep, PASS, gives_up=False)
    play(lockstep, PASS, gives_up=False)
    with pytest.raises(SessionError, match="write train") as refused:
        play(lockstep, later, gives_up=False)
    assert words in str(refused.value)


def test_what_is_gathered_between_passes_is_no_part_of_one() -> None:
    lockstep = Lockstep(Solo())
    lockstep.about_to(GATHERS[2])
    play(lockstep, PASS, gives_up=False)
    lockstep.about_to(GATHERS[2])
    assert play(lockstep, [], gives_up=True) == PASS
