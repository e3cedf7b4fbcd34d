"""Ranks, as threads, bring their gradients together: the same bits for any number of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from orchestrator.errors import SessionError
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.first_statistics import FirstStatistics, share_tensors
from orchestrator.runtime.pairwise_gradients import PairwiseGradients
from orchestrator.runtime.reproducible_step import ReproducibleStep
from orchestrator.types import BatchPlan

SHAPES = [(3, 2), (5,), ()]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), 1.0, 2.0**24, -(2.0**24)]


class Thread:
    """A rank of a fleet of threads, as a ``Collective``."""

    def __init__(self, rank: int, world_size: int, table: dict[int, Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self._table, self._barrier = rank, world_size, table, barrier

    def _from_all(self, mine: Any) -> list[Any]:
        self._table[self.rank] = mine
        self._barrier.wait(30)
        found = [self._table[rank] for rank in range(self.world_size)]
        self._barrier.wait(30)
        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self._from_all(list(values)), strict=True)]

    def all_to_all(self, tensor: Tensor, *, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        found = [pieces[self.rank].clone() for pieces in self._from_all(tensor.split(list(sends)))]
        assert [len(piece) for piece in found] == list(receives)
        return torch.cat(found)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._from_all(tensor.clone()))

    def broadcast(self, tensor: Tensor) -> None:
        tensor.copy_(self._from_all(tensor.clone())[0])


def fleet(world_size: int, of_rank: Callable[[Any], Any]) -> list[Any]:
    """What ``of_rank(collective)`` returns in each thread."""
    table: dict[int, Any] = {}
    barrier = threading.Barrier(world_size)

    def run(rank: int) -> Any:
        try:
            return of_rank(Thread(rank, world_size, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def gradients(seed: int, number: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Of micro-batch ``number``: of many magnitudes, some special, some missing."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    found: list[Tensor | None] = []
    for shape in SHAPES:
        value = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-30, 30, (), generator=generator)
        for index in range(value.numel()):
            if torch.rand((), generator=generator) < 0.2:
                which = int(torch.randint(len(SPECIAL), (), generator=generator))
                value.view(-1)[index] = SPECIAL[which]
        found.append(None if torch.rand((), generator=generator) < 0.25 else value.to(dtype))
    return found


def summed(collective: Any, plan: BatchPlan, seed: int, dtypes: Sequence[torch.dtype], spoil: int | None = None) -> Any:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for dtype in dtypes for shape in SHAPES]
    total = torch.zeros(4, dtype=torch.float64)
    sums = PairwiseGradients(parameters, totals=[total], collective=collective)
    sums.begin_step(plan)
    for number in plan.run(collective.rank):
        found = [gradient for dtype in dtypes for gradient in gradients(seed, number, dtype)]
        for parameter, gradient in zip(parameters, found, strict=True):
            assert parameter.grad is None
            parameter.grad = gradient
        total += torch.randn(4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        sums.end_micro_batch()
    sums.finish(spoil=spoil == collective.rank)
    return [bits(p.grad) for p in parameters], bits(total)


def bits(tensor: Tensor | None) -> Any:
    """Equal for the same numbers, signs of zero included; one NaN is as good as another."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1)
    return torch.where(flat.isnan(), torch.nan, flat).view(torch.uint8).tolist()


