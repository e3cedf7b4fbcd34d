"""Do the layers that are read account for all of each parameter's gradient? Found out once, at the first micro-batch.

A parameter may be used past its module: by a function that is handed the weight, or inside compiled code. Its gradient
is then more than what the layers' hooks saw, and a reading would be silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from orchestrator.errors import MeasureError
from orchestrator.measure.coverage import Coverage
from orchestrator.measure.example_norms import ExampleGradients
from orchestrator.measure.norms import norm, widened

_OF_ITS_OWN = 0.05  # what rounding in half precision may come to, of a parameter's gradient
_OF_ALL = 0.01  # and of the whole; a gradient that is nothing but rounding, as a key's bias has, is below


@final
class Completeness:
    """Compares sums while ``open``: until a micro-batch with a finite gradient has been judged."""

    def __init__(self, coverage: Coverage) -> None:
        self._coverage = coverage
        self._accounted: dict[int, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._found: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # |unaccounted|, |gradient|
        self.open = True

    def begin_step(self) -> None:
        self._accounted, self._found = {}, []
        if self.open and not self._handles:
            self._handles = [p.register_hook(self._comparison(p)) for p in self._coverage.measured]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def account(self, parameter: nn.Parameter, gradients: ExampleGradients) -> None:
        """Take in what one use of ``parameter`` adds to its gradient."""
        total, before = gradients.total(), self._accounted.get(id(parameter))
        self._accounted[id(parameter)] = total if before is None else before + total

    def differences(self) -> list[Tensor]:
        """|gradient that no layer accounts for| and |gradient| of each parameter in turn, 0-D."""
        return [number for _, apart, whole in self._found for number in (apart, whole)]

    def judge(self, numbers: list[float]) -> None:
        """Takes ``differences`` as numbers. Raises ``MeasureError`` where they are too large."""
        if not numbers or not all(map(math.isfinite, numbers)):
            return
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        all_of_it = math.hypot(*(whole for _, whole in pairs))
        unaccounted = {
            self._coverage.names[id(parameter)]: apart / whole
            for (parameter, *_), (apart, whole) in zip(self._found, pairs, strict=True)
            if apart > _OF_ITS_OWN * whole and apart > _OF_ALL * all_of_it
        }
        self.open = False
        self.close()
        self._found = []
        if unaccounted:
            shown = ", ".join(f"{name} ({100 * part:.0f} %)" for name, part in unaccounted.items())
            raise MeasureError(
                "measure.estimator reads gradients sample by sample from the layers' inputs and outputs, and these do "
                f"not account for all of the gradient of {shown}: such a parameter is used past its module, as by "
                "torch.nn.functional with module.weight or in a function under torch.compile, or a hook changes its "
                "gradient; call the module itself, or name all modules that hold it in measure.leave_out, or write "
                "measure.estimator: micro_batch"
            )

    def _comparison(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def compare(gradient: Tensor) -> None:
            with torch.no_grad():
                whole = widened(gradient)
                seen = self._accounted.pop(id(parameter), None)
                apart = whole if seen is None else whole - seen.view_as(whole)
                self._found.append((parameter, norm(apart), norm(whole)))

        return compare
