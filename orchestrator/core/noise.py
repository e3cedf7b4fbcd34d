"""How large is the gradient noise scale, and how sure are we?

``GradSample -> NoiseState -> NoiseStats``. A step's micro-batch gradients give unbiased readings of tr(Sigma) and
|G|^2 (``moments``). Both are averaged with the same fading weights and divided last: a reading of |G|^2 may be
negative, and averaging ratios or clipping readings would bias the result. The interval is Fieller's, over block means.

While a model learns, both moments fall together over orders of magnitude, and a plain average would be one of the
oldest readings. Each step's pair is therefore divided by the tr(Sigma) of the steps *before* it: a common factor that
knows nothing of the step itself leaves the ratio unbiased and the series level.

McCandlish et al. 2018, arXiv:1812.06162, section 2 and appendix A, extended to micro-batches of any sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from orchestrator.core.intervals import Blocks, ratio_interval
from orchestrator.types import GradSample, NoiseStats, Verdict

# One block, all but the first faded to the block's end: (samples seen at its end, sum of N f, sum of N f^2,
# sum of f^2, sum of N f T, sum of N f Q) over its steps of N samples, T = tr(Sigma) and Q = |G|^2 as read.
Block = tuple[float, float, float, float, float, float]


def moments(sizes: Sequence[int], grad_sqs: Sequence[float], mean_grad_sq: float) -> tuple[float, float] | None:
    """Unbiased ``(grad_sq, trace_cov)`` = (|G|^2, tr(Sigma)) of one step from its micro-batch gradients.

    With equal sizes it is the pair of estimates of McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.
    ``sizes[i]`` samples gave micro-batch i, ``grad_sqs[i]`` is the squared norm of its mean gradient, and
    ``mean_grad_sq`` that of the sample-weighted mean of them all. Any sizes; ``None`` below two micro-batches.
    Raises ``ValueError`` when the sequences differ in length or a size is not positive.
    """
    if len(sizes) != len(grad_sqs) or any(size < 1 for size in sizes):
        raise ValueError(
            f"moments need one squared norm for each micro-batch of at least one sample, got {len(grad_sqs)} norms "
            f"for sizes {list(sizes)}"
        )
    return moments_from_sums(
        weighted_sq_sum=math.fsum(size * sq for size, sq in zip(sizes, grad_sqs, strict=True)),
        mean_grad_sq=mean_grad_sq,
        batch=sum(sizes),
        micro_batches=len(sizes),
    )


def moments_from_sums(
    *, weighted_sq_sum: float, mean_grad_sq: float, batch: int, micro_batches: int
) -> tuple[float, float] | None:
    """``moments`` from what the ranks can sum: ``weighted_sq_sum`` is the sum of size x squared norm.

    McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, for any sizes. Both results are unbiased for every list of
    sizes, unlike the equal-size formula with a mean size. ``trace_cov`` is the weighted sample variance, ``grad_sq``
    may be negative.
    """
    if micro_batches < 2:
        return None
    trace_cov = (weighted_sq_sum - batch * mean_grad_sq) / (micro_batches - 1)
    return mean_grad_sq - trace_cov / batch, trace_cov


# The unit follows faster than the averages fade, so that a falling level is seen, and slowly beside single steps.
_LEVEL_PART = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSettings:
    """How readings are averaged.

    A reading's weight halves with every ``half_life_samples`` samples seen after it. The interval has the nominal
    ``confidence``, from about ``blocks`` independent block means; there is none before ``min_blocks`` blocks are
    there (the first blocks are single steps).
    """

    half_life_samples: float
    confidence: float = 0.95
    blocks: int = 20
    min_blocks: int = 20

    def __post_init__(self) -> None:
        if not (math.isfinite(self.half_life_samples) and self.half_life_samples > 0):
            raise ValueError(f"half_life_samples must be a positive number of samples, got {self.half_life_samples}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie strictly between 0 and 1, got {self.confidence}")
        if self.blocks < 8:
            raise ValueError(f"blocks must be at least 8 for an interval to mean anything, got {self.blocks}")
        if not 2 <= self.min_blocks <= self.capacity // 2:
            raise ValueError(
                f"min_blocks must lie in [2, {self.capacity // 2}], as many as are always kept with "
                f"blocks={self.blocks}, got {self.min_blocks}"
            )

    @property
    def capacity(self) -> int:
        """How many blocks are stored at most: enough to measure their autocorrelation before joining them."""
        return 2 * (3 * self.blocks // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseState:
    """The memory: at most ``settings.capacity`` blocks, oldest first, the last of them still filling.

    ``block_samples`` is how many samples fill a block. ``single`` tells that the newest sample had fewer than two
    micro-batches. ``level`` holds the faded sums of N T and N that make up the unit of the next step's readings.
    """

    blocks: tuple[Block, ...] = ()
    filling: Block | None = None
    filling_samples: int = 0
    block_samples: int = 1
    single: bool = False
    level: tuple[float, float, float] | None = None  # samples seen, sum of N T, sum of N


def init(settings: NoiseSettings) -> NoiseState:
    """Nothing measured yet. ``settings`` are validated where they are made; every memory starts alike."""
    return NoiseState()


def absorb(state: NoiseState, sample: GradSample, settings: NoiseSettings) -> NoiseState:
    """The memory after ``sample``. A step that was not measured, or not finite, leaves the averages as they are.

    Raises ``ValueError`` when ``samples_seen`` goes backward, or for a measured step of no samples.
    """
    single = sample.micro_batches < 2
    trace_cov, grad_sq = sample.trace_cov, sample.grad_sq
    if single or trace_cov is None or grad_sq is None:
        return state if single is state.single else replace(state, single=single)
    seen, batch = float(sample.samples_seen), float(sample.batch)
    if sample.batch < 1:
        raise ValueError(f"a measured step needs at least one sample, got batch={sample.batch} at step {sample.step}")
    unit, level = _unit(state.level), _with_level(state.level, seen, batch, trace_cov, settings)
    if unit is None:
        unit = _unit(level) or 1.0  # the first step has none before it
    step: Block = (seen, batch, batch, 1.0, batch * trace_cov / unit, batch * grad_sq / unit)
    blocks, filling = state.blocks, state.filling
    last = filling or (blocks[-1] if blocks else None)
    if last is not None and seen < last[0]:
        raise ValueError(
            f"a sample at {sample.samples_seen} samples seen came after one at {last[0]:.0f}: absorb samples in order, "
            "and after a recovery go on from the state that was saved with the checkpoint"
        )
    if filling is not None:
        step = _join(filling, step, settings.half_life_samples)
    if not (math.isfinite(step[4]) and math.isfinite(step[5])):
        return replace(state, single=False) if state.single else state
    samples, block_samples = state.filling_samples + sample.batch, state.block_samples
    if samples < block_samples:
        return NoiseState(
            blocks=blocks, filling=step, filling_samples=samples, block_samples=block_samples, level=level
        )
    blocks = (*blocks, step)
    if len(blocks) >= settings.capacity:
        blocks, block_samples = _compact(blocks, block_samples, settings)
    return NoiseState(blocks=blocks, block_samples=block_samples, level=level)


def _unit(level: tuple[float, float, float] | None) -> float | None:
    """tr(Sigma) as the steps so far had it; ``None`` before the first that was not zero."""
    return None if level is None or not level[1] > 0 else level[1] / level[2]


def _with_level(
    level: tuple[float, float, float] | None, seen: float, batch: float, trace_cov: float, settings: NoiseSettings
) -> tuple[float, float, float] | None:
    if not math.isfinite(batch * trace_cov):
        return level
    if level is None:
        return seen, batch * trace_cov, batch
    fade = 2.0 ** ((level[0] - seen) / (_LEVEL_PART * settings.half_life_samples))
    return seen, fade * level[1] + batch * trace_cov, fade * level[2] + batch


def _join(older: Block, newer: Block, half_life_samples: float) -> Block:
    fade = 2.0 ** ((older[0] - newer[0]) / half_life_samples)
    square = fade * fade
    return (
        newer[0],
        fade * older[1] + newer[1],
        square * older[2] + newer[2],
        square * older[3] + newer[3],
        fade * older[4] + newer[4],
        fade * older[5] + newer[5],
    )


def _compact(blocks: tuple[Block, ...], block_samples: int, settings: NoiseSettings) -> tuple[tuple[Block, ...], int]:
    """Fewer blocks with the same sums: all joined in pairs, or only the oldest two.

    Pairs, unless blocks would become long beside the half-life: a few blocks would then carry all the weight, and
    the interval would be wide for want of degrees of freedom. From there on the oldest block gathers what fades.
    """
    half_life = settings.half_life_samples
    mean_span = (blocks[-1][0] - blocks[0][0]) / (len(blocks) - 1)
    if 2 * mean_span * settings.blocks > half_life:
        return (_join(blocks[0], blocks[1], half_life), *blocks[2:]), block_samples
    pairs = tuple(_join(older, newer, half_life) for older, newer in zip(blocks[::2], blocks[1::2], strict=True))
    # The mean follows a batch that has grown since the blocks were short.
    return pairs, max(2 * block_samples, int(sum(pair[1] for pair in pairs) / len(pairs)))


@lru_cache(maxsize=4)  # the controller and the run's lines ask for the same; it takes as long as many small steps' rest
def stats(state: NoiseState, settings: NoiseSettings) -> NoiseStats:
    """The noise scale with its interval and verdict, estimate and interval from the same weighted block means.

    The ratio of averages of McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, in Fieller's set (1954,
    doi:10.1111/j.2517-6161.1954.tb00159.x).

    ``MEASURED`` means that the interval has two ends. A set without an upper end, or fewer blocks than
    ``min_blocks``, is ``TOO_NOISY``. If the newest sample had fewer than two micro-batches the verdict says so, and
    the numbers are the last that could be measured.

    Simulated coverage at nominal 95 % is 93 to 98 % for AR(1) noise up to 0.9 over 60 steps or more. It is lower over
    20 to 40 steps at 0.9 (88 to 92 %), and where slow noise hides under fast noise in a window too short to show it
    (30 % at 0.97 under white noise: 65 % over 100 steps, 90 % over 300, 95 % over 1000), and where a few directions
    carry the noise of a step of many micro-batches (tr(Sigma)^2 / tr(Sigma^2) = 2.4, 32 micro-batches, 0.9: 90 to
    94 %). Among intervals with two ends only, it is lower wherever few windows have them.

    A noise scale that drifts is read as its fading mean, which lags: of one that doubles every ten, four or two
    half-lives, 91, 77 and 56 % of the present value. The interval widens with the drift (to 1.3, 3 and 13 times, with
    128 steps in a half-life), and has no upper end when it doubles in one. It is about that mean: while the noise scale
    rises the low end, on which growth is founded, stays below the present value; while it falls it may stand above.
    """
    blocks = state.blocks if state.filling is None else (*state.blocks, state.filling)
    unmeasured = Verdict.TOO_FEW_MICRO_BATCHES if state.single else Verdict.TOO_NOISY
    if not blocks:
        return NoiseStats(verdict=unmeasured)
    end, weight, per_sample, per_step, trace_cov, grad_sq = np.array(blocks).T
    fade = np.exp2((end - end[-1]) / settings.half_life_samples)
    weight = fade * weight
    whole = float(weight.sum())
    weight, x, y = weight / whole, fade * trace_cov / whole, fade * grad_sq / whole
    trace_mean, grad_mean = float(x.sum()), float(y.sum())
    low: float | None = None
    high: float | None = None
    if len(blocks) >= settings.min_blocks:
        if not trace_cov.any() and grad_mean > 0:
            low = high = 0.0  # every sample gave the same gradient: no noise, however much |G|^2 varies
        else:
            # Var T ~ 1/N, Var Q between 1/N (noise small beside G) and 1/N^2 (noise large): the two ends.
            square = fade * fade
            parts = Blocks(x=x, y=y, weights=weight, variances=(square * per_sample, square * per_step))
            low, high = ratio_interval(parts, confidence=settings.confidence, groups=settings.blocks)
    scale, unit = trace_mean / grad_mean if grad_mean > 0 else None, _unit(state.level) or 1.0
    return NoiseStats(
        verdict=unmeasured if state.single or high is None else Verdict.MEASURED,
        noise_scale=scale if scale is not None and math.isfinite(scale) else None,
        low=low,
        high=high,
        grad_sq=grad_mean * unit,
        trace_cov=trace_mean * unit,
    )
