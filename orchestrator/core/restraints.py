"""What holds a policy back: restraints that are wrapped around it, each one knowing nothing of the others."""

from __future__ import annotations

from orchestrator.core.policy_inputs import Policy, PolicyInputs, keep, whole
from orchestrator.core.preferences import Preferred
from orchestrator.types import Decision

# A learning rate that changes by more than this from one decision to the next leaves the noise scale to settle anew:
# its stationary value goes as batch / LR (McCandlish et al. 2018, arXiv:1812.06162, appendix C). Less is a schedule
# at work, which the averages follow.
_LR_JUMP = 2.0


def with_credit(inner: Policy, *, preferred: Preferred) -> Policy:
    """Growth no further than the batch at the credited noise scale: the guard against the ratchet (see ``guard``).

    ``preferred`` is the policy's own.
    """

    def propose(inputs: PolicyInputs) -> Decision:
        wish = inner(inputs)
        if inputs.credit is None or wish.target_batch <= inputs.batch:
            return wish
        most = max(inputs.batch, whole(preferred(inputs).batch_at(inputs.credit)))
        if wish.target_batch <= most:
            return wish
        why = f"only {inputs.credit:.4g} of it is credited, the rest rose with the batch and without progress"
        if most == inputs.batch:
            return keep(inputs, f"{wish.reason}; {why}")
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
        return keep(inputs, f"{wish.reason}; shrinking is not allowed")

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
        return keep(inputs, why) if size == inputs.batch else Decision(target_batch=size, reason=why)

    return propose


def with_deadband(inner: Policy, *, ratio: float, ceiling: int) -> Policy:
    """No change nearer than ``ratio``, but for the last one, up to the ceiling."""

    def propose(inputs: PolicyInputs) -> Decision:
        wish = inner(inputs)
        if wish.target_batch in (inputs.batch, ceiling) or not (1 / ratio < wish.target_batch / inputs.batch < ratio):
            return wish
        return keep(inputs, f"{wish.reason}; {wish.target_batch} is within {ratio:g} times")

    return propose


def with_cooldown(inner: Policy, *, cooldown_samples: int) -> Policy:
    """No change until ``cooldown_samples`` after the last one, or after a jump of the learning rate."""

    def propose(inputs: PolicyInputs) -> Decision:
        wish = inner(inputs)
        if wish.target_batch == inputs.batch or inputs.last_change_samples is None:
            return wish
        since = inputs.samples_seen - inputs.last_change_samples
        if since >= cooldown_samples:
            return wish
        return keep(inputs, f"{wish.reason}; {since} of {cooldown_samples} samples of cooldown since the last change")

    return propose


def lr_jumped(before: float | None, now: float) -> bool:
    """Whether the cooldown begins anew, with the learning rates of two decisions."""
    return before is not None and max(before, now) > _LR_JUMP * min(before, now)
