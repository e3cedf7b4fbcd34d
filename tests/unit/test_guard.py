"""The guard against the ratchet: what earns credit, and what a batch does on a plateau that it raises itself."""

import json

import numpy as np
import pytest

from orchestrator.core import codec, guard
from orchestrator.core.guard import GuardState, loss_is_falling
from orchestrator.core.policies import PolicyInputs, PolicySettings, build_policy
from orchestrator.types import NoiseStats, Verdict

CEILING = 1 << 16
FLAT = 5.0


def measured(scale: float, width: float = 1.1) -> NoiseStats:
    return NoiseStats(verdict=Verdict.MEASURED, noise_scale=scale, low=scale / width, high=scale * width)


def watch(state: GuardState, *, batch: int, scale: float, lr: float = 0.1, loss: float = FLAT, changed: bool = False):
    return guard.observe(state, batch=batch, lr=lr, stats=measured(scale), mean_loss=loss, changed=changed)


def grown(scale: float = 300.0) -> GuardState:
    """A batch that grew from 32 to 64 at this noise scale, and has settled."""
    state = watch(GuardState(), batch=32, scale=scale)
    state = watch(state, batch=64, scale=scale, changed=True)
    for _ in range(4):
        state = watch(state, batch=64, scale=scale)
    return state


def test_before_the_first_growth_nothing_is_restricted() -> None:
    state = watch(watch(GuardState(), batch=32, scale=300), batch=32, scale=3000)
    assert guard.credit(state) is None


def test_after_a_growth_the_credit_is_what_was_measured_before_it() -> None:
    assert guard.credit(grown(300.0)) == 300.0


def test_a_noise_scale_that_rises_with_the_batch_earns_nothing() -> None:
    state = watch(grown(300.0), batch=128, scale=600.0, changed=True)
    for _ in range(10):
        state = watch(state, batch=128, scale=600.0)
    assert guard.credit(state) == 300.0


def test_a_step_in_the_noise_scale_at_constant_batch_and_loss_is_credited() -> None:
    assert guard.credit(watch(grown(300.0), batch=64, scale=3000.0)) == 3000.0


def test_a_noise_scale_that_rises_only_as_the_rate_falls_earns_nothing() -> None:
    assert guard.credit(watch(grown(300.0), batch=64, scale=3000.0, lr=0.01)) == 300.0


def test_a_falling_loss_credits_the_present_noise_scale() -> None:
    state = watch(grown(300.0), batch=128, scale=600.0, changed=True)
    for k in range(8):
        state = watch(state, batch=128, scale=600.0, loss=FLAT - 0.1 * k)
    assert guard.credit(state) == 600.0


def test_a_fall_of_the_loss_while_the_new_batch_settles_is_no_progress() -> None:
    state = watch(grown(300.0), batch=128, scale=600.0, loss=FLAT + 2.0, changed=True)
    for loss in (FLAT + 1.0, *[FLAT] * 10):
        state = watch(state, batch=128, scale=600.0, loss=loss)
    assert guard.credit(state) == 300.0


def test_a_noise_scale_that_surely_fell_lowers_the_credit_to_the_end_of_its_interval() -> None:
    state = watch(grown(300.0), batch=64, scale=100.0)
    assert guard.credit(state) == measured(100.0).high
    assert guard.credit(watch(grown(300.0), batch=64, scale=290.0)) == 300.0


def test_what_is_not_measured_changes_no_credit() -> None:
    state = grown(300.0)
    for verdict in (Verdict.TOO_NOISY, Verdict.TOO_FEW_MICRO_BATCHES):
        stats = NoiseStats(verdict=verdict, noise_scale=1e6, low=1e5)
        state = guard.observe(state, batch=64, lr=0.1, stats=stats, mean_loss=FLAT, changed=False)
    assert guard.credit(state) == 300.0


def test_the_state_survives_json_exactly_and_stays_small() -> None:
    state, rng = grown(), np.random.default_rng(0)
    for _ in range(500):
        state = watch(state, batch=64, scale=300.0, loss=float(FLAT + rng.normal()))
    text = json.dumps(codec.encode(state))
    assert codec.decode(json.loads(text), {"GuardState": GuardState}) == state
    assert len(text) < 1500


@pytest.mark.parametrize("losses", [(0.1,) * 16, (1e300,) * 9, (1.0, 2.0, 3.0, 4.0, 5.0), (3.0, 2.0, 1.0)])
def test_constant_rising_or_too_few_losses_do_not_fall(losses) -> None:
    assert not loss_is_falling(losses)


