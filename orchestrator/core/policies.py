"""What batch is worth having now, and why: base policies, and the restraints wrapped around them.

A policy is a function of what is known (``PolicyInputs``) to a ``Decision``. It remembers nothing; what must be
remembered lives in the controller's state and comes back as an input. Policies work in samples alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.core import preferences
from orchestrator.core.preferences import Preference
from orchestrator.registry import resolve
from orchestrator.types import Decision, NoiseStats


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """What a policy may look at. ``credit`` is the noise scale that growth may be founded on (see ``guard``)."""

    stats: NoiseStats
    batch: int  # the present target
    samples_seen: int
    last_change_samples: int | None = None
    credit: float | None = None


Policy = Callable[[PolicyInputs], Decision]

_LARGEST = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """The config's words on the target batch, with the limits already fitted to the data set."""

    name: str
    kappa: float = 1.0  # noise_scale, and what is imported: target = kappa x noise scale
    exchange_rate: float | None = None  # tradeoff: samples that one saved step is worth
    theta: float | None = None  # norm_test: the noise over the gradient's norm that is let pass
    ramp: tuple[tuple[int, int], ...] = ()  # (samples seen, batch)
    deadband: float = 1.5  # ratio
    cooldown_samples: int = 0
    max_growth: float = 2.0  # ratio, per decision
    floor: int = 1
    ceiling: int = _LARGEST
    shrink: bool = False


def fixed(settings: PolicySettings) -> Policy:
    """Never changes the batch."""
    return lambda inputs: _keep(inputs, "the policy is fixed")


def schedule(settings: PolicySettings) -> Policy:
    """The batch of the last ramp entry whose samples were seen."""
    ramp = settings.ramp
    if not ramp or any(a[0] >= b[0] for a, b in pairwise(ramp)):
        raise ValueError(f"controller.ramp must rise in samples and hold at least one entry, got {list(ramp)}")

    def propose(inputs: PolicyInputs) -> Decision:
        reached = [entry for entry in ramp if entry[0] <= inputs.samples_seen]
        if not reached:
            return _keep(inputs, f"the ramp begins at {ramp[0][0]} samples")
        samples, batch = reached[-1]
        return Decision(target_batch=batch, reason=f"the ramp says {batch} from {samples} samples on")

    return propose


def follow(preference: Preference) -> Policy:
    """The batch preferred at the measured noise scale, where the interval allows a decision.

    Grows only when even the low end of the interval asks for more than the present batch, shrinks only when even the
    high end asks for less: a controller that cannot tell holds.
    """
    batch_at = preference.batch_at

    def propose(inputs: PolicyInputs) -> Decision:
        stats = inputs.stats
        if not stats.bounded or stats.noise_scale is None or stats.low is None or stats.high is None:
            return _keep(inputs, _no_signal(stats))
        seen = f"noise scale {stats.noise_scale:.4g} [{stats.low:.4g}, {stats.high:.4g}]{preference.words}"
        wish = max(1, _whole(batch_at(stats.noise_scale)))
        if wish > inputs.batch and batch_at(stats.low) <= inputs.batch:
            return _keep(inputs, f"{seen} is not surely above the batch")
        if wish < inputs.batch and batch_at(stats.high) >= inputs.batch:
            return _keep(inputs, f"{seen} is not surely below the batch")
        return Decision(target_batch=wish, reason=seen)

    return propose


# What each policy that follows the noise scale makes of it.
PREFERENCES: Mapping[str, Callable[[PolicySettings], Preference]] = {
    "noise_scale": lambda settings: preferences.proportional(settings.kappa),
    "tradeoff": lambda settings: preferences.tradeoff(settings.exchange_rate),
    "norm_test": lambda settings: preferences.norm_test(settings.theta),
}


def noise_scale(settings: PolicySettings) -> Policy:
    """``kappa`` x the noise scale."""
    return follow(PREFERENCES["noise_scale"](settings))


def tradeoff(settings: PolicySettings) -> Policy:
    """The root of ``exchange_rate`` x the noise scale: the best steps for the samples spent."""
    return follow(PREFERENCES["tradeoff"](settings))


def norm_test(settings: PolicySettings) -> Policy:
    """The noise scale / ``theta`` squared: the gradient's noise is at most ``theta`` of its norm."""
    return follow(PREFERENCES["norm_test"](settings))


POLICIES: Mapping[str, Callable[[PolicySettings], Policy]] = {
    "fixed": fixed,
    "schedule": schedule,
    "noise_scale": noise_scale,
    "tradeoff": tradeoff,
    "norm_test": norm_test,
}


