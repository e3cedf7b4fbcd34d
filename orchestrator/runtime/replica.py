"""One rank's copy of the model, kept equal to the others by DistributedDataParallel.

DDP expects every rank to run one synchronising backward pass a step. A rank whose run is empty takes part with a loss
of zero that touches every parameter, so that nobody waits for it; one whose micro-batch ran out of memory, with NaN.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.ports import Collective
from orchestrator.types import BatchPlan

_TAKE_PART = object()


@final
class _Participant(nn.Module):
    """The user's model, which can also be called to take part without data."""

    def __init__(self, model: nn.Module, *, may_leave_unused: bool) -> None:
        super().__init__()
        self.model = model
        self.was_called = False
        # Where parameters may stay unused, those that nobody used must keep no gradient rather than get one of zero.
        self.nothing = nn.Parameter(torch.zeros(())) if may_leave_unused else None
        self._sparse = {id(m.weight) for m in model.modules() if getattr(m, "sparse", False) and hasattr(m, "weight")}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is _TAKE_PART:
            return self._without_data(args[1])
        self.was_called = True
        return self.model(*args, **kwargs)

    def _without_data(self, factor: float) -> Tensor:
        if factor == 0 and self.nothing is not None:
            return self.nothing * factor
        parameters = [p for p in self.parameters() if p.requires_grad]
        return sum((self._touched(p) * factor for p in parameters), torch.zeros((), device=parameters[0].device))

    def _touched(self, parameter: Tensor) -> Tensor:
        if id(parameter) in self._sparse:  # its gradient must be sparse on every rank
            first = torch.zeros(1, dtype=torch.long, device=parameter.device)
            return nn.functional.embedding(first, parameter, sparse=True).sum()
        return parameter.sum()


@final
class _Stable(nn.Module):
    """What a loop may keep while the group changes: whichever wrapper there is at the moment is called."""

    def __init__(self, replica: Replica) -> None:
        super().__init__()
        self.module = replica.model
        self._replica = replica

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._replica.called(*args, **kwargs)


@final
class Replica:
    """``module`` is what the user calls: the model itself on one rank, its DDP wrapper on several.

    Without ``averages`` it is the model on several, too, and who asked for that brings the gradients together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        collective: Collective,
        device: torch.device,
        find_unused_parameters: bool,
        averages: bool = True,
        group_changes: bool = False,
    ) -> None:
        self.model = model.to(device)
        self._collective = collective
        self._device = device
        self._find_unused_parameters = find_unused_parameters
        self._averages = averages
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._buffers = list(self.model.buffers())
        self._ddp: DistributedDataParallel | None = None
        self._participant = _Participant(self.model, may_leave_unused=find_unused_parameters).to(device)
        self._stable = _Stable(self) if group_changes else None
        self.wrap(alike=False)

    def wrap(self, *, alike: bool) -> None:
        """Collective. Train with the group at hand; ``alike`` says that all ranks have the same weights already."""
        if self._averages and self._collective.world_size > 1:
            self._ddp = DistributedDataParallel(
                self._participant,
                device_ids=[self._device] if self._device.type == "cuda" else None,
                find_unused_parameters=self._find_unused_parameters,
                gradient_as_bucket_view=True,  # the sums stay where they were made: a copy less, the same bits
                init_sync=not alike,
            )

    def unwrap(self) -> None:
        """Let the group go: nothing here refers to it any more."""
        self._ddp = None

    @property
    def module(self) -> nn.Module:
        return self.called if self._stable is None else self._stable

    @property
    def called(self) -> nn.Module:
        """With the group at hand."""
        return self.model if self._ddp is None else self._ddp

    def company(self, plan: BatchPlan, rank: int) -> tuple[tuple[int, int], ...]:
        """A rank computes its own micro-batches alone; one without any joins in with ``take_part``."""
        return ()

    def can_give_up(self, *, in_backward: bool, last: bool) -> bool:
        """Not once a synchronising backward pass has begun: other ranks may hold half of its all-reduces."""
        return not (in_backward and last and self._ddp is not None)

    def give_up(self) -> None:
        """Nothing is held but gradients, which are forgotten with the step."""

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward; gradients are averaged over the ranks in the last one."""
        if self._ddp is None or last:
            return nullcontext()
        context: AbstractContextManager[None] = self._ddp.no_sync()
        return context

    def begin_step(self, *, again: bool) -> None:
        """Remember the buffers, such as running means, as they are before a step, unless it is done ``again``."""
        self._participant.was_called = False
        if not again:
            self._kept = [(buffer, buffer.clone()) for buffer in self._buffers]

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put back what was kept: the step was not taken."""
        for buffer, kept in self._kept:
            buffer.copy_(kept)

    def take_part(self, *, spoil: bool) -> None:
        """Join the step's all-reduce with a gradient of zero, or of NaN, which tells all that the step is not whole."""
        if self._ddp is not None:
            if self._participant.was_called:
                # DDP sends the buffers before a step's first forward pass. Sent again, they would pair up with another
                # exchange of the other ranks.
                self._ddp.require_forward_param_sync = False
            loss: Tensor = self._ddp(_TAKE_PART, math.nan if spoil else 0.0)
            loss.backward()
