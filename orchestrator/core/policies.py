"""What batch is worth having now, and why: the base policies, and which restraints each is built with.

A policy is a function of what is known (``PolicyInputs``) to a ``Decision``. It remembers nothing; what must be
remembered lives in the controller's state and comes back as an input. Policies work in samples alone, but for the two
that ``sees_clock`` names, which are shown the run's own step times as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from orchestrator.core import preferences
from orchestrator.core.expected_smoothness import ExpectedSmoothness
from orchestrator.core.goodput import Goodput
from orchestrator.core.planner import WorkerLimits
from orchestrator.core.policy_inputs import LARGEST, Policy, PolicyInputs, keep, whole
from orchestrator.core.preferences import Preferred, always
from orchestrator.core.restraints import (
    with_cooldown,
    with_credit,
    with_deadband,
    with_growth_cap,
    with_limits,
    without_shrinking,
)
from orchestrator.registry import resolve
from orchestrator.types import Decision, NoiseStats


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """The config's words on the target batch, with the limits already fitted to the data set."""

    name: str
    kappa: float = 1.0  # noise_scale, and what is imported: target = kappa x noise scale
    exchange_rate: float | None = None  # tradeoff: samples that one saved step is worth; None: by the step times
    price_per_worker_hour: float | None = None  # tradeoff by the step times
    price_per_sample: float | None = None  # in the same money
    smoothness: float | None = None  # expected_smoothness: these four, see there
    max_smoothness: float | None = None
    strong_convexity: float | None = None
    accuracy: float | None = None
    dataset_size: int = 1  # samples
    cost_weight: float = 0.0  # goodput: 0 time to 1 cost
    workers: WorkerLimits | None = None  # goodput: the fleets to choose from; None: the one there is
    theta: float | None = None  # norm_test: the noise over the gradient's norm that is let pass
    ramp: tuple[tuple[int, int], ...] = ()  # (samples seen, batch)
    base_batch: int = 1  # samples; that the LR and its schedule are meant for
    deadband: float = 1.5  # ratio
    cooldown_samples: int = 0
    max_growth: float = 2.0  # ratio, per decision
    floor: int = 1
    ceiling: int = LARGEST
    shrink: bool = False


def fixed(settings: PolicySettings) -> Policy:
    """Never changes the batch."""
    return lambda inputs: keep(inputs, "the policy is fixed")


def schedule(settings: PolicySettings) -> Policy:
    """The batch of the last ramp entry whose samples were seen."""
    ramp = settings.ramp
    if not ramp or any(a[0] >= b[0] for a, b in pairwise(ramp)):
        raise ValueError(f"controller.ramp must rise in samples and hold at least one entry, got {list(ramp)}")

    def propose(inputs: PolicyInputs) -> Decision:
        reached = [entry for entry in ramp if entry[0] <= inputs.samples_seen]
        if not reached:
            return keep(inputs, f"the ramp begins at {ramp[0][0]} samples")
        samples, batch = reached[-1]
        return Decision(target_batch=batch, reason=f"the ramp says {batch} from {samples} samples on")

    return propose


def decay_to_growth(settings: PolicySettings) -> Policy:
    """``base_batch`` x f_peak / f: where the LR schedule f decays, the batch grows instead.

    Smith et al. 2018, arXiv:1711.00489, for SGD, whose noise goes with LR / batch; Seesaw (Meterez et al. 2025,
    arXiv:2510.14717) for normalised updates as Adam's, whose noise goes with LR / sqrt(batch). The other half of the
    exchange is the LR's: the run multiplies it by f x (batch / base_batch)^q with q 1 or 1/2 and the batch really in
    force, so that the noise follows the decayed baseline at every batch, and what the ceiling (or the dead-band)
    withholds stays with the LR. During warm-up f is its own highest so far, and the batch stays.

    A step at batch B takes B / base_batch of the baseline's, so the share of steps that remains is the mean of f over
    the samples: 2 / pi on Seesaw's quarter cosine cos(pi u / 2U), and 1 / 2 on a half cosine that ends at zero.
    """
    base = settings.base_batch

    def propose(inputs: PolicyInputs) -> Decision:
        now, peak = inputs.lr_fraction, inputs.peak_lr_fraction
        if now >= peak:
            return Decision(target_batch=base, reason=f"the LR schedule is at its peak so far: batch {base}")
        wish = whole(base * (peak / now)) if now > 0 else LARGEST
        reason = f"the LR schedule fell to {now / peak:.4g} of its peak: batch {base} grows by the inverse"
        return Decision(target_batch=wish, reason=reason)

    return propose


