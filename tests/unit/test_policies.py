"""Base policies and the restraints around them: when a batch changes, how far, and what the reason says."""

from dataclasses import replace

import pytest

from orchestrator.core.policies import POLICIES, PolicySettings, build_policy
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.core.preferences import Preference, always
from orchestrator.core.restraints import (
    with_cooldown,
    with_credit,
    with_deadband,
    with_growth_cap,
    with_limits,
    without_shrinking,
)
from orchestrator.types import Decision, NoiseStats, Verdict


def measured(scale: float, low: float, high: float) -> NoiseStats:
    return NoiseStats(verdict=Verdict.MEASURED, noise_scale=scale, low=low, high=high)


def inputs(stats: NoiseStats, batch: int = 64, seen: int = 10_000, **more) -> PolicyInputs:
    return PolicyInputs(stats=stats, batch=batch, samples_seen=seen, **more)


SILENT = NoiseStats(verdict=Verdict.TOO_NOISY)
BARE = PolicySettings(name="noise_scale", deadband=1.0, max_growth=1e9, shrink=True)


def wishes(target: int):
    return lambda _: Decision(target_batch=target, reason="wished")


def target(policy, batch: int = 64, **more) -> int:
    return policy(inputs(SILENT, batch=batch, **more)).target_batch


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        (measured(310, 250, 402), 310),
        (measured(310, 60, 402), 64),  # perhaps not above the batch
        (measured(20, 10, 30), 20),
        (measured(20, 10, 70), 64),  # perhaps not below it
    ],
)
def test_the_noise_scale_moves_the_batch_only_when_its_whole_interval_agrees(stats, expected) -> None:
    assert build_policy(BARE)(inputs(stats)).target_batch == expected


@pytest.mark.parametrize("verdict", [Verdict.TOO_NOISY, Verdict.TOO_FEW_MICRO_BATCHES])
@pytest.mark.parametrize("numbers", [{}, {"low": 1e6}, {"noise_scale": 1e6, "low": 1e5, "high": 1e7}])
def test_no_signal_keeps_the_batch_and_says_so(verdict, numbers) -> None:
    decision = build_policy(BARE)(inputs(NoiseStats(verdict=verdict, **numbers)))
    assert decision.target_batch == 64
    assert verdict.value in decision.reason


def test_kappa_multiplies_the_noise_scale() -> None:
    settings = PolicySettings(name="noise_scale", kappa=0.5, deadband=1.0, max_growth=1e9)
    assert build_policy(settings)(inputs(measured(310, 250, 402))).target_batch == 155
    assert build_policy(settings)(inputs(measured(310, 100, 402))).target_batch == 64


FREE = {"deadband": 1.0, "max_growth": 1e9, "shrink": True}
ROOT = PolicySettings(name="tradeoff", exchange_rate=100.0, **FREE)
NORM = PolicySettings(name="norm_test", theta=0.5, **FREE)


@pytest.mark.parametrize(
    ("settings", "scale", "expected"),
    [
        (ROOT, 1000, 316),  # sqrt(100 x 1000)
        (NORM, 100, 400),  # tr(Sigma) 100, |G|^2 1: the noise of 400 samples is half of |G|
        (replace(NORM, theta=1.0), 100, 100),
        (replace(NORM, theta=2.0), 100, 25),
    ],
)
def test_closed_forms_of_the_batch_at_a_noise_scale(settings, scale, expected) -> None:
    decision = build_policy(settings)(inputs(measured(scale, scale, scale)))
    assert decision.target_batch == expected
    assert f"noise scale {scale} [{scale}, {scale}]" in decision.reason


@pytest.mark.parametrize(
    ("settings", "stats", "expected"),
    [
        (ROOT, measured(1000, 41, 9000), 316),  # even sqrt(100 x 41) is 64.03
        (ROOT, measured(1000, 40, 9000), 64),  # sqrt(100 x 40) is 63.2: perhaps not above the batch
        (ROOT, measured(10, 1, 40), 32),
        (ROOT, measured(10, 1, 41), 64),
        (NORM, measured(100, 16.1, 900), 400),
        (NORM, measured(100, 16, 900), 64),
        (NORM, measured(10, 1, 15.9), 40),
        (NORM, measured(10, 1, 16), 64),
    ],
)
def test_the_whole_interval_is_turned_into_batches_before_it_is_compared(settings, stats, expected) -> None:
    assert build_policy(settings)(inputs(stats)).target_batch == expected


@pytest.mark.parametrize(("settings", "expected"), [(ROOT, 100), (NORM, 400)])
def test_the_guards_credit_is_turned_into_batches_as_the_noise_scale_is(settings, expected) -> None:
    decision = build_policy(settings)(inputs(measured(1e6, 1e6, 1e6), credit=100.0))
    assert decision.target_batch == expected
    assert "only 100 of it is credited" in decision.reason


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("norm_test", "theta", None),
        *(
            (name, key, value)
            for name, key in (("tradeoff", "exchange_rate"), ("norm_test", "theta"))
            for value in (0.0, -1.0, float("inf"), float("nan"))
        ),
    ],
)
def test_a_policy_without_its_number_is_refused(name, key, value) -> None:
    with pytest.raises(ValueError, match=rf"controller\.{key} (is missing|must be a positive number)"):
        build_policy(PolicySettings(name=name, **{key: value}))


