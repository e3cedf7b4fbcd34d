"""How large is the noise scale of each group of parameters, and what else follows from a group's two moments?

A group's squared norms are parts of the whole gradient's, and ``moments`` is linear in them: the groups' tr(Sigma) and
|G|^2 add up to the whole's at every step. The whole's noise scale is therefore a ratio of sums, and no mean of the
groups' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.core import noise
from orchestrator.core.noise import NoiseSettings, NoiseState, moments_from_sums
from orchestrator.types import GradSample, NoiseStats


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSums:
    """One step's sums over all ranks; the sequences have one entry a group, and are empty for an unmeasured step."""

    step: int
    samples_seen: int  # after the step
    batch: int  # samples in it
    micro_batches: int
    lr: float
    weighted_sq_sums: Sequence[float] = ()  # sum of b_i |g_i|^2 over all micro-batches
    mean_grad_sqs: Sequence[float] = ()  # |mean gradient|^2; NaN where the group was not read


def absorb(
    averages: Mapping[str, NoiseState], sums: GroupSums, settings: NoiseSettings, *, names: Sequence[str]
) -> dict[str, NoiseState]:
    """The averages of the groups called ``names`` after a step; a group not met before begins with it.

    What is not finite, or was not measured, leaves a group's averages as they are. Raises ``ValueError`` where the sums
    are of another number of groups.
    """
    if sums.weighted_sq_sums and not len(names) == len(sums.weighted_sq_sums) == len(sums.mean_grad_sqs):
        raise ValueError(
            f"step {sums.step}: {len(sums.weighted_sq_sums)} and {len(sums.mean_grad_sqs)} sums for {len(names)} groups"
        )
    after = {}
    for i, name in enumerate(names):
        found = None
        if sums.weighted_sq_sums:
            found = moments_from_sums(
                weighted_sq_sum=sums.weighted_sq_sums[i],
                mean_grad_sq=sums.mean_grad_sqs[i],
                batch=sums.batch,
                micro_batches=sums.micro_batches,
            )
        sample = GradSample(
            step=sums.step,
            samples_seen=sums.samples_seen,
            batch=sums.batch,
            micro_batches=sums.micro_batches,
            loss=0.0,  # of the whole model, and no part of the averages
            lr=sums.lr,
            grad_sq=None if found is None else found[0],
            trace_cov=None if found is None else found[1],
        )
        after[name] = noise.absorb(averages.get(name) or noise.init(settings), sample, settings)
    return after


def signal_to_noise(stats: NoiseStats) -> float | None:
    """|G|^2 / tr(Sigma), of one sample's gradient; that of a batch is so many times as large. ``None``: unknown."""
    return None if not stats.noise_scale else 1.0 / stats.noise_scale


def diversity(stats: NoiseStats) -> float | None:
    """1 + tr(Sigma) / |G|^2, in samples: how many samples' gradients are as good as summed apart. ``None``: unknown.

    Yin et al. 2018, arXiv:1706.05699, call D = sum |g_i|^2 / |sum g_i|^2 over all n samples the gradient diversity,
    and bound the batch by n D; DiveBatch (Chen et al. 2025, arXiv:2509.16173) sets the batch in proportion to it. With
    G the mean of the g_i and Sigma their covariance (divisor n), sum |g_i|^2 = n (|G|^2 + tr(Sigma)) and
    |sum g_i|^2 = n^2 |G|^2, so n D = 1 + tr(Sigma) / |G|^2. Derived here; it needs no sum over the data set.
    """
    return None if stats.noise_scale is None else 1.0 + stats.noise_scale


def entry(stats: NoiseStats) -> dict[str, float | str | None]:
    """What is written down of a group at a decision; unknown is ``None``."""
    numbers = {
        "grad_sq": stats.grad_sq,
        "trace_cov": stats.trace_cov,
        "noise_scale": stats.noise_scale,
        "noise_low": stats.low,
        "noise_high": stats.high,
        "signal_to_noise": signal_to_noise(stats),
        "diversity": diversity(stats),
    }
    known = {name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()}
    return known | {"verdict": stats.verdict.value}
