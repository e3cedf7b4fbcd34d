"""Samples and exceptions of any kind arrive from a loader process as they were, or as an error that says why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.errors import TaskError
from orchestrator.runtime.loader import PositionLoader
from tests.unit.loading import ANY_CORES, Broken, Pair, identity

pytestmark = ANY_CORES


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


class AwkwardError(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


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
