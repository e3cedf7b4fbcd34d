"""Which running statistics does a model have after a step, on any layout? (``train.reproducible``)

A buffer that forward passes change, such as BatchNorm's running means, would hold what the micro-batches of one rank
made of it. Here every micro-batch begins with the buffers as they were at the step's beginning, and all ranks go on
with what the first of the list has made of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from orchestrator.ports import Collective

_MOST_BYTES = 1 << 25  # in one exchange: a copy of what is sent is made


@final
class FirstStatistics:
    """``begin_step`` | ``begin_micro_batch``* | ``finish``; does nothing for a model without buffers."""

    def __init__(self, buffers: Iterable[Tensor], *, collective: Collective) -> None:
        self._buffers = list(buffers)
        self._collective = collective
        self._before: list[Tensor] = []
        self._first: list[Tensor] | None = None  # after the first micro-batch of this rank
        self._begun = 0

    def begin_step(self) -> None:
        self._before, self._first, self._begun = [buffer.clone() for buffer in self._buffers], None, 0

    def begin_micro_batch(self) -> None:
        if self._begun == 1:
            self._first = [buffer.clone() for buffer in self._buffers]
        if self._begun:
            _put(self._buffers, self._before)
        self._begun += 1

    def finish(self) -> None:
        """Collective. Rank zero has the list's first micro-batch."""
        if self._first is not None:
            _put(self._buffers, self._first)
        share_tensors(self._buffers, self._collective)
        self._before, self._first = [], None


@torch.no_grad()
def share_tensors(tensors: Iterable[Tensor], collective: Collective) -> None:
    """Collective. Put rank zero's into those of all ranks, bit for bit, many small ones in one exchange."""
    if collective.world_size == 1:
        return
    waiting: list[Tensor] = []
    for tensor in tensors:
        if waiting and sum(t.nbytes for t in waiting) + tensor.nbytes > _MOST_BYTES:
            _share(waiting, collective)
            waiting = []
        waiting.append(tensor)
    if waiting:
        _share(waiting, collective)


def _share(tensors: list[Tensor], collective: Collective) -> None:
    flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
    collective.broadcast(flat)
    pieces = flat.split([tensor.nbytes for tensor in tensors])
    # Copied out before it is read as another dtype, which wants it aligned.
    _put(tensors, [p.clone().view(t.dtype).view(t.shape) for p, t in zip(pieces, tensors, strict=True)])


@torch.no_grad()
def _put(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
