"""The critical batch by branches: which multiple is the largest that loses nothing, and what follows for the factor."""

import math

import pytest
from hypothesis import given, strategies as st

from orchestrator.core.branching import MULTIPLES, BranchSettings, calibrate, largest_harmless, multiples_for
from orchestrator.types import NoiseStats, Verdict

losses_of_branches = st.lists(st.floats(0, 10) | st.just(math.inf) | st.just(math.nan), min_size=1, max_size=4).map(
    lambda found: list(zip(MULTIPLES, found, strict=False))
)


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ((3.000, 3.001, 3.009, 3.020), 4),
        ((2.700, 2.695, 2.704, 2.707), 4),  # 8 is within .01 of the first, and not of the best below it
        ((2.0, 2.1, 2.2, 2.3), 1),
        ((2.0, 1.9, 1.8, 1.7), 8),
        ((2.0, math.inf, 2.0, math.nan), 4),
        ((math.inf, 2.0), None),
        ((), None),
    ],
)
def test_the_largest_multiple_that_is_no_worse_than_every_smaller_one(losses, found) -> None:
    assert largest_harmless(list(zip(MULTIPLES, losses, strict=False)), tolerance=0.01) == found


@given(losses=losses_of_branches, tolerance=st.floats(0, 1))
def test_it_is_what_its_definition_says(losses, tolerance) -> None:
    finite = [(k, loss) for k, loss in losses if math.isfinite(loss)]
    harmless = [k for k, loss in finite if all(loss <= other + tolerance for j, other in finite if j < k)]
    expected = max(harmless) if math.isfinite(losses[0][1]) else None
    assert largest_harmless(losses, tolerance=tolerance) == expected


@pytest.mark.parametrize(
    ("ceiling", "samples", "remaining", "found"),
    [
        (1024, 10_000, 10_000, (1, 2, 4, 8)),
        (100, 10_000, 10_000, (1, 2, 4)),
        (1024, 4 * 4 * 16, 10_000, (1, 2, 4)),  # four steps of the largest, at least
        (1024, 10_000, 9_999, ()),
        (31, 10_000, 10_000, ()),  # one alone compares with nothing
    ],
)
def test_branches_stay_within_the_limits_and_have_steps_to_learn_from(ceiling, samples, remaining, found) -> None:
    settings = BranchSettings(every_samples=1, retry_samples=1, samples=samples, tolerance=0.01, ceiling=ceiling)
    assert multiples_for(16, remaining=remaining, settings=settings) == found


def measured(scale: float) -> NoiseStats:
    return NoiseStats(verdict=Verdict.MEASURED, noise_scale=scale, low=scale / 2, high=scale * 2)


def test_the_factor_is_the_critical_batch_over_the_noise_scale() -> None:
    losses = [(1, 3.0), (2, 3.001), (4, 3.009), (8, 3.02)]
    found = calibrate(32, losses, stats=measured(16.0), tolerance=0.01)
    assert found is not None
    assert (found.critical_batch, found.kappa) == (128, 8.0)
    unknown = calibrate(32, losses, stats=NoiseStats(verdict=Verdict.TOO_NOISY, noise_scale=16.0), tolerance=0.01)
    assert unknown is not None
    assert (unknown.critical_batch, unknown.kappa) == (128, None)
    assert calibrate(32, [(1, math.inf), (2, 3.0)], stats=measured(16.0), tolerance=0.01) is None