def build_policy(settings: PolicySettings) -> Policy:
    """The policy ``settings.name`` names, within its restraints.

    A ramp is the user's word and knows only the limits. ``package.module:factory`` is called with the settings and is
    restrained like ``noise_scale``.
    """
    policy: Policy = resolve(settings.name, POLICIES, kind="policy")(settings)
    if settings.name == "fixed":
        return policy
    if settings.name != "schedule":
        # From the innermost out: what the evidence supports, then how fast, then whether it is worth a change.
        prefer = PREFERENCES.get(settings.name, PREFERENCES["noise_scale"])
        policy = with_credit(policy, batch_at=prefer(settings).batch_at)
        policy = with_growth_cap(policy, max_growth=settings.max_growth)
    if not settings.shrink:
        policy = without_shrinking(policy)
    policy = with_limits(policy, floor=settings.floor, ceiling=settings.ceiling)
    if settings.name != "schedule":
        policy = with_deadband(policy, ratio=settings.deadband, ceiling=settings.ceiling)
        policy = with_cooldown(policy, cooldown_samples=settings.cooldown_samples)
    return policy


def with_credit(inner: Policy, *, batch_at: Callable[[float], float]) -> Policy:
    """Growth no further than the batch at the credited noise scale: the guard against the ratchet (see ``guard``).

    ``batch_at`` is that of the policy's own ``Preference``.
    """

    def propose(inputs: PolicyInputs) -> Decision:
        wish = inner(inputs)
        if inputs.credit is None or wish.target_batch <= inputs.batch:
            return wish
        most = max(inputs.batch, _whole(batch_at(inputs.credit)))
        if wish.target_batch <= most:
            return wish
        why = f"only {inputs.credit:.4g} of it is credited, the rest rose with the batch and without progress"
        if most == inputs.batch:
            return _keep(inputs, f"{wish.reason}; {why}")
        return Decision(target_batch=most, reason=f"{wish.reason}; {why}")

    return propose


def with_growth_cap(inner: Policy, *, max_growth: float) -> Policy:
    """At most ``max_growth`` times the batch at once, and not less than its inverse."""

    def propose(inputs: PolicyInputs) -> Decision:
        wish = inner(inputs)
        most, least = max(inputs.batch + 1, int(inputs.batch * max_growth)), max(1, int(inputs.batch / max_growth))
        if least <= wish.target_batch <= most:
            return wish
        size = most if wish.target_batch > most else least
        return Decision(target_batch=size, reason=f"{wish.reason}; at most {max_growth:g} times in one decision")

    return propose


def without_shrinking(inner: Policy) -> Policy:
    """Growth only."""

    def propose(inputs: PolicyInputs) -> Decision:
        wish = inner(inputs)
        if wish.target_batch >= inputs.batch:
            return wish
        return _keep(inputs, f"{wish.reason}; shrinking is not allowed")

    return propose


def with_limits(inner: Policy, *, floor: int, ceiling: int) -> Policy:
    """Inside [floor, ceiling] samples."""
    if not 1 <= floor <= ceiling:
        raise ValueError(f"the batch's floor must lie in [1, {ceiling}] (its ceiling), got {floor}")

    def propose(inputs: PolicyInputs) -> Decision:
        wish = inner(inputs)
        size = max(floor, min(ceiling, wish.target_batch))
        if size == wish.target_batch:
            return wish
        why = f"{wish.reason}; the {'floor' if size == floor else 'ceiling'} is {size}"
        return _keep(inputs, why) if size == inputs.batch else Decision(target_batch=size, reason=why)

    return propose


def with_deadband(inner: Policy, *, ratio: float, ceiling: int) -> Policy:
    """No change nearer than ``ratio``, but for the last one, up to the ceiling."""

    def propose(inputs: PolicyInputs) -> Decision:
        wish = inner(inputs)
        if wish.target_batch in (inputs.batch, ceiling) or not (1 / ratio < wish.target_batch / inputs.batch < ratio):
            return wish
        return _keep(inputs, f"{wish.reason}; {wish.target_batch} is within {ratio:g} times")

    return propose


def with_cooldown(inner: Policy, *, cooldown_samples: int) -> Policy:
    """No change until ``cooldown_samples`` after the last one."""

    def propose(inputs: PolicyInputs) -> Decision:
        wish = inner(inputs)
        if wish.target_batch == inputs.batch or inputs.last_change_samples is None:
            return wish
        since = inputs.samples_seen - inputs.last_change_samples
        if since >= cooldown_samples:
            return wish
        return _keep(inputs, f"{wish.reason}; {since} of {cooldown_samples} samples of cooldown since the last change")

    return propose


def _whole(samples: float) -> int:
    """The nearest count of samples; what is beyond any batch, infinity included, is as good as the largest."""
    return round(min(samples, float(_LARGEST)))


def _keep(inputs: PolicyInputs, why: str) -> Decision:
    return Decision(target_batch=inputs.batch, reason=f"keep {inputs.batch}: {why}")


def _no_signal(stats: NoiseStats) -> str:
    if stats.low is None:
        return f"no signal ({stats.verdict.value})"
    return f"no signal ({stats.verdict.value}): the noise scale is above {stats.low:.4g}, without an upper end"
