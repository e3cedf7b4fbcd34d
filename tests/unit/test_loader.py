"""Every rank gets its share of the stream's samples under any plans, and none is read twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from orchestrator.core.cursor import steps
from orchestrator.errors import TaskError
from orchestrator.runtime.loader import PositionLoader
from orchestrator.types import BatchPlan
from tests.unit.loading import ANY_CORES, TOTAL, Counted, identity, plan

pytestmark = ANY_CORES


def drive(loader: PositionLoader, plans: list[BatchPlan], *, rank: int = 0, steps_each: int = 3) -> list[list[int]]:
    """Take ``steps_each`` steps under each plan, as a session does; the micro-batches' samples."""
    position, taken = 0, []
    for now in plans:
        loader.set_course(steps(now, rank, position=position, total_samples=TOTAL))
        for _ in range(steps_each):
            taken += [loader.take(position + offset, size).tolist() for offset, size in now.spans(rank)]
            position += now.batch
    return taken


def expected(plans: list[BatchPlan], *, rank: int = 0, steps_each: int = 3) -> list[list[int]]:
    position, wanted = 0, []
    for now in plans:
        for _ in range(steps_each):
            wanted += [list(range(position + o, position + o + n)) for o, n in now.spans(rank)]
            position += now.batch
    return wanted


CHANGES = {
    "growth": [plan(8, 4), plan(16, 4), plan(64, 8)],
    "shrink": [plan(48, 16), plan(16, 16), plan(4, 2)],
    "other cuts": [plan(24, 8), plan(24, 5), plan(24, 24), plan(23, 7)],
    "other share": [plan(24, 4, world_size=3), plan(30, 4, world_size=3), plan(8, 4, world_size=3), plan(12, 2)],
}


@pytest.mark.parametrize("loader_workers", [0, 2])
@pytest.mark.parametrize("plans", CHANGES.values(), ids=CHANGES)
def test_samples_read_ahead_survive_a_plan_change_and_none_is_read_twice(
    plans: list[BatchPlan], loader_workers: int, tmp_path: Path
) -> None:
    dataset = Counted(tmp_path / "reads")
    loader = PositionLoader(dataset, index_of=identity, seed=0, loader_workers=loader_workers, prefetch=3)

    assert drive(loader, plans) == expected(plans)
    loader.close()

    reads = dataset.reads()
    taken = [index for batch in expected(plans) for index in batch]
    assert set(reads.values()) == {1}
    assert set(taken) <= set(reads)
    if loader_workers == 0:
        assert set(reads) == set(taken)


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_plans_give_every_rank_its_share(cuts: list[tuple[int, int, int]], data: st.DataObject) -> None:
    world_size = max(world for _, _, world in cuts)
    plans = [plan(batch, min(micro, batch), world_size=world_size) for batch, micro, _ in cuts]
    rank = data.draw(st.integers(0, world_size - 1))
    loader = PositionLoader(range(10**6), index_of=identity, seed=0)
    assert drive(loader, plans, rank=rank, steps_each=2) == expected(plans, rank=rank, steps_each=2)


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_step_begun_anew_gets_its_samples_again(loader_workers: int) -> None:
    loader = PositionLoader(list(range(100)), index_of=identity, seed=0, loader_workers=loader_workers)
    loader.set_course(steps(plan(16, 8), 0, position=0, total_samples=TOTAL))
    loader.take(0, 8)
    loader.set_course(steps(plan(16, 4), 0, position=0, total_samples=TOTAL))  # memory ran out

    assert [loader.take(p, 4).tolist() for p in (0, 4, 8, 12)] == [list(range(p, p + 4)) for p in (0, 4, 8, 12)]
    loader.close()


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_samples_that_make_no_batch_are_named(loader_workers: int) -> None:
    loader = PositionLoader(
        [torch.zeros(2), torch.zeros(3)], index_of=lambda p: 1 - p, seed=0, loader_workers=loader_workers
    )
    loader.set_course([(0, 2)])
    with pytest.raises(TaskError, match=r"positions 0, 1 \(dataset indices 1, 0\)"):
        loader.take(0, 2)
    loader.close()


@pytest.mark.parametrize(("loader_workers", "prefetch"), [(-1, 2), (1, 0)])
def test_impossible_settings_are_refused(loader_workers: int, prefetch: int) -> None:
    with pytest.raises(ValueError, match="loader_workers"):
        PositionLoader([1], index_of=identity, seed=0, loader_workers=loader_workers, prefetch=prefetch)


def test_an_empty_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        PositionLoader([1], index_of=identity, seed=0).take(3, 0)
