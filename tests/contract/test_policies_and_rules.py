"""What every registered policy and every registered rule promises, whatever it is called."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from orchestrator.core.lr_rules import LR_RULES, build_rule
from orchestrator.core.policies import POLICIES, PolicyInputs, PolicySettings, build_policy
from orchestrator.types import NoiseStats, Verdict

EXPONENTS = {"power": 0.7, "noise_scale": 1.0}
FLOOR, CEILING = 8, 4096
RAMP = ((0, 8), (500, 64), (10**6, 4096))

batches = st.integers(FLOOR, CEILING)
scales = st.floats(1e-300, 1.7e308)
counts = st.integers(0, 10**12)
noise_scales = st.none() | st.floats(0, 1.7e308)
ratios = st.floats(1e-300, 1e300)


@st.composite
def situations(draw, verdicts=tuple(Verdict)):
    verdict = draw(st.sampled_from(verdicts))
    low, middle, high = sorted(draw(st.tuples(scales, scales, scales)))
    if verdict is not Verdict.MEASURED and draw(st.booleans()):
        stats = NoiseStats(verdict=verdict, low=draw(st.none() | st.just(low)))
    else:
        stats = NoiseStats(verdict=verdict, noise_scale=middle, low=low, high=high)
    return PolicyInputs(
        stats=stats,
        batch=draw(batches),
        samples_seen=draw(counts),
        last_change_samples=draw(st.none() | st.just(0)),
        credit=draw(st.none() | scales),
    )


def policy(name: str, **more):
    ramp = RAMP if name == "schedule" else ()
    return build_policy(PolicySettings(name=name, ramp=ramp, floor=FLOOR, ceiling=CEILING, **more))


def rule(name: str):
    return build_rule(name, exponent=EXPONENTS.get(name))


@pytest.mark.parametrize("name", list(POLICIES))
@given(situation=situations(), shrink=st.booleans(), kappa=st.sampled_from([1e-300, 0.5, 1.0, 1e300]))
def test_policies_are_pure_stay_within_limits_and_give_a_reason(name, situation, shrink, kappa) -> None:
    decision = policy(name, shrink=shrink, kappa=kappa)(situation)
    assert decision == policy(name, shrink=shrink, kappa=kappa)(situation)
    assert type(decision.target_batch) is int
    assert FLOOR <= decision.target_batch <= CEILING
    assert decision.reason.strip()
    assert shrink or decision.target_batch >= situation.batch


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "schedule"])
@given(situation=situations((Verdict.TOO_NOISY, Verdict.TOO_FEW_MICRO_BATCHES)))
def test_without_a_signal_the_batch_is_kept(name, situation) -> None:
    assert policy(name, shrink=True)(situation).target_batch == situation.batch


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "schedule"])
@given(situation=situations((Verdict.MEASURED,)))
def test_growth_is_at_most_the_cap_and_is_paid_by_the_credit(name, situation) -> None:
    grown = policy(name, max_growth=2.0)(situation).target_batch
    assert grown <= 2 * situation.batch
    if situation.credit is not None:
        assert grown <= max(situation.batch, round(situation.credit))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "schedule"])
@given(batch=batches, many=st.lists(st.floats(1e-9, 1e12), min_size=2, max_size=9), width=st.floats(1, 100), shrink=...)
def test_a_larger_noise_scale_never_asks_for_a_smaller_batch(name, batch, many, width, shrink: bool) -> None:
    def target(scale: float) -> int:
        stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=scale, low=scale / width, high=scale * width)
        return policy(name, shrink=shrink)(PolicyInputs(stats=stats, batch=batch, samples_seen=10**9)).target_batch

    targets = [target(scale) for scale in sorted(many)]
    assert targets == sorted(targets)


@pytest.mark.parametrize("name", list(LR_RULES))
@given(noise_scale=noise_scales, base_batch=st.integers(1, 10**9))
def test_rules_are_exactly_one_at_ratio_one(name, noise_scale, base_batch) -> None:
    assert rule(name)(1.0, noise_scale=noise_scale, base_batch=base_batch) == 1.0


@pytest.mark.parametrize("name", list(LR_RULES))
@given(ratio=ratios, noise_scale=noise_scales, base_batch=st.integers(1, 10**9))
def test_rules_lie_between_one_and_the_ratio(name, ratio, noise_scale, base_batch) -> None:
    factor = rule(name)(ratio, noise_scale=noise_scale, base_batch=base_batch)
    assert math.isfinite(factor)
    assert min(1.0, ratio) * (1 - 1e-12) <= factor <= max(1.0, ratio) * (1 + 1e-12)


@pytest.mark.parametrize("name", list(LR_RULES))
@given(many=st.lists(ratios, min_size=2, max_size=9), noise_scale=noise_scales, base_batch=st.integers(1, 10**9))
def test_rules_rise_with_the_ratio(name, many, noise_scale, base_batch) -> None:
    factors = [rule(name)(ratio, noise_scale=noise_scale, base_batch=base_batch) for ratio in sorted(many)]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(factors))