def test_reasons_state_the_numbers_and_the_restraint() -> None:
    settings = PolicySettings(name="noise_scale")
    decision = build_policy(settings)(inputs(measured(310, 250, 402)))
    assert decision.target_batch == 128
    for text in ("310", "250", "402", "2"):
        assert text in decision.reason


def test_the_ramp_is_a_step_function_of_the_samples_seen() -> None:
    policy = build_policy(PolicySettings(name="schedule", ramp=((100, 32), (200, 64))))
    found = [policy(inputs(SILENT, batch=8, seen=seen)).target_batch for seen in (0, 99, 100, 199, 200, 10**9)]
    assert found == [8, 8, 32, 32, 64, 64]


def test_the_ramp_obeys_limits_but_no_cooldown_dead_band_or_cap() -> None:
    settings = PolicySettings(
        name="schedule", ramp=((0, 1000), (50, 1001)), ceiling=500, deadband=10.0, cooldown_samples=10**9
    )
    assert build_policy(settings)(inputs(SILENT, batch=8, last_change_samples=9_999)).target_batch == 500


@pytest.mark.parametrize("ramp", [(), ((200, 32), (100, 64)), ((100, 32), (100, 64))])
def test_a_ramp_that_does_not_rise_is_refused(ramp) -> None:
    with pytest.raises(ValueError, match=r"controller\.ramp"):
        build_policy(PolicySettings(name="schedule", ramp=ramp))


def test_fixed_is_never_altered_not_even_by_limits() -> None:
    policy = build_policy(PolicySettings(name="fixed", floor=100, ceiling=200))
    assert policy(inputs(measured(1e6, 1e5, 1e7), batch=8)).target_batch == 8


@pytest.mark.parametrize(("wish", "expected"), [(95, 64), (96, 96), (43, 64), (42, 42), (64, 64)])
def test_the_dead_band_keeps_what_is_near(wish, expected) -> None:
    assert target(with_deadband(wishes(wish), ratio=1.5, ceiling=10**6)) == expected


@pytest.mark.parametrize(("last", "expected"), [(None, 256), (9_000, 64), (9_001, 64), (6_000, 256)])
def test_the_cooldown_counts_samples_since_the_last_change(last, expected) -> None:
    policy = with_cooldown(wishes(256), cooldown_samples=4_000)
    assert target(policy, last_change_samples=last) == expected


@pytest.mark.parametrize(("batch", "wish", "expected"), [(64, 1000, 128), (64, 100, 100), (64, 1, 32), (1, 9, 2)])
def test_one_decision_changes_the_batch_at_most_by_the_cap(batch, wish, expected) -> None:
    assert target(with_growth_cap(wishes(wish), max_growth=2.0), batch=batch) == expected


def test_a_cap_too_small_for_a_whole_sample_still_lets_the_batch_grow() -> None:
    assert target(with_growth_cap(wishes(9), max_growth=1.2), batch=2) == 3


@pytest.mark.parametrize(("wish", "expected"), [(1, 16), (64, 64), (500, 128)])
def test_limits_hold(wish, expected) -> None:
    assert target(with_limits(wishes(wish), floor=16, ceiling=128)) == expected


def test_at_a_limit_the_reason_says_that_the_batch_is_kept() -> None:
    decision = with_limits(wishes(500), floor=16, ceiling=64)(inputs(SILENT))
    assert decision == Decision(target_batch=64, reason="keep 64: wished; the ceiling is 64")


def test_limits_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match="floor"):
        with_limits(wishes(1), floor=129, ceiling=128)


@pytest.mark.parametrize(("wish", "expected"), [(32, 64), (64, 64), (128, 128)])
def test_without_shrinking_only_growth_is_left(wish, expected) -> None:
    assert target(without_shrinking(wishes(wish))) == expected


@pytest.mark.parametrize(
    ("credit", "wish", "expected"), [(None, 500, 500), (100, 500, 200), (30, 500, 64), (30, 20, 20), (1e6, 500, 500)]
)
def test_growth_is_cut_to_the_batch_at_the_credit_and_shrinking_is_free(credit, wish, expected) -> None:
    twice = always(Preference(batch_at=lambda scale: 2 * scale))
    assert target(with_credit(wishes(wish), preferred=twice), credit=credit) == expected


def own_policy(settings: PolicySettings):
    return wishes(10_000)


def test_an_imported_policy_gets_the_settings_and_the_restraints() -> None:
    settings = PolicySettings(name=f"{__name__}:own_policy", ceiling=100)
    assert target(build_policy(settings)) == 100


def theta_as_batch(settings: PolicySettings):
    return wishes(round(settings.theta))


def test_an_imported_policy_may_use_any_number_of_the_settings() -> None:
    assert target(build_policy(PolicySettings(name=f"{__name__}:theta_as_batch", theta=100.0))) == 100


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=", ".join(POLICIES)):
        build_policy(PolicySettings(name="nois_scale"))