@given(micro_batches=st.integers(1, 13), world_size=st.integers(2, 5), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_any_fleet_has_the_bits_of_one_process(micro_batches: int, world_size: int, seed: int) -> None:
    dtypes = [torch.float32, torch.bfloat16]
    plan = BatchPlan(generation=0, world_size=1, batch=micro_batches, micro_batch=1)
    alone = summed(Solo(), plan, seed, dtypes)
    plan = BatchPlan(generation=0, world_size=world_size, batch=micro_batches, micro_batch=1)
    assert fleet(world_size, lambda collective: summed(collective, plan, seed, dtypes)) == [alone] * world_size


def test_what_one_rank_lacks_spoils_the_step_for_all() -> None:
    plan = BatchPlan(generation=0, world_size=3, batch=7, micro_batch=1)
    found = fleet(3, lambda collective: summed(collective, plan, 1, [torch.float32], 1))
    for parameters, total in found:
        assert parameters == [bits(torch.full(shape, torch.nan)) for shape in SHAPES]
        assert total == bits(torch.full((4,), torch.nan, dtype=torch.float64))


def test_the_sum_has_the_layout_in_memory_that_autograd_gives_a_gradient() -> None:
    def strides(collective: Any) -> Any:
        weight = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
        sums = PairwiseGradients([weight], collective=collective)
        plan = BatchPlan(generation=0, world_size=collective.world_size, batch=2, micro_batch=1)
        sums.begin_step(plan)
        for number in plan.run(collective.rank):
            (weight * torch.arange(96.0).view(2, 3, 4, 4) * (number + 1)).sum().backward()
            sums.end_micro_batch()
        sums.finish(spoil=False)
        assert weight.grad is not None
        return weight.grad.stride(), weight.grad.flatten().tolist()

    alone = strides(Solo())
    assert alone[0] == (48, 1, 12, 3)
    assert alone[1] == [3.0 * i for i in range(96)]
    assert fleet(3, strides) == [alone] * 3


def test_a_sparse_gradient_is_refused_with_what_to_do() -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    sums = PairwiseGradients([weight], collective=Solo())
    sums.begin_step(BatchPlan(generation=0, world_size=1, batch=1, micro_batch=1))
    nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
    with pytest.raises(SessionError, match=r"shape \(3, 2\) is sparse.*sparse=False"):
        sums.end_micro_batch()


def test_running_statistics_are_those_of_the_first_micro_batch_on_any_layout() -> None:
    def counted(collective: Any) -> list[Any]:
        statistic, count = torch.ones(2), torch.tensor(10)
        first = FirstStatistics([statistic, count], collective=collective)
        for step in range(3):
            plan = BatchPlan(generation=0, world_size=collective.world_size, batch=4, micro_batch=1)
            first.begin_step()
            before = statistic.tolist()
            for number in plan.run(collective.rank):
                first.begin_micro_batch()
                assert statistic.tolist() == before  # which a forward pass may read, as it does in a codebook
                statistic *= 0.5
                statistic += number + step
                count += 1
            first.finish()
        return [statistic.tolist(), count.item()]

    expected = [[0.5 * (0.5 * 0.5 + 1) + 2] * 2, 13]
    assert counted(Solo()) == expected
    for world_size in (2, 4, 5):
        assert fleet(world_size, counted) == [expected] * world_size


def test_all_ranks_begin_with_rank_zeros_tensors_of_whatever_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.runtime.first_statistics._MOST_BYTES", 40)

    def shared(collective: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(collective.rank)
        tensors = [
            torch.randn(3, 2, generator=generator).t(),
            torch.tensor(collective.rank == 0),
            torch.randn(5, generator=generator).bfloat16(),
            torch.randn(2, generator=generator, dtype=torch.complex64),
            torch.randint(100, (), generator=generator),
            torch.zeros(0),
            torch.randn(100, generator=generator, dtype=torch.float64),
        ]
        share_tensors(tensors, collective)
        return [tensor.tolist() for tensor in tensors]

    assert fleet(3, shared) == [shared(Solo())] * 3


@pytest.mark.parametrize(
    ("layer", "told"),
    [(nn.SyncBatchNorm(4), "SyncBatchNorm"), (nn.Embedding(3, 2, sparse=True), "sparse gradients")],
)
def test_a_layer_that_cannot_keep_the_promise_is_refused_by_name(layer: nn.Module, told: str) -> None:
    with pytest.raises(SessionError, match=f"^1.*{told}.*train.reproducible"):
        ReproducibleStep(nn.Sequential(nn.Linear(2, 2), layer), totals=[], collective=Solo())


def test_models_of_different_shapes_are_refused_on_all_ranks() -> None:
    def told(collective: Any) -> str:
        try:
            ReproducibleStep(nn.Linear(2, 2 + collective.rank), totals=[], collective=collective)
        except SessionError as error:
            return str(error)
        return ""

    found = fleet(2, told)
    assert found[0] == found[1] != ""
