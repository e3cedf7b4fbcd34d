"""Plans against brute force: the list follows from batch and micro-batch, the runs differ by at most one."""

import pytest
from hypothesis import given, strategies as st

from orchestrator.core.planner import WorkerLimits, make_plan, useful_workers
from orchestrator.types import BatchPlan

batches, micros, worlds = st.integers(1, 300), st.integers(1, 64), st.integers(1, 12)


@given(batches, micros, worlds, st.booleans())
def test_a_plan_holds_exactly_its_batch_within_the_memory_limit(b: int, m: int, world: int, measurable: bool) -> None:
    plan = make_plan(b, world_size=world, micro_batch=m, generation=0, measurable=measurable)
    assert sum(plan.sizes) == b
    assert max(plan.sizes) <= m
    assert len(set(plan.sizes[:-1])) <= 1
    assert plan.sizes[-1] <= plan.sizes[0]
    assert len(plan.sizes) == plan.num_micro_batches


@given(batches, micros, worlds, worlds)
def test_the_micro_batch_list_does_not_depend_on_the_workers(b: int, m: int, one: int, other: int) -> None:
    sizes = {make_plan(b, world_size=w, micro_batch=m, generation=0, measurable=True).sizes for w in (one, other)}
    assert len(sizes) == 1


@given(batches, micros, worlds)
def test_runs_are_contiguous_and_differ_by_at_most_one(b: int, m: int, world: int) -> None:
    plan = make_plan(b, world_size=world, micro_batch=m, generation=0, measurable=True)
    runs = [plan.run(rank) for rank in range(world)]
    assert [i for run in runs for i in run] == list(range(plan.num_micro_batches))
    lengths = [len(run) for run in runs]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)
    assert plan.accum_steps == max(lengths)


@given(st.integers(2, 300), micros, worlds)
def test_a_plan_that_is_measured_has_two_micro_batches(b: int, m: int, world: int) -> None:
    assert make_plan(b, world_size=world, micro_batch=m, generation=0, measurable=True).num_micro_batches >= 2


@given(batches, micros, worlds)
def test_a_plan_that_need_not_be_measured_keeps_the_users_micro_batch(b: int, m: int, world: int) -> None:
    plan = make_plan(b, world_size=world, micro_batch=m, generation=0, measurable=False)
    assert plan.micro_batch == min(m, b)


def test_the_designs_example() -> None:
    plan = BatchPlan(generation=0, world_size=3, batch=64, micro_batch=8)
    assert [len(plan.run(rank)) for rank in range(3)] == [3, 3, 2]
    assert plan.spans(2) == ((48, 8), (56, 8))


def test_a_rank_may_have_nothing_to_do() -> None:
    plan = BatchPlan(generation=0, world_size=4, batch=10, micro_batch=8)
    assert [plan.spans(rank) for rank in range(4)] == [((0, 8),), ((8, 2),), (), ()]


@given(st.integers(1, 2000), micros, st.integers(1, 5), st.integers(1, 8), st.integers(1, 4))
def test_useful_workers_is_the_most_that_brute_force_finds(b: int, m: int, low: int, more: int, each: int) -> None:
    limits = WorkerLimits(minimum=low, maximum=low + more, micro_batches_each=each)
    fed = [n for n in range(low, low + more + 1) if n * each * m <= b]
    assert useful_workers(b, micro_batch=m, limits=limits) == (max(fed) if fed else low)


def test_impossible_plans_and_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch <= batch"):
        BatchPlan(generation=0, world_size=1, batch=4, micro_batch=5)
    with pytest.raises(ValueError, match="outside the plan"):
        BatchPlan(generation=0, world_size=2, batch=4, micro_batch=2).run(2)
    with pytest.raises(ValueError, match=r"workers\.min"):
        WorkerLimits(minimum=3, maximum=2, micro_batches_each=1)
