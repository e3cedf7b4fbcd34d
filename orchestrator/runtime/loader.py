"""The samples of the stream by position, read ahead by loader processes where there are any.

What was read ahead is kept sample by sample under its position, not as batches: a plan that cuts the stream anew is
served from what was read for the old one, and no sample is read twice. The samples and their random draws are the same
for any number of loader processes.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext, suppress
from io import BytesIO
from itertools import chain
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, default_collate

from orchestrator.core.cursor import mix
from orchestrator.errors import GroundswellError, TaskError

IndexOf = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]

_SAMPLE_DRAWS = 0x5A4D  # keeps a sample's draws apart from those of dropout, which are keyed by position as well
_ALIGNMENT = 64  # bytes


@final
class PositionLoader:
    """Gives micro-batches of the sample stream to one rank.

    ``index_of`` maps stream positions to indices of ``dataset`` (map-style). ``collate`` makes a batch of a list of
    samples (default: torch's). ``loader_workers`` processes read along the course that was set, each ``prefetch``
    micro-batches ahead; with none, samples are read when taken.

    With ``seed_each_sample``, torch's CPU generator, ``random`` and ``numpy.random`` are seeded from (``seed``,
    position) before ``dataset[index]``, and left as found: augmentation draws the same on any rank. Generators that
    the data set owns, and those of a GPU, are its own affair. Stored tensors and lists, which draw nothing, are not
    seeded for. Without it, ``dataset.__getitems__`` is used if there.

    ``pin_memory`` does nothing where there is no CUDA device.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        index_of: IndexOf,
        seed: int,
        loader_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        seed_each_sample: bool = True,
    ) -> None:
        if loader_workers < 0 or prefetch < 1:
            raise ValueError(
                f"a loader needs loader_workers >= 0 and prefetch >= 1, got {loader_workers} and {prefetch}"
            )
        self._index_of = index_of
        self._collate = default_collate if collate is None else collate
        self._pin = pin_memory and torch.cuda.is_available()
        self._seeded = seed_each_sample and not _draws_nothing(dataset)
        self._reader = _Reader(dataset, key=mix(seed, _SAMPLE_DRAWS) if self._seeded else None)
        plain = type(dataset) is TensorDataset and self._collate is default_collate and not loader_workers
        self._stored = dataset.tensors if plain else None
        self._ahead: _ReadAhead | None = None
        if loader_workers:
            self._ahead = _ReadAhead(
                self._reader, index_of=index_of, loader_workers=loader_workers, prefetch=prefetch, seed=seed
            )

    def set_course(self, spans: Iterable[tuple[int, int]]) -> None:
        """Say which ``(first position, size)`` this rank will take next, in rising order; call again at every change.

        ``spans`` may be endless; it is drawn from as loader processes become free. What was read or sent out for the
        former course is used where the new one wants it.
        """
        if self._ahead is not None:
            self._ahead.set_course(spans)

    def take(self, first_position: int, size: int) -> Any:
        """The collated batch of ``size`` samples from ``first_position`` on.

        Raises ``TaskError``, naming position and index, where a sample cannot be read or a batch not be made of them;
        ``GroundswellError`` where a loader process died; ``ValueError`` where the span is not on the course.
        """
        if size < 1:
            raise ValueError(f"a micro-batch has at least one sample, got size={size} at position {first_position}")
        if self._stored is not None:
            # What stacking the samples one by one would give, in one read.
            rows = torch.from_numpy(self._index_of(np.arange(first_position, first_position + size)))
            batch = [tensor[rows] for tensor in self._stored]
            return _through(batch, "pin_memory") if self._pin else batch
        positions = list(range(first_position, first_position + size))
        samples = self._read(positions) if self._ahead is None else self._ahead.take(positions)
        for sample in samples:
            if isinstance(sample, _Failure):
                sample.throw()
        try:
            batch = self._collate(samples)
        except Exception as error:
            indices = _indices(self._index_of, positions)
            raise TaskError(
                f"no batch could be made of the samples at stream positions {_some(positions)} (dataset indices "
                f"{_some(indices)}): {type(error).__name__}: {error}; make the samples alike in shape and type, or "
                "give a collate function that joins them"
            ) from error
        return _through(batch, "pin_memory") if self._pin else batch

    def close(self) -> None:
        """End the loader processes. What they had read is gone."""
        if self._ahead is not None:
            self._ahead.close()

    def _read(self, positions: list[int]) -> list[Any]:
        with _generators_kept() if self._seeded else nullcontext():
            return self._reader.read(positions, _indices(self._index_of, positions))


def _draws_nothing(dataset: Any) -> bool:
    """Whether reading ``dataset`` surely draws no random numbers, so that seeding would only cost time."""
    if type(dataset) in (Subset, ConcatDataset):
        parts = [dataset.dataset] if type(dataset) is Subset else dataset.datasets
        return all(_draws_nothing(part) for part in parts)
    return type(dataset) in (TensorDataset, list, tuple)


