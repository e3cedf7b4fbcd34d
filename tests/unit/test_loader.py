"""The stream's samples are the same however they are read, are read once, and a failure names the sample."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from orchestrator.core.cursor import Stream, steps
from orchestrator.errors import GroundswellError, TaskError
from orchestrator.runtime.loader import PositionLoader, move
from orchestrator.types import BatchPlan

# The machine's cores are torch's concern; what is promised holds for any number of processes.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

TOTAL = 10**9  # samples; a run longer than any test


def identity(positions: np.ndarray) -> np.ndarray:
    return positions


class Counted:
    """Sample ``i`` is ``i``; every read in any process adds a line to a file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.log.open("ab", buffering=0) as file:
            file.write(b"%d\n" % index)
        return torch.tensor(index)

    def reads(self) -> Counter[int]:
        return Counter(int(line) for line in self.log.read_text().split())


class Drawn:
    """A sample is what the three global generators give."""

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, float, float]:
        return index, torch.rand(3), random.random(), float(np.random.rand())


class Broken:
    def __init__(self, bad: int, error: Exception) -> None:
        self.bad = bad
        self.error = error

    def __getitem__(self, index: int) -> int:
        if index == self.bad:
            raise self.error
        return index


class AwkwardError(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def plan(batch: int, micro_batch: int, *, world_size: int = 1) -> BatchPlan:
    return BatchPlan(generation=0, world_size=world_size, batch=batch, micro_batch=micro_batch)


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


def test_a_plan_change_uses_what_was_read_for_the_old_plan(tmp_path: Path) -> None:
    dataset = Counted(tmp_path / "reads")
    loader = PositionLoader(dataset, index_of=identity, seed=0, loader_workers=2, prefetch=4)
    loader.set_course(steps(plan(8, 4), 0, position=0, total_samples=TOTAL))
    loader.take(0, 4)  # two processes, four micro-batches of four each: 32 to 36 samples are read or being read
    loader.set_course([(4, 28)])

    assert loader.take(4, 28).tolist() == list(range(4, 32))
    loader.close()
    assert set(dataset.reads().values()) == {1}


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_step_begun_anew_gets_its_samples_again(loader_workers: int) -> None:
    loader = PositionLoader(list(range(100)), index_of=identity, seed=0, loader_workers=loader_workers)
    loader.set_course(steps(plan(16, 8), 0, position=0, total_samples=TOTAL))
    loader.take(0, 8)
    loader.set_course(steps(plan(16, 4), 0, position=0, total_samples=TOTAL))  # memory ran out

    assert [loader.take(p, 4).tolist() for p in (0, 4, 8, 12)] == [list(range(p, p + 4)) for p in (0, 4, 8, 12)]
    loader.close()


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


# The same samples and the same draws, whoever reads


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


@dataclass
class Pair:
    left: torch.Tensor
    right: Any


SHAPES: list[Any] = [
    torch.arange(6.0).view(2, 3).t(),  # not contiguous
    torch.tensor(3.5),
    torch.empty(0, 4),
    torch.arange(3, dtype=torch.bfloat16),
    torch.ones(2, dtype=torch.complex64).conj(),
    torch.eye(3).to_sparse(),
    torch.arange(40)[7:9],  # a small view of a larger tensor
    torch.ones(2, requires_grad=True),
    np.arange(4, dtype=np.float64),
    np.array(["a", "bc"]),
    {"text": "words", "pair": Pair(torch.zeros(2), [1, None, (2.0, b"x")])},
]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("sample", SHAPES, ids=lambda sample: type(sample).__name__)
def test_a_sample_comes_back_from_a_loader_process_as_it_was(sample: Any) -> None:
    loader = PositionLoader([sample, sample], list, index_of=identity, seed=0, loader_workers=1)
    loader.set_course([(0, 2)])
    first, second = loader.take(0, 2)
    loader.close()
    for got in (first, second):
        assert type(got) is type(sample)
        if isinstance(sample, torch.Tensor):
            assert got.dtype == sample.dtype
            assert got.shape == sample.shape
            assert got.requires_grad == sample.requires_grad
            assert torch.equal(got.to_dense(), sample.to_dense())
            if sample.layout is torch.strided and not sample.requires_grad:
                got.zero_()  # a transform may work in place
        else:
            assert repr(got) == repr(sample)


def test_many_samples_read_ahead_do_not_use_up_file_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("no /proc here")
    loader = PositionLoader([torch.zeros(4)] * 4096, list, index_of=identity, seed=0, loader_workers=1, prefetch=2)
    loader.set_course([(p, 512) for p in range(0, 4096, 512)])
    held = loader.take(0, 512)
    during = len(os.listdir("/proc/self/fd"))
    loader.close()
    assert len(held) == 512
    assert during - before < 64


# Failures


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


@pytest.mark.parametrize("error", [AwkwardError("a", "b"), StopIteration(), RuntimeError("x"), OSError(2, "gone")])
def test_any_exception_crosses_from_a_loader_process(error: Exception) -> None:
    loader = PositionLoader(Broken(0, error), index_of=identity, seed=0, loader_workers=1)
    loader.set_course([(0, 1)])
    with pytest.raises(TaskError, match=type(error).__name__):
        loader.take(0, 1)
    loader.close()


def test_a_sample_that_cannot_be_sent_is_an_error() -> None:
    loader = PositionLoader([lambda: None], list, index_of=identity, seed=0, loader_workers=1)
    loader.set_course([(0, 1)])
    with pytest.raises(TaskError, match=r"position 0 .*loader_workers: 0"):
        loader.take(0, 1)
    loader.close()


def test_the_callers_generators_are_left_as_found_after_a_failure_too() -> None:
    state = torch.get_rng_state()
    with pytest.raises(TaskError):
        PositionLoader(Broken(0, ValueError()), index_of=identity, seed=0).take(0, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_samples_that_make_no_batch_are_named(loader_workers: int) -> None:
    loader = PositionLoader(
        [torch.zeros(2), torch.zeros(3)], index_of=lambda p: 1 - p, seed=0, loader_workers=loader_workers
    )
    loader.set_course([(0, 2)])
    with pytest.raises(TaskError, match=r"positions 0, 1 \(dataset indices 1, 0\)"):
        loader.take(0, 2)
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


@pytest.mark.parametrize(("loader_workers", "prefetch"), [(-1, 2), (1, 0)])
def test_impossible_settings_are_refused(loader_workers: int, prefetch: int) -> None:
    with pytest.raises(ValueError, match="loader_workers"):
        PositionLoader([1], index_of=identity, seed=0, loader_workers=loader_workers, prefetch=prefetch)


def test_an_empty_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        PositionLoader([1], index_of=identity, seed=0).take(3, 0)


# Moving a batch


Named = namedtuple("Named", "x y")


class OwnTo:
    def __init__(self, where: str) -> None:
        self.where = where

    def to(self, device: Any) -> OwnTo:
        return OwnTo(str(device))


def test_move_looks_inside_every_container_and_keeps_its_kind() -> None:
    here = torch.zeros(1)
    batch = (
        [here, "text"],
        {"a": here},
        Named(here, 2),
        Pair(here, None),
        defaultdict(list, b=here),
        OwnTo("cpu"),
    )
    moved = move(batch, torch.device("meta"), non_blocking=True)
    tensors = [moved[0][0], moved[1]["a"], moved[2].x, moved[3].left, moved[4]["b"]]
    assert [t.device.type for t in tensors] == ["meta"] * 5
    assert [type(part) for part in moved] == [type(part) for part in batch]
    assert moved[0][1] == "text"
    assert moved[2].y == 2
    assert moved[4]["new"] == []
    assert moved[5].where == "meta"
    assert here.device.type == "cpu"
    assert batch[4]["b"] is here, "the batch itself is left alone"


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loader_workers", [0, 1])
def test_pinned_batches_arrive_on_the_device(loader_workers: int) -> None:
    dataset = [{"x": torch.full((3,), float(i)), "y": i} for i in range(8)]
    loader = PositionLoader(dataset, index_of=identity, seed=0, loader_workers=loader_workers, pin_memory=True)
    loader.set_course([(0, 8)])
    batch = loader.take(0, 8)
    loader.close()
    assert batch["x"].is_pinned()
    assert batch["y"].is_pinned()
    assert torch.equal(move(batch, "cuda", non_blocking=True)["x"].cpu(), batch["x"])
