"""Squared norms of every micro-batch's gradient by group of parameters: of layers, or of the optimizer's groups.

What ``GradMeter`` reads as one number, this reads as one for each group, with hooks that know their parameter. It is
there on request, beside the other meter: a norm for each parameter and micro-batch is what it costs. Nothing waits for
the device; the readings stay there until somebody needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from orchestrator.measure.norms import norm
from orchestrator.measure.preconditioner import AdamPreconditioner
from orchestrator.measure.sharded import Attach, shard_of

PRECONDITIONED = "preconditioned"
_OWN = "(model)"  # parameters that the outermost module owns itself
_ELSEWHERE = "(not in the model)"
_MOST_ORDERS = 8


def layers(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """``parameters`` by the path of the module that owns them; a shared one belongs to the first that does."""
    paths = {id(p): name.rpartition(".")[0] or _OWN for name, p in model.named_parameters()}
    found: dict[str, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(paths.get(id(parameter), _ELSEWHERE), []).append(parameter)
    return found


def parameter_groups(optimizer: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
    """The optimizer's trained parameters by its groups, called by their ``name`` if they have one, else by number."""
    names = [str(group.get("name", number)) for number, group in enumerate(optimizer.param_groups)]
    return {
        name if names.count(name) == 1 else f"{name} ({number})": [p for p in group["params"] if p.requires_grad]
        for number, (name, group) in enumerate(zip(names, optimizer.param_groups, strict=True))
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReading:
    """One step as one rank sees it: shape [groups], float64, on the parameters' device.

    ``mean_grad_sq`` is read from ``.grad``: after the all-reduce, all ranks see the same, and of a sharded gradient
    each its part. It is NaN for a metric that is not settled yet.
    """

    weighted_sq_sum: Tensor  # sum of b_i |g_i|^2 over this rank's micro-batches
    mean_grad_sq: Tensor  # |mean gradient|^2


@final
class GroupMeter:
    """Reads one step's sums: ``begin_step`` | (backward | ``end_micro_batch``)* | ``read``.

    ``groups`` share out parameters by name. ``preconditioner`` adds the group ``preconditioned``, last, of the norms
    of P^(1/2) g over all that its optimizer trains. Parameters without a gradient count as zero. ``attach`` is how a
    hook comes to see the whole micro-gradients of parameters that are sharded; the mean gradient is then read of this
    rank's shards alone.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        *,
        preconditioner: AdamPreconditioner | None = None,
        attach: Attach = nn.Parameter.register_hook,
    ) -> None:
        self._attach = attach
        self.names = (*groups, *([] if preconditioner is None else [_unlike(groups)]))
        self._parameters: list[tuple[nn.Parameter, int | None]] = [
            (p, number) for number, members in enumerate(groups.values()) for p in members
        ]
        if preconditioner is not None:
            in_groups = {id(p) for p, _ in self._parameters}
            self._parameters += [(p, None) for p in preconditioner.parameters if id(p) not in in_groups]
        self._preconditioner = preconditioner
        self._device = self._parameters[0][0].device if self._parameters else torch.device("cpu")
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._seen: list[tuple[int, Tensor]] = []  # group and square, of the micro-batch at hand
        self._sum = self._zeros()
        self._indices: dict[tuple[int, ...], Tensor] = {}  # most passes see their parameters in the same order

    def begin_step(self, *, measure: bool) -> None:
        """Forget the last step. Hooks are attached only while steps are measured."""
        self._seen.clear()
        self._sum = self._zeros()
        if measure and not self._handles:
            self._handles = [
                self._attach(p, partial(self._see, parameter=p, group=group)) for p, group in self._parameters
            ]
        elif not measure and self._handles:
            self.close()

    def end_micro_batch(self, *, size: int, loss_scale: float) -> None:
        """Take in what the hooks saw of ``size`` samples whose mean loss was times ``loss_scale`` in backward."""
        self._sum = self._sum + self._by_group(self._seen) * (size / loss_scale**2)
        self._seen.clear()

    def read(self, *, grad_scale: float = 1.0) -> GroupReading:
        """Without a host synchronisation. ``grad_scale`` is what ``.grad`` is multiplied by (an AMP scaler)."""
        with_gradient = [(p, group, p.grad) for p, group in self._parameters if p.grad is not None]
        squares = [
            square for p, group, gradient in with_gradient for square in self._squares(shard_of(gradient), p, group)
        ]
        mean = self._by_group(squares) / grad_scale**2
        if self._preconditioner is not None:
            settled = self._preconditioner.is_settled((p for p, *_ in with_gradient), self._device)
            mean[-1] = torch.where(settled, mean[-1], torch.nan)
        return GroupReading(weighted_sq_sum=self._sum, mean_grad_sq=mean)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen.clear()

    def _see(self, gradient: Tensor, *, parameter: nn.Parameter, group: int | None) -> None:
        self._seen += self._squares(gradient, parameter, group)

    def _squares(self, gradient: Tensor, parameter: nn.Parameter, group: int | None) -> list[tuple[int, Tensor]]:
        found = [] if group is None else [(group, _square(gradient))]
        if self._preconditioner is not None:
            weighed = self._preconditioner.root_times(gradient, parameter)
            found.append((len(self.names) - 1, _square(weighed)))
        return found

    def _by_group(self, squares: list[tuple[int, Tensor]]) -> Tensor:
        """Their sums by group: shape [groups]."""
        if not squares:
            return self._zeros()
        order = tuple(group for group, _ in squares)
        if order not in self._indices:
            if len(self._indices) >= _MOST_ORDERS:
                self._indices.clear()
            self._indices[order] = torch.tensor(order, device=self._device)
        stacked = torch.stack([square.to(self._device) for _, square in squares])
        return self._zeros().index_add_(0, self._indices[order], stacked)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.names), dtype=torch.float64, device=self._device)


def _square(gradient: Tensor) -> Tensor:
    """|gradient|^2 in float64, 0-D, on the gradient's device."""
    return norm(gradient).double().square()


def _unlike(groups: Iterable[str]) -> str:
    """The preconditioned group's name, unlike those of ``groups``."""
    return PRECONDITIONED if PRECONDITIONED not in groups else f"({PRECONDITIONED})"
