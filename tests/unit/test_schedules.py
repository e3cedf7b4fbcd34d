"""Schedules in samples: closed forms, and independence of how the samples were cut into batches."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from orchestrator.core.schedules import ScheduleSettings, build_schedule

TOTAL = 1000
SETTINGS = {
    "constant": ScheduleSettings(name="constant"),
    "cosine": ScheduleSettings(name="cosine", final_fraction=0.1),
    "linear": ScheduleSettings(name="linear", final_fraction=0.1),
    "step": ScheduleSettings(name="step", milestones_samples=(400, 800), gamma=0.5),
    "wsd": ScheduleSettings(name="wsd", decay_samples=200, final_fraction=0.1),
    "one_cycle": ScheduleSettings(name="one_cycle", warmup_samples=300, start_fraction=0.04, final_fraction=0.1),
}


def warmed(name: str, warmup: int) -> ScheduleSettings:
    given_ = {f: getattr(SETTINGS[name], f) for f in ScheduleSettings.__dataclass_fields__}
    return ScheduleSettings(**(given_ | {"warmup_samples": warmup}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 1, 500: 1, 1000: 1}),
        ("cosine", {0: 1, 250: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 500: 0.55, 1000: 0.1}),
        ("linear", {0: 1, 250: 0.775, 500: 0.55, 1000: 0.1}),
        ("step", {0: 1, 399: 1, 400: 0.5, 799: 0.5, 800: 0.25, 1000: 0.25}),
        ("wsd", {0: 1, 800: 1, 900: 0.55, 1000: 0.1}),
        ("one_cycle", {0: 0.04, 150: 0.52, 300: 1, 650: 0.55, 1000: 0.1}),
    ],
)
def test_closed_forms(name, expected) -> None:
    schedule = build_schedule(SETTINGS[name], total_samples=TOTAL)
    assert [schedule(u) for u in expected] == pytest.approx(list(expected.values()), rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_doubling_the_batch_half_way_gives_750_steps_and_nearly_the_same_sum_of_rates(name) -> None:
    schedule = build_schedule(ScheduleSettings(name=name, final_fraction=0.0), total_samples=1000)
    plain = [schedule(u) for u in range(1000)]
    grown = [schedule(u) for u in range(500)] + [2.0 * schedule(u) for u in range(500, 1000, 2)]
    assert (len(plain), sum(plain)) == (1000, pytest.approx(500.5, rel=1e-12))
    assert (len(grown), sum(grown)) == (750, pytest.approx(500.75, abs=1e-3))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "one_cycle"])
@given(batches=st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_any_batch_history_ends_at_the_final_fraction(name, batches) -> None:
    seen = 0
    for batch in batches:
        seen += batch
    schedule = build_schedule(SETTINGS[name], total_samples=seen + 600)
    assert schedule(seen + 600) == pytest.approx(0.1, rel=1e-12)
    assert schedule(seen + 700) == schedule(seen + 600)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_warm_up_rises_from_above_zero_and_ends_at_the_full_rate(name) -> None:
    schedule = build_schedule(warmed(name, 200), total_samples=TOTAL)
    rise = [schedule(u) for u in range(201)]
    assert 0 < rise[0] <= 0.05
    assert all(a <= b for a, b in pairwise(rise))
    assert rise[-1] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("name", list(SETTINGS))
@given(samples=st.integers(0, 5000))
def test_every_value_lies_in_zero_to_one(name, samples) -> None:
    assert 0 < build_schedule(SETTINGS[name], total_samples=TOTAL)(samples) <= 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ScheduleSettings(name="cosine", warmup_samples=9000), "schedule.warmup_samples 9000"),
        (ScheduleSettings(name="wsd", warmup_samples=300, decay_samples=800), "schedule.decay_samples 800"),
        (ScheduleSettings(name="cosin"), "did you mean cosine"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_by_its_key(settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        build_schedule(settings, total_samples=TOTAL)
