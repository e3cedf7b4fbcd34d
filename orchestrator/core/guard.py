"""Keeps the batch from chasing its own tail.

On an SGD plateau the noise scale is proportional to batch / LR (theory G1): a tracker that follows it grows for ever.
So growth is founded on a *credited* noise scale. Before the first growth all of it is credited. After it, a rise counts
only once there is progress that growth cannot fake: the loss falls while the batch stays as it is, or the noise scale
rises further than batch / LR did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.core.intervals import t_quantile
from orchestrator.types import NoiseStats

_SETTLE = 2  # decision intervals left out after a change: the loss falls then because the batch is new
_REST = 16  # decision intervals after which the noise scale is taken to have followed a change of the batch
_RISE = 8  # decision intervals given to the averages to reach what the noise scale rose to
_BLOCKS = 16
_LEAST_BLOCKS = 6
_LEVEL = 1e-4  # one-sided, of one look at blocks of one interval
_BENEFIT = 2.0  # of the doubt
_FAR = 1e300  # [samples] nothing is known to be larger, and no infinity is saved
_MARGIN = 1.5  # over a long plateau some interval lies above another by luck


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardState:
    """``losses`` are block means since the last change, each over ``block`` decision intervals.

    ``explained`` is the noise scale that batch / LR alone could have brought about: the upper end of an interval, times
    what batch / LR rose by since, ``coldest`` being its highest (temperature is LR / batch).
    """

    grown: bool = False
    batch: int | None = None
    credited: float | None = None
    explained: float | None = None
    coldest: float = 0.0
    rising: int = 0  # decision intervals since the noise scale was first seen to have risen further
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
        # What is explained stays: the noise scale follows the new batch only slowly.
        state = replace(state, grown=state.grown or grew, since_change=0, losses=(), block=1, filling=(0.0, 0))
    state = replace(state, batch=batch, since_change=state.since_change + 1)
    if state.since_change > _SETTLE:
        state = _with_loss(state, mean_loss)
    coldness = batch / lr if lr > 0 else math.inf
    if not 0 < coldness < math.inf:
        return state  # at a rate of zero nothing moves, and nothing can be told
    if state.explained is not None and coldness > state.coldest:
        colder = coldness / state.coldest
        state = replace(state, explained=min(state.explained * colder, _FAR), coldest=coldness)
    if not stats.bounded or stats.noise_scale is None or stats.low is None or stats.high is None:
        return state
    scale, low, high = stats.noise_scale, stats.low, stats.high
    # An early estimate may be too low by as much as its interval says, and growth would stop there: a constant noise
    # scale of 1000 is first read as anything from 280 to 1300. But a very wide interval is not believed to its end.
    worth = min(high, _BENEFIT * scale)
    # A plateau is looked at over and over. Blocks twice as long are asked to be twice as sure, so that the chance of
    # ever being fooled stays bounded however long it lasts.
    falling = loss_is_falling(state.losses, level=_LEVEL / state.block)
    credited, explained, rising = state.credited, state.explained, state.rising
    if falling or credited is None or explained is None:
        return replace(state, credited=worth, explained=high, coldest=coldness, rising=0)
    rose = low > _MARGIN * explained
    if not state.grown or rose:
        credited = worth
    elif high < credited:
        # A noise scale that surely fell takes its credit along; a dip within its interval does not.
        credited, explained = high, explained * (high / credited)
    if rose or rising:
        # The averages are still on their way to what the noise scale rose to: the yardstick stays for a while.
        rising += 1
        renew = rising == _RISE
    else:
        renew = not state.grown or (state.since_change == _REST and high < explained)
    if renew:
        return replace(state, credited=credited, explained=high, coldest=coldness, rising=0)
    return replace(state, credited=credited, explained=explained, rising=rising)


def credit(state: GuardState) -> float | None:
    """The noise scale [samples] that growth may be founded on; ``None``: no restriction."""
    return state.credited if state.grown else None


def loss_is_falling(losses: tuple[float, ...], *, level: float = _LEVEL) -> bool:
    """Whether a line through equally spaced block means falls, one-sided at ``level``."""
    n = len(losses)
    if n < _LEAST_BLOCKS:
        return False
    largest = max(abs(loss) for loss in losses) or 1.0  # squares of a diverging loss would overflow
    y = [loss / largest for loss in losses]
    centre, mean = (n - 1) / 2, math.fsum(y) / n
    spread = math.fsum((i - centre) ** 2 for i in range(n))
    slope = math.fsum((i - centre) * (loss - mean) for i, loss in enumerate(y)) / spread
    residual = math.fsum((loss - mean - slope * (i - centre)) ** 2 for i, loss in enumerate(y))
    error = math.sqrt(residual / (n - 2) / spread)
    return slope < -t_quantile(1 - level, n - 2) * error


def _with_loss(state: GuardState, mean_loss: float) -> GuardState:
    total, count = state.filling[0] + mean_loss, state.filling[1] + 1
    if not math.isfinite(total):
        return state  # a step that broke down says nothing of the trend
    if count < state.block:
        return replace(state, filling=(total, count))
    losses, block = (*state.losses, total / count), state.block
    if len(losses) == _BLOCKS:
        losses = tuple((a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True))
        block *= 2
    return replace(state, losses=losses, block=block, filling=(0.0, 0))