def follow(preferred: Preferred) -> Policy:
    """The batch preferred at the measured noise scale, where the interval allows a decision.

    Grows only when even the low end of the interval asks for more than the present batch, shrinks only when even the
    high end asks for less: a controller that cannot tell holds.
    """

    def propose(inputs: PolicyInputs) -> Decision:
        stats = inputs.stats
        if not stats.bounded or stats.noise_scale is None or stats.low is None or stats.high is None:
            return keep(inputs, _no_signal(stats))
        preference = preferred(inputs)
        batch_at = preference.batch_at
        seen = f"noise scale {stats.noise_scale:.4g} [{stats.low:.4g}, {stats.high:.4g}]{preference.words}"
        wish = max(1, whole(batch_at(stats.noise_scale)))
        if wish > inputs.batch and batch_at(stats.low) <= inputs.batch:
            return keep(inputs, f"{seen} is not surely above the batch")
        if wish < inputs.batch and batch_at(stats.high) >= inputs.batch:
            return keep(inputs, f"{seen} is not surely below the batch")
        return Decision(target_batch=wish, reason=seen)

    return propose


def _tradeoff(settings: PolicySettings) -> Preferred:
    if settings.exchange_rate is None:
        return preferences.timed_tradeoff(settings.price_per_worker_hour, settings.price_per_sample)
    return always(preferences.tradeoff(settings.exchange_rate))


def _expected_smoothness(settings: PolicySettings) -> ExpectedSmoothness:
    return ExpectedSmoothness(
        smoothness=settings.smoothness,
        max_smoothness=settings.max_smoothness,
        strong_convexity=settings.strong_convexity,
        accuracy=settings.accuracy,
        dataset_size=settings.dataset_size,
    )


# What each policy that follows the noise scale makes of it.
PREFERENCES: Mapping[str, Callable[[PolicySettings], Preferred]] = {
    "noise_scale": lambda settings: always(preferences.proportional(settings.kappa)),
    "tradeoff": _tradeoff,
    "norm_test": lambda settings: always(preferences.norm_test(settings.theta)),
    "goodput": lambda settings: goodput_of(settings).preferred(),
    "expected_smoothness": lambda settings: _expected_smoothness(settings).preferred(),
    "branched": lambda settings: preferences.branched,
}


def _following(prefer: Callable[[PolicySettings], Preferred], settings: PolicySettings) -> Policy:
    return follow(prefer(settings))


def sees_clock(settings: PolicySettings) -> bool:
    """Whether the policy is declared time-dependent: only such a policy is shown the run's own step times."""
    return settings.name == "goodput" or (settings.name == "tradeoff" and settings.exchange_rate is None)


def goodput_of(settings: PolicySettings) -> Goodput:
    return Goodput(
        cost_weight=settings.cost_weight,
        base_batch=settings.base_batch,
        floor=settings.floor,
        ceiling=settings.ceiling,
        workers=settings.workers,
    )


POLICIES: Mapping[str, Callable[[PolicySettings], Policy]] = {
    "fixed": fixed,
    "schedule": schedule,
    "decay_to_growth": decay_to_growth,
    **{name: partial(_following, prefer) for name, prefer in PREFERENCES.items()},
}


# These carry out what the user planned over the samples, and do not look at the noise.
PLANNED = frozenset({"schedule", "decay_to_growth"})


def build_policy(settings: PolicySettings) -> Policy:
    """The policy ``settings.name`` names, within its restraints.

    A ramp is the user's word and knows only the limits. A decay that becomes growth is the user's word as well: no
    evidence is waited for, so cooldown and growth cap do not apply (a milestone's decay comes at once too). The
    dead-band does, since a smooth schedule asks for a little more at every decision and a change of plan is not free.
    ``package.module:factory`` is called with the settings and is restrained like ``noise_scale``.
    """
    policy: Policy = resolve(settings.name, POLICIES, kind="policy")(settings)
    if settings.name == "fixed":
        return policy
    measured = settings.name not in PLANNED
    if measured:
        # From the innermost out: what the evidence supports, then how fast, then whether it is worth a change.
        prefer = PREFERENCES.get(settings.name, PREFERENCES["noise_scale"])
        policy = with_credit(policy, preferred=prefer(settings))
        policy = with_growth_cap(policy, max_growth=settings.max_growth)
    if not settings.shrink:
        policy = without_shrinking(policy)
    policy = with_limits(policy, floor=settings.floor, ceiling=settings.ceiling)
    if settings.name != "schedule":
        policy = with_deadband(policy, ratio=settings.deadband, ceiling=settings.ceiling)
    if measured:
        policy = with_cooldown(policy, cooldown_samples=settings.cooldown_samples)
    return policy


def _no_signal(stats: NoiseStats) -> str:
    if stats.low is None:
        return f"no signal ({stats.verdict.value})"
    return f"no signal ({stats.verdict.value}): the noise scale is above {stats.low:.4g}, without an upper end"
