"""How do loader processes read samples before they are wanted, and what becomes of them when the plan changes?

What was read ahead is kept sample by sample under its position, not as batches: a plan that cuts the stream anew is
served from what was read for the old one, and no sample is read twice.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, final

import torch
from torch.utils.data import DataLoader

from orchestrator.errors import GroundswellError
from orchestrator.runtime.parcels import Parcel, pack
from orchestrator.runtime.samples import Failure, IndexOf, SampleReader, indices_at, some


@final
class ReadAhead:
    """Loader processes that follow the course, and what they have read so far, by position.

    It is its own sampler: ``DataLoader`` draws the next task from it, in this thread, whenever it hands out a result.
    """

    def __init__(
        self, reader: SampleReader, *, index_of: IndexOf, loader_workers: int, prefetch: int, seed: int
    ) -> None:
        self._index_of = index_of
        self._stash: dict[int, Failure | tuple[bytes, list[memoryview]]] = {}
        self._in_flight: set[int] = set()
        self._course: Iterator[tuple[int, int]] = iter(())
        self._reached = 0  # the course was drawn up to here
        self._ended = True
        self._results: Iterator[Parcel] | None = None
        self._loader: DataLoader[Any] | None = DataLoader(
            _Parcels(reader),  # type: ignore[arg-type]  # only its __getitem__ is used, and that takes a task
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
                    f"stream positions {some(lost)} are not on the course that was set, or were taken before; "
                    "call set_course() with the spans that will be taken, then take them in that order"
                )
            self._receive()
        found = [self._stash.pop(position) for position in positions]
        for passed in [p for p in self._stash if p < positions[0]]:  # read for a plan that gave them to this rank
            del self._stash[passed]
        return [each if isinstance(each, Failure) else pickle.loads(each[0], buffers=each[1]) for each in found]

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
                return fresh, indices_at(self._index_of, fresh)
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


@final
class _Parcels:
    """In a loader process this is what ``DataLoader`` takes for the data set."""

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader

    def __getitem__(self, task: tuple[list[int], list[int]]) -> Parcel:
        positions, indices = task
        return pack(positions, indices, self._reader.read(positions, indices))


def _as_it_is(parcel: Parcel) -> Parcel:
    return parcel
