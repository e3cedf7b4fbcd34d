"""How do the parts of a batch differ, for an optimizer whose update depends on it?

A hook on a parameter sees each part's gradient in the one backward pass that there is, as in ``micro_batch``, here on
every step. What is made of it is added up in one tensor, so that the ranks need a single collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import final

import torch
from torch import Tensor, nn


@final
class PartMeter:
    """Averages ``of_part(gradient)`` over the parts of a step: ``begin_step`` | ``part()``* | ``averages``.

    ``of_part`` gives a float64 tensor of ``shape_of(parameter)``; of c times a gradient, c ** ``degree`` times as much.
    Parameters without a gradient in a part count as zero. ``totals`` is what ``averages`` are views of: each rank has
    its parts in it, and summed over the ranks it holds the whole.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        of_part: Callable[[Tensor], Tensor],
        shape_of: Callable[[Tensor], tuple[int, ...]],
        degree: int,
    ) -> None:
        parameters = list(parameters)
        self._of_part = of_part
        self._degree = degree
        shapes = [shape_of(p) for p in parameters]
        sizes = [prod(shape) for shape in shapes]
        # float64: squares of small gradients would vanish in less, and what is left of two near equals be rounding.
        self.totals = torch.zeros(sum(sizes), dtype=torch.float64, device=parameters[0].device)
        pieces = zip(parameters, self.totals.split(sizes), shapes, strict=True)
        self.averages: Mapping[Tensor, Tensor] = {p: piece.view(shape) for p, piece, shape in pieces}
        self._weight: float | None = None  # of the part at hand
        self._handles = [p.register_hook(self._hook(total)) for p, total in self.averages.items()]

    def begin_step(self) -> None:
        """Forget the last step."""
        self.totals.zero_()

    @contextmanager
    def part(self, *, share: float, loss_scale: float) -> Iterator[None]:
        """Around the backward pass of one part, which has this ``share`` of the step's samples.

        ``loss_scale`` is what the part's mean loss was multiplied by. Passes outside of it are not looked at.
        """
        self._weight = share / loss_scale**self._degree
        try:
            yield
        finally:
            self._weight = None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, total: Tensor) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            # The optimizer refuses sparse gradients, in its own words.
            if self._weight is not None and gradient.layout == torch.strided:
                total.add_(self._of_part(gradient.detach()), alpha=self._weight)

        return see
