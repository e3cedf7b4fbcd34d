"""How large is the noise scale where the loss is not equally curved in all directions, and how sure are we?

B_noise = tr(H Sigma) / (G' H G) weighs noise and gradient by the Hessian H of the loss, and epsilon_max =
|G|^2 / (G' H G) is the best learning rate of plain gradient descent without noise: a step epsilon lowers a quadratic
loss the most at epsilon_max / (1 + B_noise / B). McCandlish et al. 2018, arXiv:1812.06162, equations 2.6 to 2.8.

The readings all weigh alike. They are independent of each other where no two share a sample: where a measurement takes
fewer samples than the data set has, and ends within the epoch of its stream in which it began. Past the end the samples
come again in another order, and the interval is too narrow for the distribution that they are drawn from. H may be
indefinite: readings, and even the truth, may be negative, and then there is no such noise scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.core.intervals import Blocks, ratio_interval
from orchestrator.core.noise import moments_from_sums
from orchestrator.types import Verdict

READINGS = 32  # of one measurement: enough for an interval, and shared out evenly among 2, 4, 8, 16 or 32 ranks
MICRO_BATCHES = 4  # gradients of a reading; beside them one micro-batch for the Hessian, and two products with it


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvatureReading:
    """Unbiased readings from independent samples; each may be negative."""

    trace_hessian_cov: float  # tr(H Sigma)
    grad_hessian_grad: float  # G' H G
    grad_sq: float  # |G|^2

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.trace_hessian_cov, self.grad_hessian_grad, self.grad_sq)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvatureStats:
    """B_noise in samples with its interval, epsilon_max, and the averages they are ratios of; ``None`` is unknown."""

    verdict: Verdict
    noise_scale: float | None = None
    low: float | None = None
    high: float | None = None
    epsilon_max: float | None = None
    trace_hessian_cov: float | None = None
    grad_hessian_grad: float | None = None
    grad_sq: float | None = None
    readings: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvaturePlan:
    """Which stream positions a reading uses: a run of them within one epoch, so that no sample comes twice in it."""

    dataset_size: int
    micro_batch: int

    @property
    def samples(self) -> int:
        """Of one reading."""
        return (MICRO_BATCHES + 1) * self.micro_batch

    def firsts(self, number: int) -> list[int]:
        """First position of each micro-batch of reading ``number``; the last one is for the Hessian."""
        epoch, place = divmod(number, self.dataset_size // self.samples)
        first = epoch * self.dataset_size + place * self.samples
        return [first + i * self.micro_batch for i in range(MICRO_BATCHES + 1)]


def plan_curvature(dataset_size: int, *, micro_batch: int) -> CurvaturePlan:
    """Micro-batches of ``micro_batch`` samples, or fewer where the data set is small.

    Raises ``ValueError`` where it has not even a sample for each.
    """
    if dataset_size <= MICRO_BATCHES:
        raise ValueError(
            f"a reading takes {MICRO_BATCHES + 1} micro-batches of different samples, and the data set has "
            f"{dataset_size}"
        )
    return CurvaturePlan(dataset_size=dataset_size, micro_batch=min(micro_batch, dataset_size // (MICRO_BATCHES + 1)))


def reading_from(
    *, spread_product: float, mean_product: float, sq_sum: float, mean_grad_sq: float, micro_batch: int
) -> CurvatureReading:
    """A reading from ``MICRO_BATCHES`` mean gradients g_j of ``micro_batch`` samples each, and an independent H.

    ``spread_product`` is u' H u of u = sum_j s_j sqrt(b / (n - 1)) (g_j - g) with random signs s_j, whose expectation
    over signs and gradients is tr(H Sigma); ``mean_product`` is g' H g of their mean g, whose expectation is
    G' H G + tr(H Sigma) / (n b). ``sq_sum`` is the sum of the |g_j|^2 and ``mean_grad_sq`` is |g|^2.

    Both are moments of McCandlish et al. 2018, arXiv:1812.06162, equations 2.6 to 2.8; the signs, derived here, save
    n - 1 products and cost variance. Averaged over all 2^n choices of them the two are those of ``core.noise.moments``
    with v' H v in the place of |v|^2.
    """
    batch = MICRO_BATCHES * micro_batch
    found = moments_from_sums(
        weighted_sq_sum=micro_batch * sq_sum, mean_grad_sq=mean_grad_sq, batch=batch, micro_batches=MICRO_BATCHES
    )
    assert found is not None, "a reading has at least two micro-batches"
    return CurvatureReading(
        trace_hessian_cov=spread_product, grad_hessian_grad=mean_product - spread_product / batch, grad_sq=found[0]
    )


def stats(readings: Sequence[CurvatureReading], *, confidence: float) -> CurvatureStats:
    """Ratios of the averages; those that are not finite are left out.

    B_noise and epsilon_max of McCandlish et al. 2018, arXiv:1812.06162, equations 2.6 to 2.8; B_noise within Fieller's
    set (1954, doi:10.1111/j.2517-6161.1954.tb00159.x).
    """
    kept = [reading for reading in readings if reading.is_finite]
    if not kept:
        return CurvatureStats(verdict=Verdict.TOO_NOISY)
    count = len(kept)
    x = np.array([reading.trace_hessian_cov for reading in kept]) / count
    y = np.array([reading.grad_hessian_grad for reading in kept]) / count
    trace, product = float(x.sum()), float(y.sum())
    grad_sq = math.fsum(reading.grad_sq for reading in kept) / count
    equal = np.full(count, 1.0 / count)
    low, high = ratio_interval(
        Blocks(x=x, y=y, weights=equal, variances=(equal, equal)), confidence=confidence, groups=count
    )
    scale = trace / product if product > 0 and trace >= 0 else None
    return CurvatureStats(
        verdict=Verdict.TOO_NOISY if scale is None or high is None else Verdict.MEASURED,
        noise_scale=scale,
        low=low,
        high=high,
        epsilon_max=grad_sq / product if product > 0 and grad_sq > 0 else None,
        trace_hessian_cov=trace,
        grad_hessian_grad=product,
        grad_sq=grad_sq,
        readings=count,
    )
