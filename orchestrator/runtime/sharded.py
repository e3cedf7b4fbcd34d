"""One rank's shard of the model, gathered part by part while it computes: FSDP2.

Each micro-batch gathers weights from all ranks and reduces its gradients to them, so that no rank ever holds all
weights or all gradients. All ranks therefore run equally many passes in a step: one with fewer micro-batches than the
others computes the step's first once more, with weight zero; one whose memory ran out plays the exchanges of the
passes that are left (``Lockstep``), and gives NaN for its gradients, which tells all that the step is not whole.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from orchestrator.measure.norms import widened
from orchestrator.ports import Collective
from orchestrator.runtime.lockstep import Exchange, Lockstep
from orchestrator.runtime.sharding import check_sharded, check_torch
from orchestrator.types import BatchPlan

GradientHook = Callable[[Tensor], None]


@final
class ShardedReplica:
    """``module`` is what the user calls: the sharded model itself."""

    def __init__(
        self, model: nn.Module, *, optimizer: torch.optim.Optimizer, collective: Collective, device: torch.device
    ) -> None:
        check_torch()
        check_sharded(model, optimizer, world_size=collective.world_size)
        self.model = model.to(device)
        self._collective = collective
        self._device = device
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._reshard()  # a pass of the user's own may have left weights gathered
        self._buffers = list(model.buffers())
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._lockstep = Lockstep(collective)
        self._own_left = self._passes_left = 0
        self._gave_up = self._in_model = False
        self.gradients = WholeGradients(model)
        for number, unit in enumerate(self._units):
            # They do what torch asks for, though it does not publish the classes to derive them from.
            unit.set_custom_all_gather(_AllGather(self._lockstep, number))  # type: ignore[arg-type]
            unit.set_custom_reduce_scatter(_ReduceScatter(self._lockstep, number))  # type: ignore[arg-type]
        model.register_forward_pre_hook(self._before_forward, prepend=True)
        model.register_forward_hook(self._after_forward)

    @property
    def module(self) -> nn.Module:
        return self.model

    def company(self, plan: BatchPlan, rank: int) -> tuple[tuple[int, int], ...]:
        """``(offset, size)`` of what this rank computes after its own micro-batches, with weight zero."""
        self._own_left, self._passes_left = len(plan.run(rank)), plan.accum_steps
        return ((0, plan.sizes[0]),) * (self._passes_left - self._own_left)

    @contextmanager
    def synchronising(self, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward, which averages its gradients over the ranks, last or not."""
        in_company = self._own_left == 0
        self._own_left -= not in_company
        self._passes_left -= 1
        kept = [buffer.clone() for buffer in self._buffers] if in_company else []
        self._reshard()
        self._in_model = False
        self._lockstep.begin_pass()
        yield
        if not self._gave_up:
            self._lockstep.end_pass()
        for buffer, before in zip(self._buffers, kept, strict=False):
            buffer.copy_(before)

    def can_give_up(self, *, in_backward: bool, last: bool) -> bool:
        """Whether a micro-batch may run out of memory here without leaving other ranks waiting."""
        return True

    def begin_step(self, *, again: bool) -> None:
        """Collective where the model has buffers, such as running means: all go on from rank zero's."""
        self._gave_up = False
        if not again:
            for buffer in self._buffers if self._collective.world_size > 1 else ():
                dist.broadcast(buffer, src=0)
            self._kept = [(buffer, buffer.clone()) for buffer in self._buffers]

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put back what was kept: the step was not taken."""
        for buffer, kept in self._kept:
            buffer.copy_(kept)

    def give_up(self) -> None:
        """Memory ran out within a pass: let go of what it holds."""
        self._gave_up = True
        if self._in_model:
            self._root.reset_iter_state()

    def take_part(self, *, spoil: bool) -> None:
        """Play the passes that this rank gave up; one without micro-batches has computed the company's."""
        if not spoil:
            return
        self._play_rest()
        for _ in range(self._passes_left):
            self._lockstep.begin_pass()
            self._play_rest()
        self._passes_left = 0

    def sum_over_ranks(self, value: float) -> float:
        """Collective. Of every rank's part of something; NaN on all ranks where one gave up."""
        return self._collective.sum([math.nan if self._gave_up else value])[0]

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self.model, FSDPModule), "checked when it was given"
        return self.model

    def _before_forward(self, *_: Any) -> None:
        self._in_model = True

    def _after_forward(self, *_: Any) -> None:
        # The outermost weights stay gathered for a backward pass. Where none follows, as in an evaluation, they would
        # go stale when others are put in.
        if not self._lockstep.within_pass:
            self._reshard()

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    @torch.no_grad()
    def _play_rest(self) -> None:
        for exchange in self._lockstep.rest():
            unit = self._units[exchange.unit]
            if exchange.kind == "gather":
                unit.unshard()  # the others compute with these weights, and a loss that looks at them may not fail
                unit.reshard()
            else:
                self._spoil(unit, exchange)

    def _spoil(self, unit: FSDPModule, exchange: Exchange) -> None:
        assert isinstance(unit, nn.Module), "what is sharded is a module"
        shards = (p for p in unit.parameters() if isinstance(p, DTensor))
        group = next(shards).device_mesh.get_group()
        nothing = torch.full((exchange.length,), math.nan, dtype=exchange.dtype, device=self._device)
        dist.reduce_scatter_single(
            nothing.new_empty(exchange.length // self._collective.world_size),
            nothing,
            op=dist.ReduceOp.AVG if exchange.averages else dist.ReduceOp.SUM,
            group=group,
        )


@final
class WholeGradients:
    """Hands over each parameter's gradient of each micro-batch as this rank computes it, before it is scattered.

    Autograd knows nothing of a shard: it works with the gathered parameter, which is there from the first forward
    pass on and keeps its identity.
    """

    def __init__(self, model: nn.Module) -> None:
        self._hooks: dict[int, OrderedDict[int, GradientHook]] = {id(p): OrderedDict() for p in model.parameters()}
        self._gathered: dict[int, Tensor] = {}
        for module in model.modules():
            if isinstance(module, FSDPModule):
                owned = [
                    (owner, name, parameter)
                    for owner in _of_this_unit(module)
                    for name, parameter in owner.named_parameters(recurse=False)
                ]
                module.register_forward_pre_hook(partial(self._find, owned))

    def attach(self, parameter: nn.Parameter, hook: GradientHook) -> RemovableHandle:
        """Call ``hook`` with each of the parameter's gradients, in at least float32."""
        hooks = self._hooks[id(parameter)]
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def _find(self, owned: Sequence[tuple[nn.Module, str, nn.Parameter]], *_: Any) -> None:
        for owner, name, shard in owned:
            gathered = getattr(owner, name)
            if gathered.requires_grad and self._gathered.get(id(shard)) is not gathered:
                self._gathered[id(shard)] = gathered
                gathered.register_hook(partial(self._see, self._hooks[id(shard)]))

    @staticmethod
    def _see(hooks: Mapping[int, GradientHook], gradient: Tensor) -> None:
        for hook in hooks.values():
            hook(widened(gradient))


def _of_this_unit(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and what is gathered with it."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _of_this_unit(child)


def _allocate(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(*size, dtype=dtype, device=device)


@final
class _AllGather:
    """Torch's own, which says to ``Lockstep`` what follows."""

    allocate = staticmethod(_allocate)

    def __init__(self, lockstep: Lockstep, unit: int) -> None:
        self._lockstep = lockstep
        self._unit = unit

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self._lockstep.about_to(Exchange(kind="gather", unit=self._unit))
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


@final
class _ReduceScatter:
    """Torch's own, which says to ``Lockstep`` what follows."""

    allocate = staticmethod(_allocate)

    def __init__(self, lockstep: Lockstep, unit: int) -> None:
        self._lockstep = lockstep
        self._unit = unit

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self._lockstep.about_to(
            Exchange(
                kind="reduce",
                unit=self._unit,
                length=input_tensor.numel(),
                dtype=input_tensor.dtype,
                averages=op == dist.ReduceOp.AVG,
            )
        )
        return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
