"""The sample stream: every epoch is a permutation, and a plan's shares cover a step exactly."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.core.cursor import Stream, last_plan, steps
from orchestrator.core.planner import make_plan


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50))
@settings(deadline=None, max_examples=60)
def test_each_epoch_is_a_permutation_of_the_data_set(size: int, seed: int, epoch: int) -> None:
    found = Stream(size=size, seed=seed).indices(np.arange(epoch * size, (epoch + 1) * size))
    assert np.array_equal(np.sort(found), np.arange(size))


def test_one_position_of_a_huge_stream_is_computed_without_the_rest() -> None:
    stream = Stream(size=10**12, seed=3)
    positions = [0, 1, 10**12 - 1, 5 * 10**12]
    found = stream.indices(positions)
    assert len(set(found.tolist())) == 4
    assert all(0 <= index < 10**12 for index in found)
    assert [int(stream.indices([p])[0]) for p in positions] == found.tolist()


def test_epochs_and_seeds_shuffle_differently() -> None:
    first, second = (Stream(size=500, seed=0).indices(np.arange(e * 500, (e + 1) * 500)) for e in (0, 1))
    other = Stream(size=500, seed=1).indices(np.arange(500))
    assert np.mean(first == second) < 0.02
    assert np.mean(first == other) < 0.02


def test_the_shuffle_is_uniform_enough() -> None:
    # Where sample 0 lands over many seeds: chi-square over 10 bins, 9 degrees, 99.9 % quantile 27.9.
    size, draws = 100, 1000
    where = [int(np.flatnonzero(Stream(size=size, seed=s).indices(np.arange(size)) == 0)[0]) for s in range(draws)]
    counts = np.bincount(np.array(where) // 10, minlength=10)
    assert float(np.sum((counts - draws / 10) ** 2 / (draws / 10))) < 27.9


def test_neighbours_are_not_correlated() -> None:
    found = Stream(size=5000, seed=7).indices(np.arange(5000)).astype(float)
    # The lag-one correlation of a random permutation has a standard deviation of 1/sqrt(n) = .014; five of them.
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.07


def test_negative_positions_and_empty_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="start at 0"):
        Stream(size=5, seed=0).indices([-1])
    with pytest.raises(ValueError, match="at least one sample"):
        Stream(size=0, seed=0)


@given(
    batch=st.integers(1, 60), micro=st.integers(1, 20), world=st.integers(1, 7), total=st.integers(1, 400),
    start=st.integers(0, 200),
)  # fmt: skip
@settings(deadline=None)
def test_the_ranks_together_take_every_position_once_to_the_end(
    batch: int, micro: int, world: int, total: int, start: int
) -> None:
    plan = make_plan(batch, world_size=world, micro_batch=micro, generation=0, measurable=False)
    taken = [
        position
        for rank in range(world)
        for first, size in steps(plan, rank, position=start, total_samples=total)
        for position in range(first, first + size)
    ]
    assert sorted(taken) == list(range(start, total))


def test_the_last_step_is_cut_to_what_is_left() -> None:
    plan = make_plan(32, world_size=2, micro_batch=8, generation=4, measurable=True)
    assert last_plan(plan, remaining=40) is plan
    cut = last_plan(plan, remaining=11)
    assert (cut.batch, cut.sizes, cut.generation) == (11, (8, 3), 4)


@given(size=st.integers(1, 9000), first=st.integers(0, 30000), count=st.integers(1, 500), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_a_short_run_of_positions_is_what_the_whole_stream_says(size: int, first: int, count: int, seed: int) -> None:
    stream, positions = Stream(size=size, seed=seed), np.arange(first, first + count)
    whole = stream.indices(np.arange(0, 31000))
    assert np.array_equal(stream.indices(positions), whole[first : first + count])
    assert np.array_equal(stream.indices(positions[::-1]), whole[first : first + count][::-1])
