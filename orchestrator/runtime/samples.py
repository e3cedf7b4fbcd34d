"""How are the samples at given stream positions read, and what stands in the place of one that could not be read?"""

from __future__ import annotations

import pickle
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.core.cursor import mix
from orchestrator.errors import TaskError

IndexOf = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]


@final
class SampleReader:
    """Reads samples, here or in a loader process."""

    def __init__(self, dataset: Any, *, key: int | None) -> None:
        self._dataset = dataset
        self._key = key  # None: random draws are not tied to positions

    def read(self, positions: list[int], indices: list[int]) -> list[Any]:
        """The samples; in the place of one that could not be read, its ``Failure``."""
        if self._key is None and len(indices) > 1 and hasattr(self._dataset, "__getitems__"):
            return self._read_together(positions, indices)
        return [self._read_one(position, index) for position, index in zip(positions, indices, strict=True)]

    def _read_one(self, position: int, index: int) -> Any:
        try:
            if self._key is not None:
                _seed_generators(mix(self._key, position))
            return self._dataset[index]
        except Exception as error:
            return Failure(f"the sample at stream position {position} (dataset index {index})", error)

    def _read_together(self, positions: list[int], indices: list[int]) -> list[Any]:
        where = f"one of the samples at stream positions {some(positions)} (dataset indices {some(indices)})"
        try:
            samples = list(self._dataset.__getitems__(indices))
            if len(samples) != len(indices):
                raise ValueError(f"__getitems__ was asked for {len(indices)} samples and gave {len(samples)}")
            return samples
        except Exception as error:
            return [Failure(where, error)] * len(indices)


def _seed_generators(key: int) -> None:
    # ``torch.manual_seed`` takes 200 us, the generator's own method one; all three together take about 10 us. torch
    # and numpy run the same generator from 32 bits of seed, so each gets its own half, else they would draw alike.
    torch.default_generator.manual_seed(key)
    np.random.seed(key >> 32)
    random.seed(key)


def keep_generators() -> Callable[[], None]:
    """Remembers torch's CPU generator, numpy's and Python's; what is returned puts them back, whenever called."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def put_back() -> None:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return put_back


@contextmanager
def generators_kept() -> Iterator[None]:
    """Torch's CPU generator, numpy's and Python's are after it as they were before."""
    put_back = keep_generators()
    try:
        yield
    finally:
        put_back()


@final
class Failure:
    """A sample that could not be read; raised only if it is wanted."""

    def __init__(self, where: str, error: Exception, told: str | None = None) -> None:
        self.where = where
        self.error = error
        self.told = told  # the traceback in a loader process, which an exception loses on its way

    def throw(self) -> None:
        if self.told is not None:
            self.error.__cause__ = _InLoaderProcessError(self.told)
        raise TaskError(
            f"{self.where} could not be read: {type(self.error).__name__}: {self.error}; mend the data set's "
            "__getitem__, or take the sample out of the data set"
        ) from self.error

    def portable(self) -> Failure:
        """The same for another process; an exception that does not survive pickling goes there as words."""
        told = "".join(traceback.format_exception(type(self.error), self.error, self.error.__traceback__))
        error: Any = None
        with suppress(Exception):
            error = pickle.loads(pickle.dumps(self.error))
        if not isinstance(error, Exception):
            error = RuntimeError(f"{type(self.error).__name__}: {self.error}")
        return Failure(self.where, error, told)


class _InLoaderProcessError(Exception):
    """Shows the traceback of another process under the exception that came from there."""

    def __str__(self) -> str:
        return f"in a loader process:\n{self.args[0]}"


def indices_at(index_of: IndexOf, positions: list[int]) -> list[int]:
    return [int(index) for index in index_of(np.asarray(positions, dtype=np.int64))]


def some(numbers: list[int]) -> str:
    """The numbers for a message: at most eight of them, and the last."""
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown}, ... {numbers[-1]}"
