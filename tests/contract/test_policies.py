"""What every registered policy promises, whatever it is called."""

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from orchestrator.core.policies import PLANNED, POLICIES, PREFERENCES, PolicySettings, build_policy, sees_clock
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.core.throughput import StepModel
from orchestrator.types import NoiseStats, Verdict
from tests.contract.plugins import PLUGINS

FLOOR, CEILING = 8, 4096
RAMP = ((0, 8), (500, 64), (10**6, 4096))
NEEDED = {
    "schedule": {"ramp": RAMP},
    "norm_test": {"theta": 0.5},
    "expected_smoothness": {
        "smoothness": 4.0,
        "max_smoothness": 40.0,
        "strong_convexity": 0.1,
        "accuracy": 10.0,
        "dataset_size": CEILING,
    },
}
# The number by which a policy turns noise scale into batch, and what it may be.
positive = st.floats(1e-300, 1e300)
KNOBS = {
    "noise_scale": ("kappa", positive),
    "tradeoff": ("exchange_rate", st.none() | positive),
    "norm_test": ("theta", positive),
    "goodput": ("cost_weight", st.floats(0, 1)),
    "expected_smoothness": ("accuracy", positive),
    "branched": ("max_growth", st.floats(1.1, 10)),  # what turns is measured, and comes with the inputs
}

batches = st.integers(FLOOR, CEILING)
NAMES = [*POLICIES, *PLUGINS["policy"]]
# These carry out a plan of the user's over the samples: what the noise allows is not theirs to ask.
MEASURED = [name for name in NAMES if name not in PLANNED]

scales = st.floats(1e-300, 1.7e308)
counts = st.integers(0, 10**12)


@st.composite
def step_models(draw):
    """``None`` included: at first a run's step times tell nothing."""
    if draw(st.booleans()):
        return None
    once = sorted(draw(st.lists(st.floats(0, 1e3), min_size=1, max_size=3)))
    return StepModel(sample_s=draw(st.floats(1e-9, 1e3)), once_s=tuple((2 * k + 1, s) for k, s in enumerate(once)))


@st.composite
def situations(draw, verdicts=tuple(Verdict)):
    verdict = draw(st.sampled_from(verdicts))
    low, middle, high = sorted(draw(st.tuples(scales, scales, scales)))
    if verdict is not Verdict.MEASURED and draw(st.booleans()):
        stats = NoiseStats(verdict=verdict, low=draw(st.none() | st.just(low)))
    else:
        grad_sq = draw(st.none() | st.floats(1e-9, 1e9))
        stats = NoiseStats(verdict=verdict, noise_scale=middle, low=low, high=high, grad_sq=grad_sq)
    return PolicyInputs(
        stats=stats,
        batch=draw(batches),
        samples_seen=draw(counts),
        last_change_samples=draw(st.none() | st.just(0)),
        credit=draw(st.none() | scales),
        kappa=draw(st.none() | scales),
        lr_fraction=draw(st.floats(0, 1)),
        peak_lr_fraction=draw(st.just(1.0) | st.floats(0, 1)),
        workers=draw(st.integers(1, 6)),
        steps=draw(step_models()),
    )


def policy(name: str, **more):
    return build_policy(settings(name, **more))


def turn(name: str, data) -> dict:
    """The policy's knob, turned anywhere; a policy whose knob is not known here fails."""
    key, values = ("kappa", positive) if name in PLUGINS["policy"] else KNOBS[name]
    return {key: data.draw(values)}


def settings(name: str, **more):
    return PolicySettings(name=name, floor=FLOOR, ceiling=CEILING, **(NEEDED.get(name, {}) | more))


@pytest.mark.parametrize("name", NAMES)
@given(situation=situations(), shrink=st.booleans(), data=st.data())
def test_policies_are_pure_stay_within_limits_and_give_a_reason(name, situation, shrink, data) -> None:
    turned = turn(name, data) if name not in PLANNED | {"fixed"} else {}
    decision = policy(name, shrink=shrink, **turned)(situation)
    assert decision == policy(name, shrink=shrink, **turned)(situation)
    assert type(decision.target_batch) is int
    assert FLOOR <= decision.target_batch <= CEILING
    assert decision.reason.strip()
    assert shrink or decision.target_batch >= situation.batch


