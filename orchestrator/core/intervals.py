"""What interval does the ratio of two averages have, when both come from the same weighted, correlated blocks?

Three pieces: Student's t for any degrees of freedom, the variance of a weighted mean of blocks that differ in weight
and are correlated with their neighbours, and Fieller's set for a ratio. It knows nothing of gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# With fewer groups the t quantile grows faster than the bias shrinks; what correlation is left is corrected for.
FEWEST_GROUPS = 6
HIDDEN = 0.2
MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)


def t_quantile(p: float, dof: float) -> float:
    """The ``p`` quantile of Student's t with ``dof`` degrees of freedom (any real number of at least 1).

    Newton's method on the regularised incomplete beta function, started from the expansion about the normal
    quantile (Abramowitz and Stegun 26.7.5). Raises ``ValueError`` outside 0.5 <= p < 1 or below one degree.
    """
    if not (0.5 <= p < 1 and dof >= 1):
        raise ValueError(f"a t quantile needs 0.5 <= p < 1 and dof >= 1, got p={p}, dof={dof}")
    z = NormalDist().inv_cdf(p)
    if p == 0.5 or dof > 1e7:  # beyond, the normal quantile differs by less than the gamma functions' rounding
        return z
    log_norm = math.lgamma(0.5 * (dof + 1)) - math.lgamma(0.5 * dof) - 0.5 * math.log(dof * math.pi)
    z2 = z * z
    t = z + z * (z2 + 1) / (4 * dof) + z * ((5 * z2 + 16) * z2 + 3) / (96 * dof * dof)
    log_goal = math.log1p(-p)
    for _ in range(60):
        # Newton on the logarithm of the tail, which is concave in t: it converges from either side.
        tail = _upper_tail(t, dof, log_norm)
        log_density = log_norm - 0.5 * (dof + 1) * math.log1p(t * t / dof)
        step = (math.log(tail) - log_goal) * tail * math.exp(-log_density)
        t = max(t + step, 0.5 * t)
        if abs(step) <= 1e-6 * t:  # convergence is quadratic: what is left is below 1e-11
            break
    return t


def _upper_tail(t: float, dof: float, log_norm: float) -> float:
    """P(T > t) for t > 0, half the incomplete beta function I_x(dof/2, 1/2) at x = dof / (dof + t^2)."""
    x, rest = dof / (dof + t * t), t * t / (dof + t * t)
    # x^(dof/2) (1-x)^(1/2) / B(dof/2, 1/2), written with the constant of the t density.
    front = 0.5 * math.exp(0.5 * dof * math.log(x) + 0.5 * math.log(rest * dof) + log_norm)
    if x < (0.5 * dof + 1) / (0.5 * dof + 2.5):
        return front * _beta_fraction(0.5 * dof, 0.5, x) / (0.5 * dof)
    return 0.5 - front * _beta_fraction(0.5, 0.5 * dof, rest) / 0.5


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (Abramowitz and Stegun 26.5.8), by Lentz's method."""
    c = 1.0
    h = d = 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    for m in range(1, 400):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1.0 + term * d)
            c = 1.0 + term / c
            h *= c * d
        if abs(c * d - 1.0) < 1e-13:
            break
    return h


