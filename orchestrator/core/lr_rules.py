"""By how much does the learning rate change when the batch is ``ratio`` times the one it was tuned at?

Every built-in rule is exactly 1 at ratio 1, rises with the ratio, and lies between 1 and the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from orchestrator.registry import resolve


class Rule(Protocol):
    """The factor on the learning rate at ``ratio`` = batch / ``base_batch`` [samples].

    ``noise_scale`` [samples] is that of the decision which chose the batch, ``None`` when it was not known.
    """

    def __call__(self, ratio: float, *, noise_scale: float | None, base_batch: int) -> float: ...


RuleFactory = Callable[[float | None], Rule]


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

    Malladi et al. 2022, arXiv:2205.10287: derived for noise-dominated gradients; their rule also changes betas and
    epsilon, which this does not.
    """

    def factor(ratio: float, *, noise_scale: float | None, base_batch: int) -> float:
        _check(ratio)
        return math.sqrt(ratio)

    return factor


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
    AdaScale (Johnson et al. 2020, arXiv:2007.05105): linear while S is far above the batch, flat once it is below.
    For Adam they fit exponents between 0.5 and 1.

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


def auto(optimizer_name: str | None) -> Rule:
    """The rule that suits the optimizer's family: ``noise_scale`` like sgd's, or ``sqrt`` like adam's.

    SGD's optimal step at a batch is what McCandlish et al. 2018 (arXiv:1812.06162) derive; for Adam that form does
    not hold and the root is what Malladi et al. 2022 (arXiv:2205.10287) derive. The layer-wise optimizers go with the
    one that they scale: lars with sgd; lamb and lans with adam, as lamb's authors do (arXiv:1904.00962). Raises
    ``ValueError`` for an optimizer whose family is not known.
    """
    if optimizer_name in ("sgd", "lars"):
        return noise_scale()
    if optimizer_name in ("adam", "adamw", "lamb", "lans"):
        return sqrt()
    raise ValueError(
        f"lr_rule.name auto chooses by the optimizer's family, and that of {optimizer_name!r} is not known: "
        f"name one of {', '.join(LR_RULES)}; noise_scale suits optimizers like sgd, sqrt those like adam"
    )


def build_rule(name: str, *, exponent: float | None = None, optimizer_name: str | None = None) -> Rule:
    """The rule of this name: "auto", one of ``LR_RULES``, or "module:factory", called as ``factory(exponent)``.

    Raises ``ValueError`` for an unknown name, an exponent that is missing, foreign or outside 0 to 1, and an imported
    rule that is not 1 at ratio 1.
    """
    if name == "auto":
        _refuse_exponent(name, exponent)
        return auto(optimizer_name)
    factory = resolve(name, {"auto": _refuse_auto, **LR_RULES}, kind="lr rule")
    rule = factory(exponent)
    if name not in LR_RULES:
        at_base = rule(1.0, noise_scale=None, base_batch=1) if callable(rule) else None
        if at_base != 1.0:
            raise ValueError(
                f"lr_rule.name {name}: the factory must return a rule, called as rule(ratio, noise_scale=..., "
                f"base_batch=...), that is 1 at ratio 1; got {rule if at_base is None else at_base!r}"
            )
    return rule


def _refuse_auto(exponent: float | None) -> Rule:
    raise AssertionError("auto is built from the optimizer's name")


def _without_exponent(name: str, make: Callable[[], Rule]) -> RuleFactory:
    def build(exponent: float | None) -> Rule:
        _refuse_exponent(name, exponent)
        return make()

    return build


def _build_power(exponent: float | None) -> Rule:
    if exponent is None:
        raise ValueError("lr_rule.exponent is missing: power needs it, from 0.5 (as sqrt does) to 1 (as linear does)")
    return power(exponent)


def _build_noise_scale(exponent: float | None) -> Rule:
    return noise_scale(1.0 if exponent is None else exponent)


LR_RULES: Mapping[str, RuleFactory] = {
    "constant": _without_exponent("constant", constant),
    "linear": _without_exponent("linear", linear),
    "sqrt": _without_exponent("sqrt", sqrt),
    "power": _build_power,
    "noise_scale": _build_noise_scale,
}


def _refuse_exponent(name: str, exponent: float | None) -> None:
    if exponent is not None:
        raise ValueError(
            f"lr_rule.exponent {exponent:g} does not apply to {name}: remove it, or name power or noise_scale"
        )


def _check_exponent(exponent: float) -> None:
    if not 0.0 <= exponent <= 1.0:
        raise ValueError(f"lr_rule.exponent must lie between 0 and 1, got {exponent}")


def _check(ratio: float) -> None:
    if not (math.isfinite(ratio) and ratio > 0.0):
        raise ValueError(f"batch / base batch must be a positive number, got {ratio}")
