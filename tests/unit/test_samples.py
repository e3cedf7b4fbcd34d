"""A sample and its random draws are the same however it is read, and one that cannot be read is named."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from orchestrator.core.cursor import Stream, steps
from orchestrator.errors import TaskError
from orchestrator.runtime.loader import PositionLoader
from tests.unit.loading import ANY_CORES, TOTAL, Broken, identity, plan

pytestmark = ANY_CORES


class Drawn:
    """A sample is what the three global generators give."""

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, float, float]:
        return index, torch.rand(3), random.random(), float(np.random.rand())


@pytest.mark.parametrize("loader_workers", [1, 2, 3])
def test_samples_and_their_draws_do_not_depend_on_loader_processes(loader_workers: int) -> None:
    plans = [plan(8, 4), plan(12, 5)]

    def batches(workers: int) -> list[list[torch.Tensor]]:
        loader = PositionLoader(
            Drawn(), index_of=Stream(size=20, seed=3).indices, seed=7, loader_workers=workers, prefetch=1
        )
        taken, position = [], 0
        for now in plans:
            loader.set_course(steps(now, 0, position=position, total_samples=TOTAL))
            for _ in range(2):
                taken += [loader.take(position + offset, size) for offset, size in now.spans(0)]
                position += now.batch
        loader.close()
        return taken

    for here, there in zip(batches(0), batches(loader_workers), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_draws_belong_to_seed_and_position_and_not_to_the_cut() -> None:
    def draws(seed: int, spans: list[tuple[int, int]]) -> torch.Tensor:
        loader = PositionLoader(Drawn(), index_of=lambda p: p % 2, seed=seed)
        return torch.cat([torch.column_stack(loader.take(*span)[1:]) for span in spans])

    whole = draws(1, [(0, 8)])
    assert torch.equal(whole, draws(1, [(0, 3), (3, 5)]))
    assert torch.equal(whole[5:], draws(1, [(5, 3)]))
    assert not torch.isclose(whole, draws(2, [(0, 8)])).any()
    assert len(whole.unique()) == whole.numel(), "positions and generators draw apart, also for the same index"


class Raw:
    """The lowest 16 bits that torch's and numpy's Mersenne twisters give; equal for equal seeds."""

    def __getitem__(self, index: int) -> tuple[int, int]:
        return int(torch.randint(0, 2**16, ())), int(np.random.randint(0, 2**16, dtype=np.uint32))


def test_torch_and_numpy_do_not_draw_alike() -> None:
    from_torch, from_numpy = PositionLoader(Raw(), index_of=identity, seed=0).take(0, 64)
    assert not (from_torch == from_numpy).any()


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_the_callers_generators_are_left_as_found(loader_workers: int) -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    wanted = (torch.rand(1), np.random.rand(), random.random())
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    loader = PositionLoader(Drawn(), index_of=identity, seed=0, loader_workers=loader_workers)
    loader.set_course([(0, 4), (4, 4)])
    loader.take(0, 4)
    loader.close()
    assert (torch.rand(1), np.random.rand(), random.random()) == wanted


def test_the_callers_generators_are_left_as_found_after_a_failure_too() -> None:
    state = torch.get_rng_state()
    with pytest.raises(TaskError):
        PositionLoader(Broken(0, ValueError()), index_of=identity, seed=0).take(0, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_seeding_draws_come_from_the_callers_generators() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    loader = PositionLoader(Drawn(), index_of=identity, seed=0, seed_each_sample=False)
    assert torch.equal(loader.take(0, 1)[1][0], wanted)


class Together:
    calls: list[list[int]]

    def __init__(self, *, answers: int | None = None) -> None:
        self.answers = answers
        self.calls = []

    def __getitem__(self, index: int) -> int:
        raise AssertionError(f"asked for {index} alone")

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.calls.append(indices)
        return indices[: self.answers]


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_samples_are_asked_for_together_where_the_data_set_can_and_nothing_is_seeded(loader_workers: int) -> None:
    dataset = Together()
    loader = PositionLoader(
        dataset, index_of=lambda p: 9 - p, seed=0, loader_workers=loader_workers, seed_each_sample=False
    )
    loader.set_course([(0, 4)])
    assert loader.take(0, 4).tolist() == [9, 8, 7, 6]
    loader.close()
    assert dataset.calls == ([[9, 8, 7, 6]] if loader_workers == 0 else [])  # in the process it is another copy


def test_too_few_samples_at_once_are_an_error() -> None:
    loader = PositionLoader(Together(answers=3), index_of=identity, seed=0, seed_each_sample=False)
    with pytest.raises(TaskError, match=r"positions 0, 1, 2, 3 .*asked for 4 samples and gave 3"):
        loader.take(0, 4)


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named_with_position_and_index(loader_workers: int) -> None:
    stream = Stream(size=50, seed=5)
    bad = int(stream.indices(np.array([13]))[0])
    loader = PositionLoader(
        Broken(bad, KeyError("no such file")), index_of=stream.indices, seed=0, loader_workers=loader_workers
    )
    loader.set_course([(0, 8), (8, 8)])
    assert len(loader.take(0, 8)) == 8, "what was read ahead fails only when it is wanted"
    with pytest.raises(TaskError, match=rf"position 13 \(dataset index {bad}\).*KeyError.*no such file") as caught:
        loader.take(8, 8)
    loader.close()
    assert isinstance(caught.value.__cause__, KeyError)
    if loader_workers:
        assert "in __getitem__" in str(caught.value.__cause__.__cause__), "the process's traceback is shown"
