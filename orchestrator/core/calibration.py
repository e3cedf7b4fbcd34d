"""How do the moments of a cheap part of the parameters tell those of the whole? Fitted while both are read.

The noise scale of the normalisation layers follows that of the whole model (Gray et al. 2024, arXiv:2411.00999), with a
factor that is each model's own. Here tr(Sigma) and |G|^2 of the part each get their own factor, so that what is read
afterwards stays a pair of moments, signed and unbiased as far as the factors hold, and is averaged like any other. A
factor is a ratio of sums, for a mean of ratios has no expectation where |G|^2 of a step may be negative.

The factors' error is not part of the noise scale's interval later on; the fit says how large it is, and where it is too
large there are no factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.core.intervals import Blocks, ratio_interval

# The first half is let go. A model that has just begun to learn moves the slope by multiples (of a small transformer
# from 5.9 to 2.6 between the first and the second thousand samples), and a fit over it holds for nothing that follows.
COUNTED_FROM = 0.5
BLOCKS = 32  # of the half that counts, by samples: enough for an interval that sees a drift
CONFIDENCE = 0.95
WIDEST = 0.25
"""Half the slope's interval over the slope, at most: half of what the default dead-band lets pass (1.5-fold)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """Both are read during the run's first ``samples`` samples, and the second half of them is fitted."""

    samples: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"a calibration needs at least one sample, got samples={self.samples}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBlock:
    """Sums over the ``steps`` steps of one block, each weighted by its samples: N |G|^2 and N tr(Sigma)."""

    number: int
    steps: int
    samples: int
    whole_grad_sq: float
    whole_trace_cov: float
    part_grad_sq: float
    part_trace_cov: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationState:
    """What was read so far, oldest first; the last block may still be filling."""

    blocks: tuple[CalibrationBlock, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFit:
    """The whole's moments over the part's, and their ratio ``slope``: what the part's noise scale is multiplied by.

    ``spread`` is half the width of the slope's 95 % interval over the slope. ``None`` is unknown. ``problem`` says why
    the factors cannot be used, and is ``None`` where they can.
    """

    grad_sq_ratio: float | None = None
    trace_cov_ratio: float | None = None
    slope: float | None = None
    slope_low: float | None = None
    slope_high: float | None = None
    spread: float | None = None
    steps: int = 0
    samples: int = 0
    problem: str | None = None


def absorb(
    state: CalibrationState,
    settings: CalibrationSettings,
    *,
    whole: tuple[float, float],
    part: tuple[float, float],
    samples_seen: int,
    batch: int,
) -> CalibrationState:
    """The memory after a step of ``batch`` samples that ended at ``samples_seen``; moments are (|G|^2, tr(Sigma)).

    A step counts where it began, and not at all in the first half.
    """
    first = math.ceil(COUNTED_FROM * settings.samples)
    counted = samples_seen - batch - first
    if counted < 0:
        return state
    number = counted * BLOCKS // max(1, settings.samples - first)
    step = CalibrationBlock(
        number=number,
        steps=1,
        samples=batch,
        whole_grad_sq=batch * whole[0],
        whole_trace_cov=batch * whole[1],
        part_grad_sq=batch * part[0],
        part_trace_cov=batch * part[1],
    )
    if not state.blocks or state.blocks[-1].number != number:
        return CalibrationState(blocks=(*state.blocks, step))
    return CalibrationState(blocks=(*state.blocks[:-1], _join(state.blocks[-1], step)))


def fit(state: CalibrationState) -> CalibrationFit:
    """The factors, and whether they can be used; the slope is that of Gray et al. 2024, arXiv:2411.00999.

    With sums Q of |G|^2 and T of tr(Sigma), of the whole and of the part p, the factors are Q / Q_p and T / T_p, and
    the slope is their ratio s = (T / T_p) Q_p / Q. Its interval is Fieller's for X / Q with X = (T / T_p) Q_p. As T and
    T_p are known far better than Q and Q_p, and are never near zero, their noise enters X to first order:
    x_j = (T / T_p) (q_pj + Q_p (t_j / T - t_pj / T_p)) for block j, which sums to X.
    """
    if not state.blocks:
        return CalibrationFit(problem="no step of its second half was measured")
    steps, samples, grad_sq, trace_cov, part_grad_sq, part_trace_cov = np.array(
        [
            (b.steps, b.samples, b.whole_grad_sq, b.whole_trace_cov, b.part_grad_sq, b.part_trace_cov)
            for b in state.blocks
        ]
    ).T
    q, t, q_part, t_part = (float(sums.sum()) for sums in (grad_sq, trace_cov, part_grad_sq, part_trace_cov))
    found = CalibrationFit(
        grad_sq_ratio=_ratio(q, q_part),
        trace_cov_ratio=_ratio(t, t_part),
        steps=int(steps.sum()),
        samples=int(samples.sum()),
    )
    if found.trace_cov_ratio is None or not found.trace_cov_ratio > 0:
        return replace(found, problem="tr(Sigma) of the part, or of the whole, is not positive")
    if found.grad_sq_ratio is None or not (q > 0 and q_part > 0):
        means = f"{q / found.samples:.3g} of the whole, {q_part / found.samples:.3g} of the part"
        return replace(found, problem=f"|G|^2 is not positive: {means}")
    slope = found.trace_cov_ratio / found.grad_sq_ratio
    x = found.trace_cov_ratio * (part_grad_sq + q_part * (trace_cov / t - part_trace_cov / t_part))
    low, high = ratio_interval(
        Blocks(x=x, y=grad_sq, weights=samples / samples.sum(), variances=(samples, steps)),
        confidence=CONFIDENCE,
        groups=len(state.blocks),
    )
    found = replace(found, slope=slope, slope_low=low, slope_high=high)
    if low is None or high is None:
        return replace(found, problem="the slope's interval has no upper end")
    spread = 0.5 * (high - low) / slope
    found = replace(found, spread=spread)
    if spread > WIDEST:
        return replace(found, problem=f"the slope's interval is wider than {100 * WIDEST:g} % to either side")
    return found


def scaled(moments: tuple[float, float], by: CalibrationFit) -> tuple[float, float]:
    """The whole's (|G|^2, tr(Sigma)) from the part's; ``by`` can be used."""
    assert by.grad_sq_ratio is not None, "a fit without a problem has factors"
    assert by.trace_cov_ratio is not None, "a fit without a problem has factors"
    return by.grad_sq_ratio * moments[0], by.trace_cov_ratio * moments[1]


def _join(one: CalibrationBlock, other: CalibrationBlock) -> CalibrationBlock:
    return CalibrationBlock(
        number=one.number,
        steps=one.steps + other.steps,
        samples=one.samples + other.samples,
        whole_grad_sq=one.whole_grad_sq + other.whole_grad_sq,
        whole_trace_cov=one.whole_trace_cov + other.whole_trace_cov,
        part_grad_sq=one.part_grad_sq + other.part_grad_sq,
        part_trace_cov=one.part_trace_cov + other.part_trace_cov,
    )


def _ratio(whole: float, part: float) -> float | None:
    found = whole / part if part else math.nan
    return found if math.isfinite(found) else None