def fieller(x: float, y: float, v_xx: float, v_xy: float, v_yy: float, t: float) -> tuple[float | None, float | None]:
    """``(low, high)`` of the non-negative part of {r: (x - r y)^2 <= t^2 (v_xx - 2 r v_xy + r^2 v_yy)}.

    ``x`` and ``y`` are averages; ``v_xx``, ``v_xy`` and ``v_yy`` the (co)variances of those averages. ``high`` is
    ``None`` when the set has no upper end; then ``low`` is ``None`` too if the set holds zero. Both are ``None`` when
    no non-negative ratio fits (``y`` is negative beyond doubt). E. C. Fieller 1954, J. R. Stat. Soc. B 16:175,
    doi:10.1111/j.2517-6161.1954.tb00159.x.
    """
    a = y * y - t * t * v_yy
    b = x * y - t * t * v_xy
    c = x * x - t * t * v_xx
    root = math.sqrt(max(b * b - a * c, 0.0))  # below zero by rounding only, wherever the root is used
    if a > 0 and y > 0 and b + root >= 0:
        return max((b - root) / a, 0.0), (b + root) / a
    if a > 0 or c <= 0:
        return None, None
    # Here a <= 0 < c, so the roots have opposite signs and the set runs from the positive one to infinity.
    return (c / (b + root) if b + root > 0 else None), None


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Consecutive blocks of two series, oldest first; every array has one entry a block.

    ``x`` and ``y`` hold each block's part of the weighted average, so that their sums are the averages; ``weights``
    sum to one. ``variances`` are two models, each up to a factor, of what each block's part adds to the variance of
    the average when blocks are independent; the truth is taken to be a mixture of them.
    """

    x: Array
    y: Array
    weights: Array
    variances: tuple[Array, Array]


def ratio_interval(blocks: Blocks, *, confidence: float, groups: int) -> tuple[float | None, float | None]:
    """Fieller's set (doi:10.1111/j.2517-6161.1954.tb00159.x) for sum(x) / sum(y), ``None`` meaning what it does there.

    Blocks are joined into at most ``groups`` groups, each as long as the measured autocorrelation asks. The variance
    is the sum of the groups' squared residuals, each multiplied so that it is unbiased (as in MacKinnon and White's
    HC2) under a working covariance: the blocks' modelled variances, and between blocks i and j the measured
    autocorrelation to the power |i - j|. The degrees of freedom match the variance of that sum (Satterthwaite; Bell
    and McCaffrey 2002). So what correlation the groups could not hide widens the interval instead of being ignored.
    """
    # Newest first, so that a group cut short by the end of the series is the oldest, which weighs least.
    x, y, weights = blocks.x[::-1], blocks.y[::-1], blocks.weights[::-1]
    # Scaled to order one, since the squares of squared gradients overflow early.
    x_unit, y_unit = float(np.abs(x).max()) or 1.0, float(np.abs(y).max()) or 1.0
    x, y = x / x_unit, y / y_unit
    x_mean, y_mean = float(x.sum()), float(y.sum())
    # The combination whose mean is zero at the estimated ratio; its noise is what the interval is about.
    residuals = y_mean * x - x_mean * y
    shares = _shares(residuals, *(v[::-1] / v.sum() for v in blocks.variances))
    effective = 1.0 / float(shares @ shares)
    if effective < 2.0:
        return None, None
    correlation = _autocorrelation(residuals, effective)
    starts = _group_starts(shares, _blocks_to_join(correlation, effective), groups)
    if len(starts) < 2:
        return None, None
    weights = np.add.reduceat(weights, starts)
    dx = np.add.reduceat(x, starts) - weights * x_mean
    dy = np.add.reduceat(y, starts) - weights * y_mean
    factors, dof = _residual_factors(shares, weights, correlation, starts)
    t = t_quantile(0.5 + 0.5 * confidence, dof)
    low, high = fieller(
        x_mean, y_mean, float(factors @ (dx * dx)), float(factors @ (dx * dy)), float(factors @ (dy * dy)), t
    )
    unit = x_unit / y_unit
    return _finite(low, unit), _finite(high, unit)


def _finite(value: float | None, unit: float) -> float | None:
    return None if value is None or not math.isfinite(value * unit) else value * unit


def _shares(residuals: Array, first: Array, second: Array) -> Array:
    """The mixture of the two models (each summing to one) that makes the residuals most likely, if normal."""
    if np.abs(first - second).max() < 1e-9:  # steps of one size: the models agree
        return first
    mixtures: list[Array] = [share * first + (1.0 - share) * second for share in MIXTURES]
    counted = first + second > 1e-9  # what has faded away says nothing, and would take logarithms of zero
    squares = residuals[counted] ** 2
    if not squares.any():
        return mixtures[len(mixtures) // 2]

    def surprise(mixture: Array) -> float:
        variances = np.maximum(mixture[counted], 1e-12)
        return float(np.log(variances).mean()) + math.log(float((squares / variances).mean()))

    return min(mixtures, key=surprise)


def _autocorrelation(residuals: Array, effective: float) -> float:
    """Lag-one autocorrelation of the blocks, free of its small-sample bias, and not below zero.

    The oldest block is left out: it may hold everything older than the others, and is no neighbour like them. A
    residual is taken from the mean, which biases the plain estimate by -(1 + 4 r) / n (Marriott and Pope 1954).
    A negative value is taken as none: it would narrow the interval, on the strength of a noisy number.
    """
    recent = residuals[:-1]
    scale = float(recent @ recent) - 0.5 * float(recent[0] ** 2 + recent[-1] ** 2)
    if scale <= 0:
        return 0.0
    plain = float(recent[1:] @ recent[:-1]) / scale
    corrected = (effective * plain + 1.0) / max(effective - 4.0, 1.0)
    return min(max(corrected, 0.0), 1.0 - 1.0 / len(residuals))


def _blocks_to_join(correlation: float, effective: float) -> int:
    """The fewest neighbours to join so that the groups' correlation hides at most a fifth of the variance."""
    longest = max(1, int(effective / FEWEST_GROUPS))
    one_step = 2.0 * correlation / (1.0 - correlation) ** 2
    whole = (1.0 + correlation) / (1.0 - correlation)
    for length in range(1, longest):
        if one_step * (1.0 - correlation**length) / length <= HIDDEN * whole:
            return length
    return longest


def _group_starts(shares: Array, length: int, groups: int) -> Array:
    """Where each group begins: whole runs of ``length`` blocks, joined so that groups carry equal shares."""
    begins = np.arange(0, len(shares), length)
    runs = np.add.reduceat(shares, begins)
    middles = np.cumsum(runs) - 0.5 * runs
    group = np.minimum(middles * groups, groups - 1).astype(np.int64)
    return begins[np.concatenate(([True], group[1:] != group[:-1]))]


def _residual_factors(shares: Array, weights: Array, correlation: float, starts: Array) -> tuple[Array, float]:
    """What to multiply each group's squared residual with so that their sum is unbiased, and its dof."""
    at = np.arange(len(shares))
    sd = np.sqrt(shares)
    between_blocks = (correlation**at)[np.abs(at[:, None] - at)] * sd[:, None] * sd
    between = np.add.reduceat(np.add.reduceat(between_blocks, starts, axis=0), starts, axis=1)
    total = float(between.sum())
    with_mean = weights[:, None] * between.sum(axis=0)
    of_residuals = between - with_mean - with_mean.T + total * (weights[:, None] * weights)
    variance = of_residuals.diagonal()
    factors = np.divide(between.diagonal(), variance, out=np.zeros(len(variance)), where=variance > 0)
    factors *= total / float(factors @ variance)
    dof = total * total / float(factors @ (of_residuals * of_residuals) @ factors)
    return factors, max(dof, 1.0)  # at least one by Cauchy and Schwarz, up to rounding
