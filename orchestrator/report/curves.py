"""Which points of a curve are drawn: of many steps, of noisy values, of stairs, and where nothing is known?"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

POINTS = 700  # of one line: about as many as the figure has pixels across, and small enough for a README


def thin(x: Floats, *lines: Floats, points: int = POINTS) -> NDArray[np.intp]:
    """Indices of about ``points`` entries that look the same as all: of each bin of ``x`` (rising) the lowest and the
    highest of each line, and both ends of ``x``.

    Where two known neighbours among them would bridge something unknown, that is kept too.
    """
    if len(x) <= points:
        return np.arange(len(x))
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], max(1, points // (2 * len(lines))) + 1))
    kept = {0, len(x) - 1}
    for line, (begin, end) in itertools.product(lines, itertools.pairwise(edges.tolist())):
        if not np.isnan(line[begin:end]).all():
            kept |= {begin + int(np.nanargmin(line[begin:end])), begin + int(np.nanargmax(line[begin:end]))}
    gaps = [np.flatnonzero(np.isnan(line)) for line in lines]
    bridged: set[int] = {-1}
    while bridged:  # what is kept for one line may be known in another
        at = np.array(sorted(kept), dtype=np.intp)
        bridged = {int(i) for line, gap in zip(lines, gaps, strict=True) for i in _bridged(line[at], gap, at)}
        kept |= bridged
    return at


def _bridged(kept: Floats, gaps: NDArray[np.intp], at: NDArray[np.intp]) -> NDArray[np.intp]:
    """The first of the unknown ``gaps`` between each two neighbours of ``at`` whose values ``kept`` are both known."""
    if not len(gaps):
        return gaps
    first = gaps[np.minimum(np.searchsorted(gaps, at[:-1]), len(gaps) - 1)]
    known = ~np.isnan(kept)
    return first[known[:-1] & known[1:] & (first > at[:-1]) & (first < at[1:])]


def band(x: Floats, low: Floats, high: Floats) -> tuple[tuple[Floats, Floats, Floats], tuple[Floats, Floats]]:
    """An interval cut into its bounded stretches ``(x, low, high)`` and those without an upper end ``(x, low)``.

    A stretch ends in NaN. One that has an open end at either side is open; nothing is drawn where ``low`` is unknown.
    """
    known, bounded = ~np.isnan(low), ~np.isnan(low) & ~np.isnan(high)
    closed = bounded[:-1] & bounded[1:]
    open_ = known[:-1] & known[1:] & ~closed
    both, one = stretches(closed), stretches(open_)
    return (take(x, both), take(low, both), take(high, both)), (take(x, one), take(low, one))


def smooth(values: Floats, weights: Floats, *, half_life: float) -> Floats:
    """Running mean in which a value counts half after ``half_life`` of weight; the unknown are passed over."""
    total = weight = 0.0
    result = np.full(len(values), np.nan)
    for i, (value, w) in enumerate(zip(values.tolist(), weights.tolist(), strict=True)):
        if math.isfinite(value):
            keep = 0.5 ** (w / half_life)
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        if weight:
            result[i] = total / weight
    return result


def held(values: Floats, seen: Floats) -> tuple[Floats, Floats]:
    """What is held between changes: the samples at which each value begins, then the end with the last value again."""
    begins = np.append(0.0, seen[:-1])
    at = np.flatnonzero(np.append(True, np.diff(values) != 0))
    return np.append(begins[at], seen[-1]), np.append(values[at], values[-1])


def stretches(segments: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Indices of the points along each stretch of segments (i, i + 1) that are true, -1 after each."""
    found: list[int] = []
    for i, kept in enumerate(segments.tolist()):
        if kept:
            found += [i + 1] if found and found[-1] == i else [i, i + 1]
        elif found and found[-1] == i:
            found.append(-1)
    if found and found[-1] != -1:
        found.append(-1)
    return np.array(found, dtype=np.intp)


def take(values: Floats, at: NDArray[np.intp]) -> Floats:
    """The values at the indices that ``stretches`` gave, NaN for -1: a line breaks there."""
    return np.append(values, math.nan)[at]
