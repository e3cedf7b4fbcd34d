"""The truth about gradients of single samples: one backward pass for each, in the precision of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from orchestrator.measure.meter import Meter, Reading

Loss = Callable[[nn.Module, Tensor], Tensor]


def one_by_one(model: nn.Module, inputs: Tensor, loss: Loss, *, of: Iterable[nn.Parameter] | None = None) -> float:
    """Sum over the samples of |gradient|^2 with respect to the parameters ``of``, or to all."""
    parameters = list(model.parameters() if of is None else of)
    found = 0.0
    for i in range(len(inputs)):
        gradients = torch.autograd.grad(loss(model, inputs[i : i + 1]), parameters, allow_unused=True)
        found += sum(float(g.double().square().sum()) for g in gradients if g is not None)
    return found


def read(
    meter: Meter, model: nn.Module, parts: Sequence[Tensor], loss: Loss, *, amp_scale: float = 1.0, keep: bool = False
) -> Reading:
    """The parts as the micro-batches of one measured step, the way the session goes through them."""
    batch = sum(map(len, parts))
    meter.begin_step(measure=True)
    for inputs in parts:
        value = loss(model, inputs)
        weight = amp_scale * len(inputs) / batch
        (value * weight).backward()
        meter.end_micro_batch(size=len(inputs), loss=value.detach(), loss_scale=weight)
    reading = meter.read(grad_scale=amp_scale)
    meter.close()
    if not keep:
        model.zero_grad()
    return reading
