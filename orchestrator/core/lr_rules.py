"""By how much does the learning rate change when the batch is ``ratio`` times the one it was tuned at?

Every built-in rule is exactly 1 at ratio 1. All but ``surge`` rise with the ratio and lie between 1 and the ratio;
``surge`` does so up to its peak, and falls above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from orchestrator.core.families import FAMILIES
from orchestrator.registry import resolve


class Rule(Protocol):
    """The factor on the learning rate at ``ratio`` = batch / ``base_batch`` [samples].

    ``noise_scale`` [samples] is that of the decision which chose the batch, ``None`` when it was not known.
    """

    def __call__(self, ratio: float, *, noise_scale: float | None, base_batch: int) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSettings:
    """The config's words on the rule; ``None`` where a key was not given."""

    exponent: float | None = None
    peak_batch: int | None = None  # samples
    floor: float | None = None  # fraction of the rate at the peak


RuleFactory = Callable[[RuleSettings], Rule]


def constant() -> Rule:
    """Factor 1: the learning rate does not follow the batch. A larger batch then only averages more noise out."""

    def factor(ratio: float, *, noise_scale: float | None, base_batch: int) -> float:
        _check(ratio)
        return 1.0

    return factor


def linear() -> Rule:
    """Factor ratio. Goyal et al. 2017, arXiv:1706.02677: SGD, and only while the batch is below the noise scale."""
    return power(1.0)


def sqrt() -> Rule:
    """Factor sqrt(ratio), for Adam and its kin.

    Malladi et al. 2022, arXiv:2205.10287: derived for noise-dominated gradients; their rule, ``sde``, also changes
    betas and epsilon, which this does not. An eightfold jump under Adam does not make the loss spike, measured on a
    language model at its best base rate, with or without ``ramp_samples`` and ``second_moment: rescale``; ``linear``
    and ``sde`` do there (``tests/unit/test_batch_jump.py``).
    """

    def factor(ratio: float, *, noise_scale: float | None, base_batch: int) -> float:
        _check(ratio)
        return math.sqrt(ratio)

    return factor


def sde() -> Rule:
    """Factor sqrt(ratio), with betas and epsilon that follow (``core/companions.py``); for Adam and AdamW alone.

    The whole square-root rule of Malladi et al. 2022, arXiv:2205.10287. It needs ratio (1 - beta) < 1 for both betas,
    which the config checks. Not for LAMB and LANS: they divide the step by its own length, and shorter memories
    lengthen it, so the root would no longer be the right factor.

    It promises a jump without a spike only while noise dominates the gradient and ratio (1 - beta1) is small. At
    momentum 0.9 and ratio 8 what is left averages two steps, at a larger rate, and near the largest stable rate the
    loss spikes; a ramp softens that and does not mend it. ``sqrt`` is the safer choice for large jumps.
    """
    return sqrt()


def power(exponent: float) -> Rule:
    """Factor ratio**exponent, from ``constant`` (0) over ``sqrt`` (0.5) to ``linear`` (1).

    Between the last two lie the fits for Adam of McCandlish et al. 2018, arXiv:1812.06162, appendix E.2. Raises
    ``ValueError`` for an exponent outside 0 to 1.
    """
    _check_exponent(exponent)

    def factor(ratio: float, *, noise_scale: float | None, base_batch: int) -> float:
        _check(ratio)
        return float(ratio**exponent)

    return factor


def noise_scale(exponent: float = 1.0) -> Rule:
    """Factor ((1 + S / B0) / (1 + S / B))**exponent, with S the noise scale and B = ratio x B0 the batch.

    The optimal step of McCandlish et al. 2018, arXiv:1812.06162, equation 2.6, and with exponent 1 the gain of
    AdaScale (Johnson et al. 2020, arXiv:2007.05105), ``adascale`` in a config: linear while S is far above the batch,
    flat once it is below. This is the global form, one gain from the noise scale of all parameters; the form with one
    gain per parameter group is not offered. For Adam McCandlish et al. fit exponents between 0.5 and 1.

    Without a noise scale the factor is 1, that of the limit S = 0: a larger LR is not risked on a number that is not
    known. Raises ``ValueError`` for an exponent outside 0 to 1.
    """
    _check_exponent(exponent)

    def factor(ratio: float, *, noise_scale: float | None, base_batch: int) -> float:
        _check(ratio)
        if noise_scale is None:
            return 1.0
        if not (math.isfinite(noise_scale) and noise_scale >= 0.0 and base_batch >= 1):
            raise ValueError(
                f"a noise scale must be finite and not negative, and the base batch at least 1 sample, got "
                f"noise_scale={noise_scale}, base_batch={base_batch}"
            )
        s = noise_scale / base_batch
        # The same number written twice, each without overflow on its side of ratio 1.
        gain = (1.0 + s) / (1.0 + s / ratio) if ratio >= 1.0 else ratio * ((1.0 + s) / (ratio + s))
        return float(gain**exponent)

    return factor


