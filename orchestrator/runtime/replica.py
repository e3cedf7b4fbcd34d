"""One rank's copy of the model, kept equal to the others by DistributedDataParallel.

DDP expects every rank to run one synchronising backward pass a step. A rank whose run is empty takes part with a loss
of zero that touches every parameter, so that nobody waits for it; one whose micro-batch ran out of memory, with NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.ports import Collective

_TAKE_PART = object()


@final
class _Participant(nn.Module):
    """The user's model, which can also be called to take part without data."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.on_failure: Callable[[], None] = lambda: None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is _TAKE_PART:
            return sum((p.sum() * args[1] for p in self.model.parameters() if p.requires_grad), torch.zeros(()))
        try:
            return self.model(*args, **kwargs)
        except Exception:
            self.on_failure()
            raise


@final
class Replica:
    """``module`` is what the user calls: the model itself on one rank, its DDP wrapper on several."""

    def __init__(
        self, model: nn.Module, *, collective: Collective, device: torch.device, find_unused_parameters: bool
    ) -> None:
        self.model = model.to(device)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._buffers = list(self.model.buffers())
        self._ddp: DistributedDataParallel | None = None
        if collective.world_size > 1:
            participant = _Participant(self.model)
            self._ddp = DistributedDataParallel(
                participant,
                device_ids=[device] if device.type == "cuda" else None,
                find_unused_parameters=find_unused_parameters,
                gradient_as_bucket_view=True,  # the sums stay where they were made: a copy less, the same bits
            )
            participant.on_failure = self._buffers_were_sent

    @property
    def module(self) -> nn.Module:
        return self.model if self._ddp is None else self._ddp

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward; gradients are averaged over the ranks in the last one."""
        if self._ddp is None or last:
            return nullcontext()
        context: AbstractContextManager[None] = self._ddp.no_sync()
        return context

    def keep_buffers(self) -> None:
        """Remember the buffers, such as running means, as they are before a step."""
        self._kept = [(buffer, buffer.clone()) for buffer in self._buffers]

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put back what was kept: the step was not taken."""
        for buffer, kept in self._kept:
            buffer.copy_(kept)

    def _buffers_were_sent(self) -> None:
        # DDP sends the buffers before a step's first forward pass, and clears this mark after it. Where that pass
        # failed, take_part() would send them again, and pair up with another exchange of the other ranks.
        assert self._ddp is not None
        self._ddp.require_forward_param_sync = False

    def take_part(self, *, spoil: bool) -> None:
        """Join the step's all-reduce with a gradient of zero, or of NaN, which tells all that the step is not whole."""
        if self._ddp is not None:
            loss: Tensor = self._ddp(_TAKE_PART, math.nan if spoil else 0.0)
            loss.backward()
