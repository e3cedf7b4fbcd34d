"""The small exchanges between ranks: one process alone, or a process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.ports import Collective

# As torch 2.13 calls it, where its older name is deprecated.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@final
class Solo:
    """One process; every exchange is with itself."""

    rank = 0
    world_size = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        return lambda: list(values)

    def sum_tensor(self, tensor: Tensor) -> None:
        """It is the sum already."""

    def all_to_all(self, tensor: Tensor, *, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor, *, source: int = 0) -> None:
        """There is nobody else."""

    def share(self, value: Any, *, source: int = 0) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


@final
class Apart:
    """A process that is in no group yet: it is no rank's, and exchanges with itself."""

    rank = -1
    world_size = 1
    sum, start_sum, sum_tensor = Solo.sum, Solo.start_sum, Solo.sum_tensor
    all_to_all, all_gather, broadcast = Solo.all_to_all, Solo.all_gather, Solo.broadcast
    share, gather = Solo.share, Solo.gather


@final
class ProcessGroupCollective:
    """The exchanges of ``orchestrator.ports.Collective`` over a CPU process group.

    A group of its own on gloo when the default one is not: the numbers exchanged here are read by the host, and a
    device collective would make the host wait for the device twice.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        # None is the default group; a reference kept here would outlive its end.
        self.group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def sum(self, values: Sequence[float]) -> list[float]:
        return self.start_sum(values)()

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        tensor = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def result() -> list[float]:
            work.wait()
            found: list[float] = tensor.tolist()
            return found

        return result

    def sum_tensor(self, tensor: Tensor) -> None:
        # Over the default group, which is the one that reduces the gradients: its backend reaches their device.
        dist.all_reduce(tensor)

    def all_to_all(self, tensor: Tensor, *, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        received = tensor.new_empty(sum(receives))
        dist.all_to_all_single(received, tensor, list(receives), list(sends))
        return received

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(self.world_size * tensor.numel())
        _all_gather_single(gathered, tensor)
        return gathered

    def broadcast(self, tensor: Tensor, *, source: int = 0) -> None:
        dist.broadcast(tensor, src=source)

    def share(self, value: Any, *, source: int = 0) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        box = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, box, dst=0, group=self.group)
        return box or []


@final
class ChangingCollective:
    """The exchanges of whichever group this process is in at the moment."""

    def __init__(self, first: Collective) -> None:
        self._now = first

    def become(self, collective: Collective) -> None:
        """From here on; at the boundary between two steps."""
        self._now = collective

    @property
    def rank(self) -> int:
        return self._now.rank

    @property
    def world_size(self) -> int:
        return self._now.world_size

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._now.sum(values)

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        return self._now.start_sum(values)

    def sum_tensor(self, tensor: Tensor) -> None:
        self._now.sum_tensor(tensor)

    def share(self, value: Any, *, source: int = 0) -> Any:
        return self._now.share(value, source=source)

    def all_to_all(self, tensor: Tensor, *, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        return self._now.all_to_all(tensor, sends=sends, receives=receives)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._now.all_gather(tensor)

    def broadcast(self, tensor: Tensor, *, source: int = 0) -> None:
        self._now.broadcast(tensor, source=source)

    def gather(self, value: Any) -> list[Any]:
        return self._now.gather(value)