def surge(peak_batch: int, floor: float = 0.5) -> Rule:
    """Factor f(B) / f(B0) with f(B) = 1 / (sqrt(P / B) + sqrt(B / P)) and P the peak batch; for Adam and its kin.

    The optimal step under sign-like updates of Li et al. 2024, arXiv:2405.14578: it rises as sqrt(B) while B is small,
    is highest at P and falls above it. P is for the user to find: it is not the noise scale (a curvature between
    parameters decides it) and nothing here measures it.

    f goes to zero far above P and the true optimum does not, so f is no less than ``floor`` of f(P) there; ``floor`` 1
    keeps the rate of the peak. Beginning above the floor's batch the factor is 1 until the batch is below it again.
    Raises ``ValueError`` for a peak below 1 sample and a floor outside 0 to 1.
    """
    if not 1 <= peak_batch < math.inf:
        raise ValueError(f"lr_rule.peak_batch must be at least 1 sample, got {peak_batch}")
    if not 0.0 < floor <= 1.0:
        raise ValueError(f"lr_rule.floor must be more than 0 and at most 1, got {floor}")

    def height(batch: float) -> float:
        """f(batch) / f(peak), ``batch`` in peak batches."""
        if batch <= 1.0:
            return 2.0 * math.sqrt(batch) / (1.0 + batch)
        # The same number, without overflow on this side of the peak.
        return max(floor, 2.0 / (math.sqrt(batch) + 1.0 / math.sqrt(batch)))

    def factor(ratio: float, *, noise_scale: float | None, base_batch: int) -> float:
        _check(ratio)
        base = base_batch / peak_batch
        return height(ratio * base) / height(base)

    return factor


def auto(optimizer_name: str | None) -> Rule:
    """The rule that suits the optimizer's family: ``noise_scale`` like sgd's, or ``sqrt`` like adam's.

    SGD's optimal step at a batch is what McCandlish et al. 2018 (arXiv:1812.06162) derive; for Adam that form does
    not hold and the root is what Malladi et al. 2022 (arXiv:2205.10287) derive. Raises ``ValueError`` for an optimizer
    whose family is not known (see ``families.FAMILIES``).
    """
    if optimizer_name is None or optimizer_name not in FAMILIES:
        raise ValueError(
            f"lr_rule.name auto chooses by the optimizer's family, and that of {optimizer_name!r} is not known: "
            f"name one of {', '.join(LR_RULES)}; noise_scale suits optimizers like sgd, sqrt those like adam"
        )
    return noise_scale() if FAMILIES[optimizer_name] == "sgd" else sqrt()


def build_rule(
    name: str,
    *,
    exponent: float | None = None,
    peak_batch: int | None = None,
    floor: float | None = None,
    optimizer_name: str | None = None,
) -> Rule:
    """The rule of this name: "auto", one of ``LR_RULES``, or "module:factory", called as ``factory(exponent)``.

    Raises ``ValueError`` for an unknown name, a setting that is missing, foreign or out of range, and an imported rule
    that is not 1 at ratio 1.
    """
    settings = RuleSettings(exponent=exponent, peak_batch=peak_batch, floor=floor)
    if name == "auto":
        _refuse_foreign(name, settings)
        return auto(optimizer_name)
    if name in LR_RULES:
        _refuse_foreign(name, settings)
        return LR_RULES[name](settings)
    imported: Callable[[float | None], Rule] = resolve(name, dict.fromkeys(("auto", *LR_RULES), _known), kind="lr rule")
    _refuse_foreign(name, settings, may_use=("exponent",))
    rule = imported(exponent)
    at_base = rule(1.0, noise_scale=None, base_batch=1) if callable(rule) else None
    if at_base != 1.0:
        raise ValueError(
            f"lr_rule.name {name}: the factory must return a rule, called as rule(ratio, noise_scale=..., "
            f"base_batch=...), that is 1 at ratio 1; got {rule if at_base is None else at_base!r}"
        )
    return rule


def _known(exponent: float | None) -> Rule:
    raise AssertionError("what is built in is not imported")


def _build_power(settings: RuleSettings) -> Rule:
    if settings.exponent is None:
        raise ValueError("lr_rule.exponent is missing: power needs it, from 0.5 (as sqrt does) to 1 (as linear does)")
    return power(settings.exponent)


def _build_noise_scale(settings: RuleSettings) -> Rule:
    return noise_scale(1.0 if settings.exponent is None else settings.exponent)


def _build_surge(settings: RuleSettings) -> Rule:
    if settings.peak_batch is None:
        raise ValueError("lr_rule.peak_batch is missing: surge needs the batch at which the best rate is highest")
    return surge(settings.peak_batch, 0.5 if settings.floor is None else settings.floor)


LR_RULES: Mapping[str, RuleFactory] = {
    "constant": lambda settings: constant(),
    "linear": lambda settings: linear(),
    "sqrt": lambda settings: sqrt(),
    "power": _build_power,
    "noise_scale": _build_noise_scale,
    "adascale": lambda settings: noise_scale(1.0),
    "surge": _build_surge,
    "sde": lambda settings: sde(),
}

_USERS: Mapping[str, tuple[str, ...]] = {  # of each setting, the rules
    "exponent": ("power", "noise_scale"),
    "peak_batch": ("surge",),
    "floor": ("surge",),
}


def _refuse_foreign(name: str, settings: RuleSettings, *, may_use: tuple[str, ...] = ()) -> None:
    for key, users in _USERS.items():
        value: float | None = getattr(settings, key)
        if value is not None and name not in users and key not in may_use:
            raise ValueError(
                f"lr_rule.{key} {value:g} does not apply to {name}: remove it, or name {' or '.join(users)}"
            )


def _check_exponent(exponent: float) -> None:
    if not 0.0 <= exponent <= 1.0:
        raise ValueError(f"lr_rule.exponent must lie between 0 and 1, got {exponent}")


def _check(ratio: float) -> None:
    if not (math.isfinite(ratio) and ratio > 0.0):
        raise ValueError(f"batch / base batch must be a positive number, got {ratio}")
