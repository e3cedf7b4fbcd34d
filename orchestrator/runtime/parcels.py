"""How do samples travel from a loader process to the one that trains?"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from io import BytesIO
from typing import Any, final

import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.runtime.samples import Failure

_ALIGNMENT = 64  # bytes


@final
class Parcel:
    """Samples on their way from a loader process: what they are as bytes, their arrays in one piece of shared memory.

    A tensor sent by itself holds a file descriptor until it is freed, and a thousand samples read ahead would use up
    what a process may open.
    """

    def __init__(self, positions: list[int], heads: list[Failure | tuple[bytes, list[slice]]], body: Tensor | None):
        self.positions = positions
        self.heads = heads
        self.body = body  # uint8

    def unpack(self) -> Iterator[Failure | tuple[bytes, list[memoryview]]]:
        view = memoryview(bytearray()) if self.body is None else self.body.numpy().data
        for head in self.heads:
            yield head if isinstance(head, Failure) else (head[0], [view[piece] for piece in head[1]])


def pack(positions: list[int], indices: list[int], samples: list[Any]) -> Parcel:
    heads: list[Failure | tuple[bytes, list[slice]]] = []
    pieces: list[tuple[slice, memoryview]] = []
    end = 0
    for position, index, sample in zip(positions, indices, samples, strict=True):
        if not isinstance(sample, Failure):
            try:
                head, arrays = _dump(sample)
            except Exception as error:
                why = TypeError(f"a loader process cannot send it ({error}); data.loader_workers: 0 needs no sending")
                sample = Failure(f"the sample at stream position {position} (dataset index {index})", why)
        if isinstance(sample, Failure):
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
        return Parcel(positions, heads, None)
    # Shared here, where a lack of shared memory is an error that can be told; in the queue's thread it is a hang.
    body = torch.empty(end, dtype=torch.uint8).share_memory_()
    view = body.numpy().data
    for place, array in pieces:
        view[place] = array
    return Parcel(positions, heads, body)


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
