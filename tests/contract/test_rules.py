"""What every registered learning-rate rule promises, whatever it is called, and what follows the batch beside it."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

from orchestrator.core.companions import Companions, Jump, StepScale
from orchestrator.core.lr_rules import LR_RULES, build_rule
from tests.contract.plugins import PLUGINS

RULE_SETTINGS = {"power": {"exponent": 0.7}, "noise_scale": {"exponent": 1.0}, "surge": {"peak_batch": 1000}}
NAMES = [*LR_RULES, *PLUGINS["rule"]]
# Of the rules, these fall above their peak: they promise the shape that is tested at the end, and not the usual one.
PEAKED = {"surge"}
# A rule of one's own that is not meant to rise with the batch says so: ``rule.monotone = False``.
FALLING = {name for name in PLUGINS["rule"] if not getattr(build_rule(name), "monotone", True)}
USUAL = [name for name in NAMES if name not in PEAKED | FALLING]

noise_scales = st.none() | st.floats(0, 1.7e308)
ratios = st.floats(1e-300, 1e300)


def rule(name: str):
    return build_rule(name, **RULE_SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
@given(noise_scale=noise_scales, base_batch=st.integers(1, 10**9))
def test_rules_are_exactly_one_at_ratio_one(name, noise_scale, base_batch) -> None:
    assert rule(name)(1.0, noise_scale=noise_scale, base_batch=base_batch) == 1.0


@pytest.mark.parametrize("name", NAMES)
@given(ratio=st.floats(1e-6, 1e6), noise_scale=noise_scales, base_batch=st.integers(1, 10**9))
def test_rules_are_pure_finite_and_positive(name, ratio, noise_scale, base_batch) -> None:
    factors = [rule(name)(ratio, noise_scale=noise_scale, base_batch=base_batch) for _ in range(2)]
    assert factors[0] == factors[1]
    assert 0 < factors[0] < math.inf


@pytest.mark.parametrize("name", USUAL)
@given(ratio=ratios, noise_scale=noise_scales, base_batch=st.integers(1, 10**9))
def test_rules_lie_between_one_and_the_ratio(name, ratio, noise_scale, base_batch) -> None:
    factor = rule(name)(ratio, noise_scale=noise_scale, base_batch=base_batch)
    assert math.isfinite(factor)
    assert min(1.0, ratio) * (1 - 1e-12) <= factor <= max(1.0, ratio) * (1 + 1e-12)


@pytest.mark.parametrize("name", USUAL)
@given(many=st.lists(ratios, min_size=2, max_size=9), noise_scale=noise_scales, base_batch=st.integers(1, 10**9))
def test_rules_rise_with_the_ratio(name, many, noise_scale, base_batch) -> None:
    factors = [rule(name)(ratio, noise_scale=noise_scale, base_batch=base_batch) for ratio in sorted(many)]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(factors))


peaks, floors = st.integers(1, 10**9), st.floats(1e-3, 1)


@pytest.mark.parametrize("name", sorted(PEAKED))
@given(many=st.lists(ratios, min_size=2, max_size=9), base_batch=st.integers(1, 10**9), peak=peaks, floor=floors)
def test_peaked_rules_rise_to_the_peak_and_fall_above_it(name, many, base_batch, peak, floor) -> None:
    peaked = build_rule(name, peak_batch=peak, floor=floor)
    many = sorted([*many, peak / base_batch])
    factors = [peaked(ratio, noise_scale=None, base_batch=base_batch) for ratio in many]
    top = many.index(peak / base_batch)
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(factors[: top + 1]))
    assert all(a * (1 + 1e-12) >= b for a, b in pairwise(factors[top:]))


@pytest.mark.parametrize("name", sorted(PEAKED))
@given(ratio=ratios, base_batch=st.integers(1, 10**9), peak=peaks, floor=floors)
def test_peaked_rules_rise_no_faster_than_the_root_and_fall_no_further_than_the_floor(
    name, ratio, base_batch, peak, floor
) -> None:
    factor = build_rule(name, peak_batch=peak, floor=floor)(ratio, noise_scale=None, base_batch=base_batch)
    below, above = (floor, math.sqrt(ratio)) if ratio >= 1 else (math.sqrt(ratio), 1 / floor)
    assert below * (1 - 1e-12) <= factor <= above * (1 + 1e-12)
    if max(1.0, ratio) * base_batch <= peak:  # below the peak, what every other rule promises
        assert min(1.0, ratio) * (1 - 1e-12) <= factor <= max(1.0, ratio) * (1 + 1e-12)


COMPANIONS = {
    "none": Companions(),
    "momentum": Companions(in_samples=frozenset({"momentum"})),
    "momentum of lars": Companions(in_samples=frozenset({"momentum"}), lr_in_buffer=True),
    "betas and decay": Companions(in_samples=frozenset({"betas", "weight_decay"}), rescale_second_moment=True),
    "sde": Companions(sde=True, in_samples=frozenset({"weight_decay"}), rescale_second_moment=True),
}
fractions = st.floats(0, 1, exclude_max=True)
groups = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-8, 1e3),
        "momentum": fractions,
        "betas": st.tuples(fractions, fractions),
        "eps": st.floats(1e-12, 1),
        "weight_decay": st.floats(0, 10),
    }
)


def applied(name: str, companions: Companions, base: dict[str, Any], ratio: float, noise_scale: float | None = 50.0):
    factor = rule(name)(ratio, noise_scale=noise_scale, base_batch=32)
    return companions.settings(base, StepScale(ratio=ratio, rule=factor))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("companions", COMPANIONS.values(), ids=COMPANIONS.keys())
@given(base=groups, noise_scale=st.none() | st.floats(0, 1e12))
def test_at_ratio_one_all_settings_are_the_base_bit_for_bit(name, companions, base, noise_scale) -> None:
    found = applied(name, companions, base, 1.0, noise_scale)
    assert found == {key: base[key] for key in found}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("companions", COMPANIONS.values(), ids=COMPANIONS.keys())
@given(base=groups, ratio=st.floats(1 / 64, 8), schedule=st.floats(0, 1))
def test_a_schedule_multiplies_the_rate_alone(name, companions, base, ratio, schedule) -> None:
    factor = rule(name)(ratio, noise_scale=50.0, base_batch=32)
    plain = companions.settings(base, StepScale(ratio=ratio, rule=factor))
    found = companions.settings(base, StepScale(ratio=ratio, rule=factor, schedule=schedule))
    assert found.pop("lr") == pytest.approx(schedule * plain.pop("lr"), rel=1e-12)
    assert found == plain


@pytest.mark.parametrize("companions", COMPANIONS.values(), ids=COMPANIONS.keys())
@given(base=groups, first=st.integers(1, 255), second=st.integers(1, 255), scale=st.none() | st.floats(0, 1e9))
def test_a_jump_back_undoes_what_a_jump_did_to_the_state(companions, base, first, second, scale) -> None:
    base = base | {"betas": tuple(min(1 - 1e-3, 0.9 + beta / 10) for beta in base["betas"])}  # 8 (1 - beta) < 1
    base = base | {"momentum": min(1 - 1e-3, base["momentum"])}
    there, back = (
        companions.state_factors(base, Jump(old_batch=old, new_batch=new, noise_scale=scale), base_batch=32)
        for old, new in ((first, second), (second, first))
    )
    assert there.keys() == back.keys()
    assert all(there[key] * back[key] == pytest.approx(1.0, rel=1e-6) for key in there)