@pytest.mark.parametrize("name", sorted(PLANNED))
@given(situation=situations(), other=situations())
def test_a_planned_policy_does_not_look_at_the_noise(name, situation, other) -> None:
    elsewhere = replace(situation, stats=other.stats, credit=other.credit)
    assert policy(name, shrink=True)(elsewhere) == policy(name, shrink=True)(situation)


@pytest.mark.parametrize("name", NAMES)
@given(situation=situations(), steps=step_models(), workers=st.integers(1, 6), data=st.data())
def test_only_a_policy_declared_time_dependent_looks_at_step_times(name, situation, steps, workers, data) -> None:
    given_ = turn(name, data) if name in KNOBS else {}
    if not sees_clock(settings(name, **given_)):
        chosen = policy(name, shrink=True, **given_)
        assert chosen(replace(situation, steps=steps, workers=workers)) == chosen(situation)


@pytest.mark.parametrize("name", MEASURED)
@given(situation=situations((Verdict.TOO_NOISY, Verdict.TOO_FEW_MICRO_BATCHES)))
def test_without_a_signal_the_batch_is_kept(name, situation) -> None:
    assert policy(name, shrink=True)(situation).target_batch == situation.batch


@pytest.mark.parametrize("name", MEASURED)
@given(low=st.none() | scales, verdict=st.sampled_from(Verdict), batch=batches, shrink=st.booleans())
def test_an_interval_without_an_upper_end_moves_no_policy(name, low, verdict, batch, shrink) -> None:
    stats = NoiseStats(verdict=verdict, noise_scale=low and 2 * low, low=low, grad_sq=1.0)
    decision = policy(name, shrink=shrink)(PolicyInputs(stats=stats, batch=batch, samples_seen=10**9))
    assert decision.target_batch == batch


@pytest.mark.parametrize("name", list(PREFERENCES))
@given(many=st.lists(st.floats(0, 1.7e308), min_size=2, max_size=9), situation=situations(), data=st.data())
def test_a_preference_never_falls_as_the_noise_scale_rises(name, many, situation, data) -> None:
    batch_at = PREFERENCES[name](settings(name, **turn(name, data)))(situation).batch_at
    wished = [batch_at(scale) for scale in sorted(many)]
    assert wished == sorted(wished)
    assert wished[0] >= 0


@pytest.mark.parametrize("name", MEASURED)
@given(situation=situations((Verdict.MEASURED,)))
def test_growth_is_at_most_the_cap_and_is_paid_by_the_credit(name, situation) -> None:
    grown = policy(name, max_growth=2.0)(situation).target_batch
    assert grown <= 2 * situation.batch
    if situation.credit is not None:
        prefer = PREFERENCES.get("noise_scale" if name in PLUGINS["policy"] else name)
        paid = prefer(settings(name))(situation).batch_at(situation.credit) if prefer else 0.0
        assert grown <= max(situation.batch, round(min(paid, CEILING)))


@pytest.mark.parametrize("name", MEASURED)
@given(
    batch=batches,
    many=st.lists(st.floats(1e-9, 1e12), min_size=2, max_size=9),
    width=st.floats(1, 100),
    shrink=...,
    steps=step_models(),
)
def test_a_larger_noise_scale_never_asks_for_a_smaller_batch(name, batch, many, width, shrink: bool, steps) -> None:
    def target(scale: float) -> int:
        low, high = scale / width, scale * width
        stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=scale, low=low, high=high, grad_sq=1.0)
        inputs = PolicyInputs(stats=stats, batch=batch, samples_seen=10**9, steps=steps)
        return policy(name, shrink=shrink)(inputs).target_batch

    targets = [target(scale) for scale in sorted(many)]
    assert targets == sorted(targets)
