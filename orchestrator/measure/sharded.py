"""The mean gradient where each rank holds a shard of it: norms of shards, summed over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from orchestrator.measure.norms import norm

Attach = Callable[[nn.Parameter, Callable[[Tensor], None]], RemovableHandle]


@final
class ShardedMeanGradient:
    """``.grad`` of sharded ``parameters``, as reducing and scattering leave it; read as ``MeanGradient`` is.

    The shards of a step have no entry in common, so squared norms add up over the ranks; ``sum_over_ranks`` is
    collective, and so are ``over_ranks`` and ``is_finite``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, sum_over_ranks: Callable[[float], float]) -> None:
        self._parameters = list(parameters)
        self._sum_over_ranks = sum_over_ranks

    def norms(self) -> list[Tensor]:
        """Of this rank's shards: 0-D, on the device; a parameter without a gradient counts as zero."""
        return [norm(shard) for shard in self._shards()]

    def over_ranks(self, square: float) -> float:
        """Collective. The squared norm over all ranks, of what ``norms`` gave here."""
        return self._sum_over_ranks(square)

    def is_finite(self) -> bool:
        """Collective. Whether every entry is, on every rank."""
        return self._sum_over_ranks(float(not all(bool(torch.isfinite(shard).all()) for shard in self._shards()))) == 0

    def _shards(self) -> list[Tensor]:
        return [shard_of(p.grad) for p in self._parameters if p.grad is not None]


def shard_of(gradient: Tensor) -> Tensor:
    """This rank's part of it."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
