"""The guard against the ratchet (theory G1): what earns credit, what does not, and where guarded runs end."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from orchestrator.core import codec
from orchestrator.core.guard import GuardState, credit, loss_is_falling, observe
from orchestrator.core.noise import NoiseSettings
from orchestrator.core.policies import PolicySettings, build_policy
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.types import NoiseStats, Verdict
from tests.unit.planted import COOLDOWN, World, drive, gaussian, plateau_ratio, quadratic, rules, without_guard

SEEDS = range(10)
FOUNDED = 120.0  # the credit of a growth founded on 100 with an interval to 120
SILENT = NoiseStats(verdict=Verdict.TOO_NOISY, low=1e6)


def around(scale: float, width: float = 1.2) -> NoiseStats:
    return NoiseStats(verdict=Verdict.MEASURED, noise_scale=scale, low=scale / width, high=scale * width)


def watch(state: GuardState, times: int, *, stats=None, batch=64, lr=0.1, loss=1.0, changed=False, seed=0):
    """``times`` intervals alike; ``stats``, ``lr`` and ``loss`` may be functions of the interval, from 0 on."""
    rng = np.random.default_rng(seed)

    def at(value, i):
        return value(i) if callable(value) else value

    for i in range(times):
        state = observe(
            state, batch=batch, lr=at(lr, i), stats=at(stats, i) if stats is not None else SILENT,
            mean_loss=at(loss, i) + 0.01 * rng.standard_normal(), changed=changed and i == 0,
        )  # fmt: skip
    return state


def grown(scale: float = 100.0) -> GuardState:
    """A run that grew from 32 to 64 on a noise scale of ``scale``, and has been at rest since."""
    state = watch(GuardState(), 20, stats=around(scale), batch=32)
    return watch(state, 20, stats=around(scale), batch=64, changed=True)


# --- what earns credit -----------------------------------------------------------------------------------------------


def test_before_the_first_growth_nothing_is_restricted() -> None:
    state = watch(GuardState(), 30, stats=lambda i: around(100.0 * 1.5**i))
    assert credit(state) is None


@pytest.mark.parametrize(("width", "credited"), [(1.2, 120.0), (2.0, 200.0), (50.0, 200.0)])
def test_after_a_growth_the_credit_is_the_upper_end_of_what_it_was_founded_on_and_at_most_twice_it(
    width, credited
) -> None:
    state = watch(GuardState(), 12, stats=around(100.0, width), batch=32)
    assert credit(watch(state, 12, stats=around(180.0, width), batch=64, changed=True)) == credited


def test_a_noise_scale_that_rises_with_the_batch_earns_nothing() -> None:
    state = grown(100.0)
    for batch in (128, 256, 512):
        # In proportion to the batch, slowly, as averages and weights follow it.
        ratio = batch / 32
        state = watch(
            state, 12, stats=lambda i, r=ratio: around(100.0 * r * (1 - 0.5 ** (i / 3 + 1))), batch=batch, changed=True
        )
    assert credit(state) == FOUNDED


def test_a_rise_at_constant_batch_and_rate_is_credited() -> None:
    state = watch(grown(100.0), 6, stats=around(400.0))
    assert credit(state) == pytest.approx(480.0)


def test_a_rise_is_credited_to_its_height_though_averages_reach_it_only_after_the_next_growth() -> None:
    state = watch(grown(100.0), 2, stats=around(300.0))
    assert credit(state) == 360.0
    state = watch(state, 3, stats=lambda i: around(400.0 + 100.0 * i), batch=128, changed=True)
    assert credit(state) == pytest.approx(720.0)


def test_what_rose_once_is_the_next_yardstick() -> None:
    state = watch(watch(grown(100.0), 12, stats=around(400.0)), 12, stats=around(400.0), batch=128, changed=True)
    assert credit(watch(state, 30, stats=around(1000.0))) == 480.0
    assert credit(watch(grown(100.0), 30, stats=around(1000.0))) == 1200.0


def test_a_rise_no_larger_than_the_intervals_is_not_credited() -> None:
    assert credit(watch(grown(100.0), 30, stats=around(200.0))) == FOUNDED


def test_a_decaying_rate_alone_is_not_progress() -> None:
    # On a plateau the noise scale goes as 1 / LR; a cosine to 2 % of the rate raises it fifty-fold.
    def lr(i):
        return 0.1 * (0.02 + 0.98 * (1 + math.cos(math.pi * i / 99)) / 2)

    state = watch(grown(100.0), 100, stats=lambda i: around(100.0 * 0.1 / lr(i)), lr=lr)
    assert credit(state) == FOUNDED


def test_a_rate_that_rises_again_does_not_make_progress_of_what_its_decay_explained() -> None:
    state = watch(grown(100.0), 5, stats=lambda i: around(100.0 * 2.0**i), lr=lambda i: 0.1 * 0.5**i)
    assert credit(watch(state, 3, stats=around(1600.0), lr=0.1)) == FOUNDED


def test_a_falling_loss_is_progress_but_not_while_the_growth_itself_lowers_it() -> None:
    start = watch(GuardState(), 12, stats=around(100.0), batch=32)
    fresh = watch(start, 2, stats=around(190.0), batch=64, loss=lambda i: 1.0 - 0.2 * i, changed=True)
    assert credit(watch(fresh, 30, stats=around(190.0), loss=0.6)) == FOUNDED
    assert credit(watch(fresh, 8, stats=around(190.0), loss=lambda i: 0.6 - 0.02 * i)) == pytest.approx(228.0)


def test_a_falling_noise_scale_takes_its_credit_along_and_a_dip_does_not() -> None:
    assert credit(watch(grown(100.0), 5, stats=around(85.0, 1.5))) == FOUNDED
    assert credit(watch(grown(100.0), 5, stats=around(20.0))) == pytest.approx(24.0)


def test_without_a_bounded_interval_the_credit_stays() -> None:
    assert credit(watch(grown(100.0), 50, stats=SILENT, loss=lambda i: 1.0 - 0.01 * i)) == FOUNDED


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10**6),
            st.sampled_from([0.0, 1e-320, 1e-30, 0.1, 1e3]),
            st.none() | st.just(0.0) | st.floats(1e-30, 1e300),
            st.sampled_from([0.0, 1.0, -1.0, 1e-300, 1e200, 1.7e308, math.nan, math.inf, -math.inf]),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_any_history_leaves_a_state_that_survives_json(history) -> None:
    state = GuardState()
    for batch, lr, scale, loss, changed in history:
        stats = SILENT if scale is None else around(scale)
        state = observe(state, batch=batch, lr=lr, stats=stats, mean_loss=loss, changed=changed)
        assert credit(state) is None or credit(state) >= 0
        assert all(map(math.isfinite, state.losses))
        known = {"GuardState": GuardState}
        assert codec.decode(json.loads(json.dumps(codec.encode(state))), known) == state


def test_a_saved_state_stays_small_however_long_the_run() -> None:
    state = watch(grown(), 2000, stats=around(100.0))
    assert len(json.dumps(codec.encode(state))) < 1500


# --- is the loss falling? --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [6, 9, 16])
def test_a_level_loss_is_taken_for_falling_as_rarely_as_the_level_says(blocks) -> None:
    draws = np.random.default_rng(blocks).standard_normal((4000, blocks))
    found = sum(loss_is_falling(tuple(row), level=0.01) for row in draws.tolist())
    assert 20 <= found <= 62  # 40 expected, standard deviation 6.3


@given(st.floats(1e-150, 1e150), st.integers(6, 16))
def test_the_scale_of_the_loss_does_not_matter(scale, blocks) -> None:
    wobble = [0.01 * math.sin(7.0 * i) for i in range(blocks)]
    assert loss_is_falling(tuple(scale * (1.0 - 0.02 * i + e) for i, e in enumerate(wobble)))
    assert not loss_is_falling(tuple(scale * (1.0 + 0.02 * i + e) for i, e in enumerate(wobble)))


@pytest.mark.parametrize("losses", [(0.1,) * 16, (1e300,) * 9, (0.0,) * 6])
def test_a_constant_loss_does_not_fall(losses) -> None:
    assert not loss_is_falling(losses)


def test_five_blocks_are_too_few_to_tell() -> None:
    assert not loss_is_falling((5.0, 4.0, 3.0, 2.0, 1.0))
    assert loss_is_falling((6.0, 5.0, 4.0, 3.0, 2.0, 1.0))


# --- runs ------------------------------------------------------------------------------------------------------------


def climb(seed: int, *, guarded: bool, scale, num: int = 200) -> int:
    """The last batch after ``num`` decisions on momentary readings of ``scale(decision, batch)``, at a level loss."""
    rng, state, batch, changed = np.random.default_rng(seed), GuardState(), 32, False
    policy = build_policy(PolicySettings(name="noise_scale", floor=32, ceiling=1 << 16))
    for k in range(num):
        stats = around(scale(k, batch) * float(np.exp(0.05 * rng.normal())), 1.1)
        loss = 5.0 + 0.01 * float(rng.normal())
        state = observe(state, batch=batch, lr=0.1, stats=stats, mean_loss=loss, changed=changed)
        given = PolicyInputs(stats=stats, batch=batch, samples_seen=4096 * k, credit=credit(state) if guarded else None)
        wish = policy(given).target_batch
        changed, batch = wish != batch, wish
    return batch


def test_a_batch_that_raises_its_own_noise_scale_at_once_stops_at_the_first_reading() -> None:
    def ratchet(k: int, batch: int) -> float:
        return 19.0 * batch

    assert {climb(seed, guarded=False, scale=ratchet) for seed in range(5)} == {1 << 16}
    ends = [climb(seed, guarded=True, scale=ratchet) for seed in range(20)]
    print(f"momentary readings, first noise scale {19 * 32}: {sorted(ends)}")
    assert np.median(ends) <= 1.5 * 19 * 32
    assert max(ends) <= 3 * 19 * 32


PLATEAUS = {"one curvature": [0.5], "three curvatures": [0.5, 0.1, 0.02]}


def test_the_plateaus_noise_scale_is_proportional_to_the_batch_as_theory_says() -> None:
    """G1: B_simple / B = 2 tr(Sigma) / (LR tr(H Sigma)), here without its leading-order approximation."""
    assert plateau_ratio([0.1], lr=0.01) == pytest.approx(2 / (0.01 * 0.1), rel=1e-3)
    world = quadratic([0.5, 0.1], seed=1, base_batch=64)
    rows = [world(0, 64, 1.0) for _ in range(20_000)]
    ratio = sum(row["trace_cov"] for row in rows) / sum(row["grad_sq"] for row in rows) / 64
    assert ratio == pytest.approx(plateau_ratio([0.5, 0.1]), rel=0.1)


@pytest.mark.parametrize("name", list(PLATEAUS))
def test_on_a_plateau_the_unguarded_policy_grows_without_end_and_the_guarded_one_stops(name) -> None:
    curvatures = PLATEAUS[name]
    ceiling, total = 1024, 80_000
    free = rules(total_samples=total, ceiling=ceiling)
    loose = rules(total_samples=total, policy=without_guard(free.policy))
    bound = 3.0 * plateau_ratio(curvatures) * 32  # of the noise scale at the first batch, where growth is founded
    guarded, unguarded = [], []
    for seed in SEEDS:
        guarded.append(drive(free, quadratic(curvatures, seed=seed)).largest)
        unguarded.append(drive(loose, quadratic(curvatures, seed=seed)).largest)
    print(f"{name}: guarded {sorted(guarded)}, unguarded {sorted(unguarded)}, bound {bound:.0f}")
    assert max(guarded) <= bound < ceiling
    assert sum(batch > bound for batch in unguarded) >= 9
    assert np.median(unguarded) > 0.9 * ceiling


def test_a_run_that_falls_onto_a_plateau_stops_there_too() -> None:
    curvatures = PLATEAUS["three curvatures"]
    ends = [drive(rules(total_samples=80_000), quadratic(curvatures, seed=s, start=1.0)).largest for s in SEEDS]
    print(f"fallen onto a plateau: {sorted(ends)}")
    assert max(ends) <= 3.0 * plateau_ratio(curvatures) * 32


IMPROVING_SAMPLES = 150_000


def power_law(seed: int) -> World:
    """A spectrum like 1 / i: the loss falls like a power of time, and the noise scale rises steeply as it falls."""
    return quadratic([0.5 / i for i in range(1, 101)], seed=seed, start=1.0, each=1)


def keeping_pace(seed: int) -> World:
    """The noise scale rises from 40 to 1280 no faster than the batch follows it: only the falling loss is progress."""
    readings = gaussian(lambda seen: 40.0 * 32.0 ** (seen / IMPROVING_SAMPLES), seed=seed)

    def world(seen: int, batch: int, factor: float) -> dict[str, Any]:
        reading = readings(seen, batch, factor)
        return reading | {"loss": reading["loss"] + 2.0 * 32.0 ** (-0.5 * seen / IMPROVING_SAMPLES)}

    return world


@pytest.mark.parametrize("world", [power_law, keeping_pace])
def test_a_run_that_really_improves_is_not_stalled_for_long(world) -> None:
    goal = 512
    settled = rules(total_samples=IMPROVING_SAMPLES, ceiling=goal)
    loose = rules(total_samples=IMPROVING_SAMPLES, policy=without_guard(settled.policy))
    delays = []
    for seed in range(6):
        reached = []
        for rule in (settled, loose):
            run = drive(rule, world(seed))
            reached.append(next((seen for seen, batch in run.batches if batch == goal), None))
        assert None not in reached, f"seed {seed}: guarded and free runs came to {goal} at {reached}"
        delays.append(reached[0] - reached[1])
    print(f"{world.__name__}: the guard's delay on the way from 32 to {goal}: {sorted(delays)} samples")
    assert np.median(delays) <= 2 * COOLDOWN
    assert max(delays) <= 8 * COOLDOWN


def test_a_constant_noise_scale_is_climbed_to_by_doublings_without_other_progress() -> None:
    for seed in range(6):
        run = drive(rules(total_samples=120_000), gaussian(lambda seen: 1000.0, seed=seed))
        sizes = [batch for _, batch in run.batches]
        assert all(a < b <= 2 * a for a, b in pairwise(sizes))
        assert 500 <= run.largest <= 1600, f"seed {seed}: {run.batches}"


@pytest.mark.parametrize("louder", [False, True])
def test_a_planted_step_is_followed_within_one_cooldown_and_to_its_height(louder) -> None:
    """At constant batch, LR and loss, in a run that grew before; a cooldown here is six half-lives of the average."""
    cooldown, at = 6144, 30_000
    settled = rules(
        total_samples=80_000, cooldown_samples=cooldown, noise=NoiseSettings(half_life_samples=cooldown / 6)
    )
    for seed in range(8):
        run = drive(settled, gaussian(lambda seen: 60.0 if seen < at else 600.0, seed=seed, louder=louder))
        before = [batch for seen, batch in run.batches if seen < at]
        first = min((seen for seen, _ in run.plans if seen >= at), default=None)
        assert 32 < before[-1] <= 120, f"seed {seed}: it grew before the step, and to the noise scale there was"
        assert first is not None, f"seed {seed}: never followed"
        assert first - at <= cooldown, f"seed {seed}: {first - at} samples"
        assert 250 <= run.largest <= 1200, f"seed {seed}: {run.batches}"
