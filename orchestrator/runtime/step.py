"""What is known of the step at hand on one rank, and what may be asked of a loss in it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import SessionError
from orchestrator.measure.meter import Reading
from orchestrator.types import BatchPlan


@dataclass(slots=True, kw_only=True)
class Step:
    """Begun afresh for each step, and once more for one that memory ran out in."""

    plan: BatchPlan
    spans: tuple[tuple[int, int], ...]  # (offset from the step's first position, size) of each micro-batch taken here
    parts: int  # over all ranks, that its gradients are compared between
    measured: bool
    loss_scale: float  # of AMP
    began_s: float
    company: tuple[tuple[int, int], ...] = ()  # spans besides, computed with weight zero to keep other ranks company
    micro: tuple[int, bool] | None = None  # size and whether it is the last, until backward() takes it
    weightless: bool = False  # whether the micro-batch at hand is of the company
    done: int = 0  # micro-batches
    rejected: int | None = None  # the most samples to try next, after memory ran out here
    lost: str | None = None  # what was seen of a rank that is gone
    again: bool = False  # the same samples come again
    finished: bool = False

    @property
    def is_given_up(self) -> bool:
        """Whether no further micro-batch of it is computed here."""
        return self.rejected is not None or self.lost is not None

    def take_micro_batch(self) -> tuple[int, bool]:
        """Size of the micro-batch that was handed out, and whether it is the last; raises ``SessionError``."""
        micro, self.micro = self.micro, None
        if micro is None:
            raise SessionError("backward() belongs inside the loop over a step's micro-batches, once for each")
        return micro

    def check_complete(self, number: int) -> None:
        """Raises ``SessionError`` unless every micro-batch was trained, or the step is given up."""
        if self.finished:
            raise SessionError("step() belongs inside the loop over the session, once after a step's micro-batches")
        if self.done != len(self.spans) and not self.is_given_up:
            raise SessionError(
                f"step {number}: {self.done} of {len(self.spans)} micro-batches went through backward()"
            )  # fmt: skip

    def loss_sum(self, reading: Reading) -> float:
        """Over the samples of the micro-batches that this rank took."""
        return sum(size * loss for (_, size), loss in zip(self.spans, reading.losses, strict=False))


def check_loss(loss: Any) -> None:
    """Raises ``SessionError`` for what ``backward`` cannot take."""
    if not isinstance(loss, Tensor):
        raise SessionError(f"the loss is of type {type(loss).__name__}; backward() wants a scalar tensor, the mean")
    if loss.dim() != 0:
        raise SessionError(f"the loss has shape {tuple(loss.shape)}; backward() wants the mean, a scalar")
    if not loss.requires_grad:
        raise SessionError(
            "the loss carries no gradient: it was detached, computed under no_grad, or does not depend on the model"
        )


def backward_seed(loss: Tensor, *, weightless: bool = False) -> Tensor | None:
    """One, which is what autograd begins with by itself; NaN for a loss that is not finite, and zero for a
    ``weightless`` one: the rank that trains on it says so.

    Every rank then sees such a loss in the mean gradient, though its own gradient be finite; but for one that no
    gradient flows back from, which the ranks hear of at their next exchange.
    """
    if weightless:
        return torch.zeros_like(loss)
    if loss.device.type == "cpu" and math.isfinite(loss.item()):
        return None
    return loss.detach() * 0 + 1  # a device is not waited for
