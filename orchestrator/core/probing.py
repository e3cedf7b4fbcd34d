"""How is a model measured that is not trained, and what would the policies and rules make of what was found?

The samples are cut into groups of micro-batches, and each group is read as a step would be. All weights stay as they
are, so all groups weigh alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.core.lr_rules import LR_RULES, RuleSettings
from orchestrator.core.noise import NoiseSettings
from orchestrator.core.policies import PREFERENCES, PolicySettings, follow, sees_clock
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.core.restraints import with_limits
from orchestrator.types import Decision, NoiseStats

FEWEST_GROUPS = 20  # each is a block of the interval at first
_FEWEST_EACH, _MOST_EACH = 2, 8  # micro-batches in a group
_UNTIMED = {
    "tradeoff": "controller.exchange_rate is missing, and a probe times no steps to derive it from",
    "goodput": "it goes by the times of a run's own steps, and a probe has none",
}
_ALIKE = 1e6  # half-lives in units of all samples: the first weighs as the last to a millionth


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """``groups`` holds how many micro-batches each group has; all have ``micro_batch`` samples."""

    micro_batch: int
    groups: tuple[int, ...]

    @property
    def micro_batches(self) -> int:
        return sum(self.groups)

    @property
    def samples(self) -> int:
        return self.micro_batch * self.micro_batches

    def noise_settings(self, *, confidence: float) -> NoiseSettings:
        """Averages in which all groups weigh alike."""
        half_life = _ALIKE * self.samples
        return NoiseSettings(half_life_samples=half_life, confidence=confidence, min_blocks=FEWEST_GROUPS)


def fewest_samples(micro_batch: int) -> int:
    """How many samples an interval needs at least."""
    return FEWEST_GROUPS * _FEWEST_EACH * micro_batch


def plan_probe(samples: int, *, micro_batch: int) -> ProbePlan:
    """As many whole micro-batches as ``samples`` hold, in groups of about eight, or fewer for the sake of 20 groups.

    Raises ``ValueError`` for fewer than ``fewest_samples``.
    """
    if samples < fewest_samples(micro_batch):
        raise ValueError(
            f"an interval needs {FEWEST_GROUPS} groups of at least {_FEWEST_EACH} micro-batches, which is "
            f"{fewest_samples(micro_batch)} samples in micro-batches of {micro_batch}, got {samples}"
        )
    micro_batches = samples // micro_batch
    count = max(FEWEST_GROUPS, micro_batches // _MOST_EACH)
    each, extra = divmod(micro_batches, count)
    return ProbePlan(micro_batch=micro_batch, groups=(each + 1,) * extra + (each,) * (count - extra))


def relative_precision(stats: NoiseStats) -> float | None:
    """Half the interval's width over the noise scale; ``None`` where the interval has no two ends."""
    if not stats.bounded or stats.noise_scale is None or stats.low is None or stats.high is None:
        return None
    if stats.high == stats.low:
        return 0.0
    return 0.5 * (stats.high - stats.low) / stats.noise_scale if stats.noise_scale > 0 else None


def more_samples_for(stats: NoiseStats, *, samples: int, precision: float) -> int | None:
    """How many more than ``samples`` a relative ``precision`` takes, as the width shrinks like one over their root.

    ``None`` where it cannot be told.
    """
    now = relative_precision(stats)
    return None if now is None else max(0, math.ceil(samples * ((now / precision) ** 2 - 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What each policy decides and, at its batch, each rule's factor: ``factors[rule][policy]``.

    ``left_out`` says why of each policy and rule that was not asked.
    """

    decisions: Mapping[str, Decision]
    factors: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


def advise(
    stats: NoiseStats, *, batch: int, settings: PolicySettings, own_rule: str, rule_settings: RuleSettings
) -> Advice:
    """Decisions of the policies that follow ``stats``, from ``batch`` and at once, and the rules' factors there.

    Growth cap, dead-band and cooldown restrain a run's next change; here the question is where it would lead, so only
    the ceiling holds. ``rule_settings`` are meant for the rule called ``own_rule``; the others have none.
    """
    inputs = PolicyInputs(stats=stats, batch=batch, samples_seen=0)
    decisions: dict[str, Decision] = {}
    factors: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for name, prefer in PREFERENCES.items():
        if name == "branched":
            continue
        if sees_clock(replace(settings, name=name)):
            left_out[name] = _UNTIMED[name]
            continue
        try:
            policy = with_limits(follow(prefer(settings)), floor=1, ceiling=settings.ceiling)
        except ValueError as error:
            left_out[name] = str(error)
            continue
        decisions[name] = policy(inputs)
    left_out["branched"] = "it trains branches to find its factor, and a probe trains nothing"
    left_out["decay_to_growth"] = "it follows the LR schedule over a run, and not the noise that a probe measures"
    for name, factory in LR_RULES.items():
        try:
            rule = factory(rule_settings if name == own_rule else RuleSettings())
        except ValueError as error:
            left_out[name] = str(error)
            continue
        factors[name] = {
            policy_name: rule(found.target_batch / batch, noise_scale=stats.noise_scale, base_batch=batch)
            for policy_name, found in decisions.items()
        }
    return Advice(decisions=decisions, factors=factors, left_out=left_out)
