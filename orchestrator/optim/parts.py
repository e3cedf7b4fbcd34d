"""Optimizers whose update depends on how the parts of a batch differ, and how they are told of the parts.

A part is a fixed number of consecutive samples; the last of a batch may be smaller. Before every step the optimizer is
given, for each parameter, the average over the parts of what ``of_part`` makes of a part's mean gradient, weighted by
the parts' samples. A ``Session`` does it by itself, with the parts that ``optimizer.part_samples`` sets. In a plain
loop::

    sums = {p: 0.0 for p in model.parameters()}
    for part in parts:  # equal ones
        gradients = torch.autograd.grad(loss_function(model, part), list(sums))
        for p, g in zip(sums, gradients):
            sums[p] = sums[p] + optimizer.of_part(g) / len(parts)
            p.grad = g / len(parts) if p.grad is None else p.grad + g / len(parts)
    optimizer.take_parts(sums)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.optim.layers import loss_of, moving


class PartsOptimizer(torch.optim.Optimizer):
    """Moves one parameter tensor after the other, each by its gradient and by what was averaged over the parts."""

    per_element: bool  # whether ``of_part`` keeps the gradient's shape, or makes one number of it
    degree: int  # ``of_part(c * gradient)`` is ``c ** degree * of_part(gradient)`` for c > 0
    # On the class, since a copied or unpickled optimizer is given none.
    _averages: Mapping[Tensor, Tensor] | None = None
    _grad_scale: float | Tensor = 1.0

    def of_part(self, gradient: Tensor) -> Tensor:
        """What is averaged over the parts, in float64: of the gradient's shape if ``per_element``, else 0-D.

        ``gradient`` is that of one part's mean loss. Nothing waits for the device.
        """
        raise NotImplementedError

    def take_parts(self, averages: Mapping[Tensor, Tensor], *, grad_scale: float | Tensor = 1.0) -> None:
        """Say how the parts of the step to come differ: for each parameter, ``of_part`` averaged over them.

        ``grad_scale`` is what ``.grad`` has been multiplied by beside the gradients that ``of_part`` was given: the
        factor of a clipping (0-D or a number). Raises ``ValueError`` for a parameter that is missing while it has a
        gradient, and for an average of another shape than ``of_part`` gives.
        """
        for parameter in self._with_gradient():
            if parameter not in averages:
                raise ValueError(
                    f"{self._name}.take_parts was given nothing for a parameter of shape {tuple(parameter.shape)} that "
                    "has a gradient: average of_part() over the parts for every parameter"
                )
            found, wanted = tuple(averages[parameter].shape), self.shape_of(parameter)
            if found != wanted:
                raise ValueError(
                    f"{self._name}.take_parts was given an average of shape {found} for a parameter of shape "
                    f"{tuple(parameter.shape)}, and its of_part() gives {wanted}: average what of_part() returns"
                )
        self._averages, self._grad_scale = averages, grad_scale

    def shape_of(self, parameter: Tensor) -> tuple[int, ...]:
        """Of what ``of_part`` makes of this parameter's gradient."""
        return tuple(parameter.shape) if self.per_element else ()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given.

        What ``take_parts`` was given serves one step. Raises ``RuntimeError`` where it was not called. Nothing waits
        for the device. Gradients are left as they are.
        """
        loss = loss_of(closure)
        averages, self._averages = self._averages, None
        moves = [(group, *pair) for group in self.param_groups for pair in moving(group, optimizer=self._name)]
        if averages is None:
            averages = self._of_nothing()
        scale = self._grad_scale**self.degree
        for group, parameter, gradient in moves:
            self._move(parameter, gradient, averages[parameter] * scale, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _of_nothing(self) -> Mapping[Tensor, Tensor]:
        # torch.distributed.checkpoint fills the state of a new optimizer by a step with gradients of zero and a rate
        # of zero, to see of what it is made. Whatever the parts were, the weights stay as they are; decay and counts go
        # into the state, which is thrown away or overwritten by what is loaded.
        moved = self._with_gradient()
        if any(bool(p.grad.any()) for p in moved if p.grad is not None):
            raise RuntimeError(
                f"{self._name}.step() does not know how the parts of this step's batch differ: call take_parts() "
                "before each step, or train with a Session, which does so by optimizer.part_samples"
            )
        return {p: torch.zeros(self.shape_of(p), dtype=torch.float64, device=p.device) for p in moved}

    def _with_gradient(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @property
    def _name(self) -> str:
        return type(self).__name__