def move(batch: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """``batch`` with every tensor on ``device``.

    Looks inside lists, tuples, named tuples, mappings and dataclasses; any other object is asked for its own
    ``to(device)`` if it has one, and is left as it is if not.
    """
    return _through(batch, "to", device, non_blocking=non_blocking)


def _through(value: Any, method: str, *args: Any, **of_tensors: Any) -> Any:
    def go(inner: Any) -> Any:
        return _through(inner, method, *args, **of_tensors)

    if isinstance(value, Tensor):
        return getattr(value, method)(*args, **of_tensors)
    if isinstance(value, type):
        return value  # a class is no value to look into, though it may have the method
    if callable(getattr(value, method, None)):
        return getattr(value, method)(*args)
    if isinstance(value, Mapping):
        moved = {key: go(inner) for key, inner in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return moved
        same_kind = copy.copy(value)  # keeps what a subclass carries, such as a default factory
        same_kind.update(moved)
        return same_kind
    if isinstance(value, tuple):
        parts = [go(inner) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, list):
        return [go(inner) for inner in value]
    if dataclasses.is_dataclass(value):
        moved = {f.name: go(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **moved)  # type: ignore[type-var]  # classes were sent back above
    return value


# Reading, here or in a loader process


@final
class _Reader:
    """Reads samples; in a loader process this is what ``DataLoader`` takes for the data set."""

    def __init__(self, dataset: Any, *, key: int | None) -> None:
        self._dataset = dataset
        self._key = key  # None: random draws are not tied to positions

    def read(self, positions: list[int], indices: list[int]) -> list[Any]:
        """The samples; in the place of one that could not be read, its ``_Failure``."""
        if self._key is None and len(indices) > 1 and hasattr(self._dataset, "__getitems__"):
            return self._read_together(positions, indices)
        return [self._read_one(position, index) for position, index in zip(positions, indices, strict=True)]

    def __getitem__(self, task: tuple[list[int], list[int]]) -> _Parcel:
        positions, indices = task
        return _pack(positions, indices, self.read(positions, indices))

    def _read_one(self, position: int, index: int) -> Any:
        try:
            if self._key is not None:
                _seed_generators(mix(self._key, position))
            return self._dataset[index]
        except Exception as error:
            return _Failure(f"the sample at stream position {position} (dataset index {index})", error)

    def _read_together(self, positions: list[int], indices: list[int]) -> list[Any]:
        where = f"one of the samples at stream positions {_some(positions)} (dataset indices {_some(indices)})"
        try:
            samples = list(self._dataset.__getitems__(indices))
            if len(samples) != len(indices):
                raise ValueError(f"__getitems__ was asked for {len(indices)} samples and gave {len(samples)}")
            return samples
        except Exception as error:
            return [_Failure(where, error)] * len(indices)


def _seed_generators(key: int) -> None:
    # ``torch.manual_seed`` takes 200 us, the generator's own method one; all three together take about 10 us. torch
    # and numpy run the same generator from 32 bits of seed, so each gets its own half, else they would draw alike.
    torch.default_generator.manual_seed(key)
    np.random.seed(key >> 32)
    random.seed(key)


@contextmanager
def _generators_kept() -> Iterator[None]:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@final
class _Failure:
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

    def portable(self) -> _Failure:
        """The same for another process; an exception that does not survive pickling goes there as words."""
        told = "".join(traceback.format_exception(type(self.error), self.error, self.error.__traceback__))
        error: Any = None
        with suppress(Exception):
            error = pickle.loads(pickle.dumps(self.error))
        if not isinstance(error, Exception):
            error = RuntimeError(f"{type(self.error).__name__}: {self.error}")
        return _Failure(self.where, error, told)


class _InLoaderProcessError(Exception):
    """Shows the traceback of another process under the exception that came from there."""

    def __str__(self) -> str:
        return f"in a loader process:\n{self.args[0]}"


def _indices(index_of: IndexOf, positions: list[int]) -> list[int]:
    return [int(index) for index in index_of(np.asarray(positions, dtype=np.int64))]


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown}, ... {numbers[-1]}"


# Reading ahead


@final
class _ReadAhead:
    """Loader processes that follow the course, and what they have read so far, by position.

    It is its own sampler: ``DataLoader`` draws the next task from it, in this thread, whenever it hands out a result.
    """

    def __init__(self, reader: _Reader, *, index_of: IndexOf, loader_workers: int, prefetch: int, seed: int) -> None:
        self._index_of = index_of
        self._stash: dict[int, _Failure | tuple[bytes, list[memoryview]]] = {}
        self._in_flight: set[int] = set()
        self._course: Iterator[tuple[int, int]] = iter(())
        self._reached = 0  # the course was drawn up to here
        self._ended = True
        self._results: Iterator[_Parcel] | None = None
        self._loader: DataLoader[Any] | None = DataLoader(
            reader,  # type: ignore[arg-type]  # only its __getitem__ is used, and that takes a task
            batch_size=None,
            sampler=self,
            num_workers=loader_workers,
            prefetch_factor=prefetch,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # without batch_size it gets what the reader gave
            generator=torch.Generator().manual_seed(seed),  # else the base seed is drawn from the caller's generator
        )

    def set_course(self, spans: Iterable[tuple[int, int]]) -> None:
        course = iter(spans)
        first = next(course, None)
        self._course, self._ended = course, first is None
        if first is not None:
            self._course = chain([first], course)
            self._reached = first[0]
        if self._results is None and self._loader is not None:
            self._results = iter(self._loader)

    def take(self, positions: list[int]) -> list[Any]:
        while missing := [p for p in positions if p not in self._stash]:
            lost = [p for p in missing if p not in self._in_flight and (self._ended or p < self._reached)]
            if lost:
                raise ValueError(
                    f"stream positions {_some(lost)} are not on the course that was set, or were taken before; "
                    "call set_course() with the spans that will be taken, then take them in that order"
                )
            self._receive()
        found = [self._stash.pop(position) for position in positions]
        for passed in [p for p in self._stash if p < positions[0]]:  # read for a plan that gave them to this rank
            del self._stash[passed]
        return [each if isinstance(each, _Failure) else pickle.loads(each[0], buffers=each[1]) for each in found]

    def close(self) -> None:
        self._loader = self._results = None  # DataLoader's iterator ends its processes when it is let go
        self._course, self._ended = iter(()), True
        self._stash.clear()
        self._in_flight.clear()

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        return self

    def __next__(self) -> tuple[list[int], list[int]]:
        for first, size in self._course:
            if size < 1 or first < self._reached:
                raise ValueError(f"a course must rise, and from {self._reached} on it went to {size} at {first}")
            self._reached = first + size
            span = range(first, first + size)
            fresh = [p for p in span if p not in self._stash and p not in self._in_flight]
            if fresh:
                self._in_flight.update(fresh)
                return fresh, _indices(self._index_of, fresh)
        self._ended = True
        return [], []  # a task without work: after StopIteration DataLoader would not ask again for a later course

    def _receive(self) -> None:
        assert self._results is not None, "positions are in flight only after a course was set"
        try:
            parcel = next(self._results)
        except RuntimeError as error:
            raise GroundswellError(
                f"a loader process died: {error}; its memory may have run out: lower data.loader_workers or "
                "data.prefetch, or set data.loader_workers to 0 to see the error itself"
            ) from error
        self._in_flight.difference_update(parcel.positions)
        self._stash.update(zip(parcel.positions, parcel.unpack(), strict=True))


def _as_it_is(parcel: _Parcel) -> _Parcel:
    return parcel


@final
class _Parcel:
    """Samples on their way from a loader process: what they are as bytes, their arrays in one piece of shared memory.

    A tensor sent by itself holds a file descriptor until it is freed, and a thousand samples read ahead would use up
    what a process may open.
    """

    def __init__(self, positions: list[int], heads: list[_Failure | tuple[bytes, list[slice]]], body: Tensor | None):
        self.positions = positions
        self.heads = heads
        self.body = body  # uint8

    def unpack(self) -> Iterator[_Failure | tuple[bytes, list[memoryview]]]:
        view = memoryview(bytearray()) if self.body is None else self.body.numpy().data
        for head in self.heads:
            yield head if isinstance(head, _Failure) else (head[0], [view[piece] for piece in head[1]])


def _pack(positions: list[int], indices: list[int], samples: list[Any]) -> _Parcel:
    heads: list[_Failure | tuple[bytes, list[slice]]] = []
    pieces: list[tuple[slice, memoryview]] = []
    end = 0
    for position, index, sample in zip(positions, indices, samples, strict=True):
        if not isinstance(sample, _Failure):
            try:
                head, arrays = _dump(sample)
            except Exception as error:
                why = TypeError(f"a loader process cannot send it ({error}); data.loader_workers: 0 needs no sending")
                sample = _Failure(f"the sample at stream position {position} (dataset index {index})", why)
        if isinstance(sample, _Failure):
            heads.append(sample.portable())
            continue
        slices = []
        for array in arrays:
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = begin + array.nbytes
            slices.append(slice(begin, end))
        heads.append((head, slices))
        pieces.extend(zip(slices, arrays, strict=True))
    if not end:
        return _Parcel(positions, heads, None)
    # Shared here, where a lack of shared memory is an error that can be told; in the queue's thread it is a hang.
    body = torch.empty(end, dtype=torch.uint8).share_memory_()
    view = body.numpy().data
    for place, array in pieces:
        view[place] = array
    return _Parcel(positions, heads, body)


def _dump(sample: Any) -> tuple[bytes, list[memoryview]]:
    arrays: list[memoryview] = []
    head = BytesIO()
    _SamplePickler(head, protocol=5, buffer_callback=lambda buffer: arrays.append(buffer.raw())).dump(sample)
    return head.getvalue(), arrays


class _SamplePickler(pickle.Pickler):
    """Plain pickling, with tensors sent as the arrays they share memory with."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor:
            return NotImplemented
        try:
            return _tensor, (value.numpy(),)
        except (TypeError, RuntimeError):  # numpy has no such type or layout, or a gradient is wanted
            return NotImplemented


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array)
