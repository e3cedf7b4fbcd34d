"""The noisy quadratic model (Zhang et al. 2019, arXiv:1907.04164): its closed form, the three regimes of batch sizes
of Shallue et al. 2018, arXiv:1811.03600, and where the policies end on it through the real controller."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq, least_squares

from orchestrator.core.lr_rules import build_rule
from orchestrator.core.noise import NoiseSettings
from orchestrator.core.policies import PolicySettings, build_policy
from tests.unit.noisy_quadratic import NoisyQuadratic, best_steps, harmonic
from tests.unit.planted import drive, gaussian, rules, without_guard

ONE = NoisyQuadratic(curvature=np.ones(1), noise=np.ones(1), start=np.ones(1))

# --- the closed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "batch", "expected"),
    [
        (0.5, 4, 0.08333),
        (0.05, 1, 0.02564),  # half the rate, and
        (0.1, 2, 0.02632),  # twice the batch: alike to 2.6 %, and the more the smaller the rate
    ],
)
def test_the_stationary_variance_at_curvature_and_noise_1(lr, batch, expected) -> None:
    assert ONE.stationary_variance(lr, batch)[0] == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("steps", [1, 7, 60])
def test_simulated_means_variances_and_losses_are_those_of_the_closed_form(steps: int) -> None:
    model, runs, lr, batch = harmonic(12, start=0.5), 20_000, 0.7, 4
    weights = model.simulate(steps, runs=runs, seed=steps, lr=lr, batch=batch)
    mean, second = model.mean(steps, lr), model.second_moment(steps, lr, batch)
    sd = np.sqrt(second - mean**2)
    assert np.abs((weights.mean(axis=0) - mean) / (sd / math.sqrt(runs))).max() < 4.5
    assert np.abs(weights.var(axis=0) / sd**2 - 1).max() < 4.5 * math.sqrt(2 / runs)
    losses = 0.5 * weights**2 @ model.curvature
    assert losses.mean() == pytest.approx(model.loss(steps, lr, batch), abs=4.5 * losses.std() / math.sqrt(runs))


# --- steps and batches -----------------------------------------------------------------------------------------------


def greedy_loss(loss: float, batch: int) -> float:
    """After one step at McCandlish's best rate, on h = 2 in 20 directions with noise of variance 0.5 a sample each.

    The rate is that of batch 1, (1 / h) / (1 + S), times the factor of the rule ``noise_scale``; S = 2.5 / loss.
    """
    h, directions, variance = 2.0, 20, 0.5
    scale = directions * variance / (2 * h * loss)
    lr = (1 / h) / (1 + scale) * build_rule("noise_scale")(float(batch), noise_scale=scale, base_batch=1)
    return loss * (1 - lr * h) ** 2 + 0.5 * h * lr**2 * directions * variance / batch


def test_the_greedy_rate_by_our_rule_takes_the_isotropic_quadratic_from_5_to_0_5556() -> None:
    assert greedy_loss(5.0, 4) == pytest.approx(0.55556, abs=5e-6)


@pytest.mark.parametrize("batch", [1, 16, 256, 4096])
def test_the_isotropic_quadratic_scales_perfectly_whatever_the_batch(batch: int) -> None:
    """1 / L grows by B / c a step, so a given loss takes samples, not steps: there is no hyperbola."""
    loss = 5.0
    for _ in range(4096 // batch):
        loss = greedy_loss(loss, batch)
    assert 1 / loss == pytest.approx(1 / 5.0 + 4096 / 2.5, rel=1e-9)


def test_steps_to_a_loss_show_the_three_regimes_and_the_hyperbola_of_both() -> None:
    """At the best constant rate for each batch: perfect scaling, diminishing returns, and a limit.

    McCandlish et al.'s S = S_min (1 + B_crit / B) is fitted to the logarithms.
    """
    model = harmonic(100)
    goal = 0.02 * model.loss(0, 0.0, 1)
    batches = 2 ** np.arange(0, 19)
    rates = np.geomspace(1e-4, 1.99, 240)
    steps = np.array([best_steps(model, goal, int(batch), rates) for batch in batches])
    slopes = np.diff(np.log(steps)) / np.diff(np.log(batches))
    assert slopes[:3] == pytest.approx(-1.0, abs=0.05)
    assert np.abs(slopes[-3:]).max() < 0.02
    assert (np.diff(slopes) > -0.03).all()  # in between they only diminish

    def off(x: np.ndarray) -> np.ndarray:
        return np.log(steps) - x[0] - np.log1p(np.exp(x[1]) / batches)

    fit = least_squares(off, [math.log(steps[-1]), math.log(steps[0] / steps[-1])])
    residual = off(fit.x)
    print(
        f"\nsteps {steps}\nB_crit {math.exp(fit.x[1]):.0f}, off by {np.sqrt(np.mean(residual**2)):.3f} in log", end=""
    )
    assert np.sqrt(np.mean(residual**2)) < 0.05


# --- where the policies end ------------------------------------------------------------------------------------------

FREE = {"deadband": 1.05, "cooldown_samples": 4096, "ceiling": 1 << 14, "floor": 8, "shrink": True}
STEADY = {"total_samples": 400_000, "noise": NoiseSettings(half_life_samples=32_768)}
POLICIES = {
    "noise_scale": PolicySettings(name="noise_scale", kappa=2.0, **FREE),
    "tradeoff": PolicySettings(name="tradeoff", exchange_rate=800.0, **FREE),
    "norm_test": PolicySettings(name="norm_test", theta=0.5, **FREE),
}
FIXED_POINTS = {  # of the batch at noise scale S
    "noise_scale": lambda scale: 2 * scale,
    "tradeoff": lambda scale: math.sqrt(800 * scale),
    "norm_test": lambda scale: scale / 0.5**2,  # with |G|^2 + tr(Sigma) / B in the place of |G|^2 it would be 3 S
}


@pytest.mark.parametrize("name", list(POLICIES))
def test_at_a_noise_scale_that_does_not_move_each_policy_ends_at_its_fixed_point(name: str) -> None:
    settled = rules(policy=build_policy(POLICIES[name]), **STEADY)
    ends = [drive(settled, gaussian(lambda seen: 100.0, seed=seed)).state.target.batch for seed in range(5)]
    expected = FIXED_POINTS[name](100.0)
    print(f"\n{name}: {sorted(ends)}, fixed point {expected:.0f}", end="")
    assert np.median(ends) == pytest.approx(expected, rel=0.1)
    assert all(0.75 * expected <= end <= 1.35 * expected for end in ends)


PLATEAU = NoisyQuadratic(curvature=np.repeat([1.0, 0.5, 0.25], 8), noise=np.ones(24), start=np.zeros(24))


@pytest.mark.parametrize("name", ["noise_scale", "norm_test"])
def test_on_a_plateau_with_lr_over_batch_held_the_policy_ends_at_the_closed_form_too(name: str) -> None:
    """At lr = a B / 32 the noise scale is 32 tr(Sigma) / (a sum of h c / (2 - lr h)) and hardly moves with B; the
    policy's batch at it is solved for."""
    lr, settings, share = 0.2, *{
        "noise_scale": ({"kappa": 0.25}, 0.25), "norm_test": ({"theta": 1.8}, 1 / 1.8**2)
    }[name]  # fmt: skip
    settled = rules(
        policy=build_policy(PolicySettings(name=name, **(FREE | settings))), lr_rule=build_rule("linear"), **STEADY
    )

    def too_large(batch: float) -> float:
        return batch - share * batch * PLATEAU.plateau_ratio(lr * batch / 32)

    expected = brentq(too_large, 32, 60 / lr)
    ends = [drive(settled, PLATEAU.world(seed=seed, lr=lr, batch=32)).state.target.batch for seed in range(5)]
    print(f"\n{name}: {sorted(ends)}, fixed point {expected:.0f}", end="")
    assert np.median(ends) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("name", ["noise_scale", "norm_test"])
def test_on_a_plateau_at_one_rate_the_batch_chases_itself_and_the_guard_holds_it(name: str) -> None:
    settings = {"noise_scale": {"kappa": 1.0}, "norm_test": {"theta": 1.2}}[name]
    policy = build_policy(PolicySettings(name=name, ceiling=2048, floor=32, cooldown_samples=4096, **settings))
    founded = PLATEAU.plateau_ratio(0.5) * 32
    ends = {}
    for label, used in (("guarded", policy), ("free", without_guard(policy))):
        settled = rules(policy=used, total_samples=120_000)
        ends[label] = [drive(settled, PLATEAU.world(seed=s, lr=0.5, batch=32)).largest for s in range(5)]
    print(f"\n{name}: {ends}, founded on {founded:.0f}", end="")
    assert max(ends["guarded"]) <= 3 * founded < 2048
    assert np.median(ends["free"]) == 2048
