"""Which batch is right at a noise scale? One rising function for each policy that follows the measurement.

Here stand the closed forms alone. What is done about an interval, and every restraint, is the same for all of them and
lives in ``policies``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.core.policy_inputs import PolicyInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """``batch_at`` [samples] of a noise scale [samples] never falls as the noise scale rises, and may be infinite.

    Because it only rises, the interval and the guard's credit, both in noise scale, are turned into batches by the
    same function. ``words`` follow the noise scale in a decision's reason.
    """

    batch_at: Callable[[float], float]
    words: str = ""


# The preference of the moment: what else is known may decide which one it is.
Preferred = Callable[[PolicyInputs], Preference]


def always(preference: Preference) -> Preferred:
    return lambda inputs: preference


def proportional(kappa: float = 1.0) -> Preference:
    """``kappa`` x B_simple (McCandlish et al. 2018, arXiv:1812.06162).

    At kappa 1 a run takes twice the fewest possible steps and twice the fewest possible samples, whether the noise
    scale stays or moves.
    """
    return Preference(batch_at=lambda scale: kappa * scale, words="" if kappa == 1 else f" x {kappa:g}")


def tradeoff(exchange_rate: float) -> Preference:
    """sqrt(r x B_simple), r the exchange rate [samples per step]: how many samples one saved step is worth.

    McCandlish et al. 2018, arXiv:1812.06162, appendix D.2, equation D.6. A step at batch B makes 1 / (1 + B_simple / B)
    of the progress of a step without noise, so along the run there are 1 + B_simple / B steps and B_simple + B samples
    to pay for each unit of progress; r x steps + samples is least here. Unlike B_simple itself this reaches the best
    possible pairs of steps and samples of a run whose noise scale moves: with S steps and E samples,
    (S / S_min - 1)(E / E_min - 1) is at most 1, and 24/25 where the noise scale rises as the root of progress.

    Where r comes from:

    - From times: if a step takes t0 + t1 x B seconds, whatever the batch, the run is shortest at r = t0 / t1.
    - From prices: if a step takes t seconds at any batch (workers are added as it grows), a second costs p and a
      sample q, then r = p x t / q.
    - From the run's own step times and, if given, prices: ``timed_tradeoff``.

    Raises ``ValueError`` for an exchange rate that is not a positive number.
    """
    rate = _positive(exchange_rate, "exchange_rate", "tradeoff", "the samples that one saved step is worth, as 1000")
    # The root of each, since the product may be beyond floating point.
    return Preference(
        batch_at=lambda scale: math.sqrt(rate) * math.sqrt(scale), words=f" at {rate:.6g} samples for a step"
    )


def timed_tradeoff(price_per_worker_hour: float | None, price_per_sample: float | None) -> Preferred:
    """``tradeoff`` at the exchange rate of the run's own step times: the shortest run of the workers there are.

    McCandlish et al. 2018, arXiv:1812.06162, appendix D.2, with r derived here.

    A step of K workers takes t0 + t1 x B / K seconds while the batch grows on the same workers, so a saved step is
    worth r = K t0 / t1 samples. The same batch is the cheapest where only worker-hours are paid, since K does not
    change with it. Samples that cost something by themselves (labels, a simulator, a metered store) lower r: with
    prices p of a worker-hour and q of a sample, a step costs p K (t0 + t1 x B / K) / 3600 + q B, and so
    r = K t0 / (t1 + 3600 q / p). Only the ratio of the two prices counts, hence both are given, or neither.

    Until t0 and t1 can be told apart (see ``throughput.fit``) the batch explores: see ``exploring``.

    Raises ``ValueError`` for one price without the other, and for one that is out of range.
    """
    if (price_per_worker_hour is None) != (price_per_sample is None):
        raise ValueError(
            "controller.price_per_worker_hour and controller.price_per_sample go together: give both, or neither for "
            "the shortest run"
        )
    sample_in_worker_s = 0.0
    if price_per_worker_hour is not None and price_per_sample is not None:
        hour = _positive(price_per_worker_hour, "price_per_worker_hour", "tradeoff", "what an hour of a worker costs")
        if not 0 <= price_per_sample < math.inf:
            raise ValueError(f"controller.price_per_sample must be a number not below 0, got {price_per_sample}")
        sample_in_worker_s = 3600 * (price_per_sample / hour)

    def preferred(inputs: PolicyInputs) -> Preference:
        if inputs.steps is None:
            return exploring(inputs)
        once = inputs.steps.once(inputs.workers)
        if once is None:
            return untimed(inputs)
        rate = inputs.workers * once / (inputs.steps.sample_s + sample_in_worker_s)
        if rate > 0:
            return tradeoff(rate)
        return Preference(batch_at=lambda scale: 0.0, words=", but a larger batch saves no time")

    return preferred


def exploring(inputs: PolicyInputs) -> Preference:
    """Growth as far as the noise scale, to learn from step times of another length what a step costs.

    Up to the noise scale a sample of a larger batch is worth at least half a sample of the smallest. The restraints on
    growth hold as ever, so that it is one growth by ``max_growth`` before the times are looked at again; where the
    noise scale does not allow it, the batch holds and the times stay untold. Where longer steps took no longer (a
    device that small batches leave idle), a larger batch costs nothing so far, and the growth goes on as far.
    """
    words = ", growing to learn what a step costs at another length"
    if inputs.took_no_longer:
        words = ", growing as longer steps took no longer"
    return Preference(batch_at=lambda scale: scale, words=words)


def untimed(inputs: PolicyInputs) -> Preference:
    """The batch there is, until this many workers were timed."""
    words = f"; steps of {inputs.workers} workers were not timed yet"
    return Preference(batch_at=lambda scale: float(inputs.batch), words=words)


def branched(inputs: PolicyInputs) -> Preference:
    """B_simple x the factor that branches last found between it and the critical batch (see ``branching``).

    Merrill et al. 2025, arXiv:2505.23971. The factor is of the run at hand; until there is one, the batch stays.
    """
    if inputs.kappa is None:
        return Preference(batch_at=lambda scale: float(inputs.batch), words="; no branches were compared with it yet")
    return proportional(inputs.kappa)


def norm_test(theta: float | None) -> Preference:
    """B_simple / theta^2: the smallest batch (to the nearest sample) that passes the norm test.

    Byrd et al. 2012, doi:10.1007/s10107-012-0572-5; as big-batch SGD De et al. 2017, arXiv:1610.05792. The test asks
    that the noise of the mean gradient, sqrt(tr(Sigma) / B), be at most theta times the gradient's norm |G|.

    Here |G|^2 is the debiased estimate. The published tests put in the squared norm of the batch's own mean gradient,
    which is |G|^2 + tr(Sigma) / B on average: they stop at B_simple (1 - theta^2) / theta^2, and with theta of 1 or
    more never grow. This form asks for B_simple more, at every theta.

    Raises ``ValueError`` for a theta that is missing or not a positive number.
    """
    part = _positive(theta, "theta", "norm_test", "the largest part of the gradient's norm that may be noise, as 0.5")
    # Divided twice: the square of a small theta may be zero.
    return Preference(batch_at=lambda scale: scale / part / part, words=f" / {part:g}^2")


def _positive(value: float | None, key: str, policy: str, meaning: str) -> float:
    if value is None:
        raise ValueError(f"controller.{key} is missing: policy {policy} needs {meaning}")
    if not 0 < value < math.inf:
        raise ValueError(f"controller.{key} must be a positive number ({meaning}), got {value}")
    return value
