"""Hooks that hand over, for every call of a layer, its input and the gradient at its output; attached while measuring.

The input is kept as autograd keeps what it saves for the backward pass: under activation checkpointing it is computed
again when its turn comes, and nothing is held meanwhile. The gradient at the output of a module is not yet divided by
the number of ranks, since DDP works on the parameters' gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor

from orchestrator.errors import MeasureError
from orchestrator.measure.coverage import Layer


@final
class Taps:
    """``see(layer, inputs, deltas)`` is called in the backward pass, once for each call of a layer in the forward."""

    def __init__(self, layers: Iterable[Layer], see: Callable[[Layer, Tensor, Tensor], None]) -> None:
        self._layers = tuple(layers)
        self._see = see
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self.calls: Counter[int] = Counter()
        """By a parameter's id: no fewer than its uses in the micro-batch at hand, known before its first gradient."""

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        if not self._handles:
            self._handles = [
                layer.module.register_forward_hook(self._hook(layer), with_kwargs=True) for layer in self._layers
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.calls.clear()

    def _hook(self, layer: Layer) -> Callable[..., None]:
        def called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if not _in_backward():  # there, a checkpointed layer is only called again
                # Counted without gradients too: reentrant checkpointing runs its first pass so.
                self.calls.update(id(p) for p in layer.parameters.values())
            if not (torch.is_grad_enabled() and output.requires_grad):
                return
            (inputs,) = (*args, *kwargs.values())  # all layers with a rule take one
            kept: list[Any] = [_Kept.apply(self._anchor, inputs.detach()).grad_fn]

            def arrived(deltas: Tensor) -> None:
                if not kept:
                    raise MeasureError(
                        f"a second backward pass through {layer.path}, as by torch.autograd.grad in the loss or "
                        "retain_graph: a sample's gradient is then no longer read off one pass; write "
                        "measure.estimator: micro_batch"
                    )
                (found,) = kept.pop().saved_tensors
                self._see(layer, found, deltas)

            output.register_hook(arrived)

        return called


class _Kept(torch.autograd.Function):
    """A node whose only purpose is what it saves; no gradient ever comes through it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        raise AssertionError("nothing is computed from what is kept")


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.module_tracker asks it
