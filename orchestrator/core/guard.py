"""Keeps the batch from chasing its own tail.

On an SGD plateau the noise scale is proportional to batch / learning rate (theory G1): a tracker that follows it grows
for ever. So growth is founded on a *credited* noise scale. Before the first growth all of it is credited. After one, a
rise counts only with proof that the growth itself did not make it: the loss falls while the batch stays as it is, or
the noise scale has risen well beyond what batch / learning rate can explain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.types import NoiseStats

_SETTLE = 2  # decision intervals left out after a change: the loss falls then because the batch is new
_BLOCKS = 16
_LEAST_BLOCKS = 4
# The ratchet raises the noise scale as batch / LR at most; an interval that lies above twice that is another cause.
_BEYOND = 2.0
# One-sided 99.9 % quantiles of Student's t for 2 to 14 degrees of freedom (4 to 16 block means about a line). Strict,
# since the question is asked again at every decision.
_T_999 = (22.327, 10.215, 7.173, 5.893, 5.208, 4.785, 4.501, 4.297, 4.144, 4.025, 3.930, 3.852, 3.787)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardState:
    """``losses`` are block means since the last change, each over ``block`` decision intervals."""

    grown: bool = False
    batch: int | None = None
    credited: float | None = None  # noise scale, samples
    credited_at: float = 0.0  # batch / learning rate when it was credited
    since_change: int = 0  # decision intervals
    losses: tuple[float, ...] = ()
    block: int = 1
    filling: tuple[float, int] = (0.0, 0)  # sum and count of the block that is being filled


def observe(
    state: GuardState, *, batch: int, lr: float, stats: NoiseStats, mean_loss: float, changed: bool
) -> GuardState:
    """Take in one decision interval: its mean loss, and what is known of the noise at its end.

    ``changed`` says that the batch became another one within it; ``batch`` is the new one then.
    """
    if changed:
        grew = state.batch is not None and batch > state.batch
        state = replace(
            state, grown=state.grown or grew, since_change=0, losses=(), block=1, filling=(0.0, 0)
        )  # fmt: skip
    state = replace(state, batch=batch, since_change=state.since_change + 1)
    if state.since_change > _SETTLE and math.isfinite(mean_loss):
        state = _with_loss(state, mean_loss)
    if not stats.bounded or stats.noise_scale is None or stats.low is None or stats.high is None:
        return state
    temperature = batch / lr if lr > 0 else math.inf
    free = not state.grown or state.credited is None
    if free or loss_is_falling(state.losses) or _beyond_the_ratchet(state, stats.low, temperature):
        return replace(state, credited=stats.noise_scale, credited_at=temperature)
    if state.credited is not None and stats.high < state.credited:
        # A noise scale that surely fell takes its credit along; one low reading does not.
        return replace(state, credited=stats.high, credited_at=temperature)
    return state


def credit(state: GuardState) -> float | None:
    """The noise scale [samples] that growth may be founded on; ``None``: no restriction."""
    return state.credited if state.grown else None


def loss_is_falling(losses: tuple[float, ...]) -> bool:
    """Whether a line through equally spaced block means falls, one-sided at 99.9 %."""
    n = len(losses)
    if n < _LEAST_BLOCKS:
        return False
    centre, mean = (n - 1) / 2, math.fsum(losses) / n
    spread = math.fsum((i - centre) ** 2 for i in range(n))
    slope = math.fsum((i - centre) * (loss - mean) for i, loss in enumerate(losses)) / spread
    residual = math.fsum((loss - mean - slope * (i - centre)) ** 2 for i, loss in enumerate(losses))
    error = math.sqrt(residual / (n - 2) / spread)
    return slope < -_T_999[n - 4] * error


def _beyond_the_ratchet(state: GuardState, low: float, temperature: float) -> bool:
    if state.credited is None or state.credited_at <= 0:
        return False
    explained = state.credited * max(1.0, temperature / state.credited_at)
    return low > _BEYOND * explained


def _with_loss(state: GuardState, mean_loss: float) -> GuardState:
    total, count = state.filling[0] + mean_loss, state.filling[1] + 1
    if count < state.block:
        return replace(state, filling=(total, count))
    losses, block = (*state.losses, total / count), state.block
    if len(losses) == _BLOCKS:
        losses = tuple((a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True))
        block *= 2
    return replace(state, losses=losses, block=block, filling=(0.0, 0))