def test_the_loss_test_has_its_level_and_its_power() -> None:
    rng = np.random.default_rng(1)
    noise, times = rng.normal(size=(4000, 12)), np.arange(12)
    by_chance = sum(loss_is_falling(tuple(row)) for row in noise)
    assert 1 <= by_chance <= 12  # 4 expected at 0.1 %
    assert sum(loss_is_falling(tuple(row - times)) for row in noise[:200]) > 195


def climb(seed: int, *, guarded: bool, improving: bool = False, constant: float | None = None, num: int = 200) -> int:
    """The last batch of a noise-scale policy; SGD with momentary readings unless told what they are."""
    rng, state, batch, changed = np.random.default_rng(seed), GuardState(), 32, False
    policy = build_policy(PolicySettings(name="noise_scale", floor=32, ceiling=CEILING))
    for k in range(num):
        scale = constant or (100.0 * 1.02**k if improving else 19.0 * batch)  # 2 / (lr h) - 1 at lr h = 0.1
        stats = measured(scale * float(np.exp(0.05 * rng.normal())))
        loss = FLAT + 0.01 * float(rng.normal()) - (0.02 * k if improving else 0.0)
        state = guard.observe(state, batch=batch, lr=0.1, stats=stats, mean_loss=loss, changed=changed)
        credit = guard.credit(state) if guarded else None
        decision = policy(PolicyInputs(stats=stats, batch=batch, samples_seen=4096 * k, credit=credit))
        changed, batch = decision.target_batch != batch, decision.target_batch
    return batch


def test_on_a_plateau_a_naive_tracker_grows_to_the_ceiling_and_a_guarded_one_mostly_stops() -> None:
    assert {climb(seed, guarded=False) for seed in range(5)} == {CEILING}
    ends = [climb(seed, guarded=True) for seed in range(20)]
    assert np.median(ends) <= 1.5 * 19 * 32


def test_a_constant_noise_scale_is_climbed_to_without_progress() -> None:
    for seed in range(10):
        assert 1000 / 1.5 < climb(seed, guarded=True, constant=1000.0, num=20) < 1500


def test_a_run_that_improves_is_hardly_slowed() -> None:
    """Noise scale 100 to 5150, loss falling: the guarded batch ends within two dead bands of the free one."""
    for seed in range(5):
        free, held = climb(seed, guarded=False, improving=True), climb(seed, guarded=True, improving=True)
        assert held > free / 1.5**2


def noisy_quadratic(seed: int, *, half_life: float = 4096.0, interval: int = 1024) -> int:
    """SGD on |w|^2 / 2 in 100 dimensions at LR 0.1, begun on its plateau, read through a fading average."""
    rng, state, batch, changed, seen, last = np.random.default_rng(seed), GuardState(), 32, False, 0, None
    policy = build_policy(PolicySettings(name="noise_scale", cooldown_samples=4096, floor=32, ceiling=CEILING))
    w = rng.normal(size=100) * np.sqrt(0.1 / (batch * 1.9))
    grad_sq = weight = 0.0
    for _ in range(200):
        losses = []
        for _ in range(-(-interval // batch)):
            fade = 0.5 ** (batch / half_life)
            grad_sq, weight = fade * grad_sq + (1 - fade) * float(w @ w), fade * weight + (1 - fade)
            losses.append(FLAT + 0.5 * float(w @ w) + float(rng.normal()) / np.sqrt(batch))
            w = w - 0.1 * (w + rng.normal(size=100) / np.sqrt(batch))
            seen += batch
        stats = measured(100.0 * weight / grad_sq * float(np.exp(0.05 * rng.normal())))
        loss = float(np.mean(losses))
        state = guard.observe(state, batch=batch, lr=0.1, stats=stats, mean_loss=loss, changed=changed)
        given = PolicyInputs(
            stats=stats, batch=batch, samples_seen=seen, last_change_samples=last, credit=guard.credit(state)
        )
        wish = policy(given).target_batch
        changed = wish != batch
        if changed:
            batch, last = wish, seen
        if batch == CEILING:
            break
    return batch


def test_on_a_plateau_seen_through_the_averages_the_guarded_batch_stays_bounded() -> None:
    ends = [noisy_quadratic(seed) for seed in range(6)]
    assert np.median(ends) <= 4 * 19 * 32
