"""What follows the batch beside the learning rate: closed forms, the same updates per sample, averages kept exact."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from orchestrator.core.companions import (
    IN_SAMPLES,
    RESCALED_OPTIMIZERS,
    SDE_OPTIMIZERS,
    Companions,
    Jump,
    Memory,
    StepScale,
    largest_batch,
    second_moment_factor,
)
from orchestrator.core.lr_rules import build_rule
from orchestrator.errors import ConfigError
from orchestrator.optim import CLARS, LAMB, LANS, LARS, VRAdam
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.rules import companions_from
from orchestrator.runtime.update import WeightUpdate
from tests.support import config

ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
MOMENTUM = Companions(in_samples=frozenset({"momentum"}))
BETAS = Companions(in_samples=frozenset({"betas"}))
DECAY = Companions(in_samples=frozenset({"weight_decay"}))
SDE = Companions(sde=True)
RESCALE = Companions(rescale_second_moment=True)
PARTS = {"part_samples": 8}

ratios = st.floats(1 / 32, 9.5)


def at(companions: Companions, base: dict[str, Any], ratio: float, *, rule: str = "sqrt") -> dict[str, Any]:
    factor = build_rule(rule)(ratio, noise_scale=100.0, base_batch=32)
    return companions.settings(base, StepScale(ratio=ratio, rule=factor))


def test_the_sde_rule_at_four_times_the_batch() -> None:
    found = at(SDE, ADAM, 4.0)
    assert found["lr"] == pytest.approx(2e-3, rel=1e-14)
    assert found["betas"] == pytest.approx((0.6, 0.996), rel=1e-12)
    assert found["eps"] == pytest.approx(0.5e-8, rel=1e-14)


def test_the_sde_rule_has_no_memory_to_shorten_where_a_beta_is_zero() -> None:
    assert at(SDE, ADAM | {"betas": (0.0, 0.999)}, 100.0)["betas"] == pytest.approx((0.0, 0.9), rel=1e-12)


@pytest.mark.parametrize(
    ("betas", "initial", "largest"),
    [
        ((0.9, 0.999), 32, 319),
        ((0.9, 0.999), 1, 9),
        ((0.0, 0.999), 8, 7999),
        ((0.95, 0.8), 16, 79),
        ((0.0, 0.0), 8, None),
    ],
)
def test_the_largest_batch_keeps_all_betas_positive(betas: Any, initial: int, largest: int | None) -> None:
    assert largest_batch(betas, base_batch=initial) == largest
    if largest is not None:
        for batch, inside in ((largest, True), (largest + 1, False)):
            kept = at(SDE, ADAM | {"betas": betas}, batch / initial)["betas"]
            assert all(k > 1e-12 for k, beta in zip(kept, betas, strict=True) if beta) == inside


@given(ratios, st.floats(0.1, 0.9999))
def test_betas_in_samples_keep_their_half_life(ratio: float, beta: float) -> None:
    found = at(BETAS, ADAM | {"betas": (beta, beta)}, ratio)["betas"][0]
    assert math.log(found) == pytest.approx(ratio * math.log(beta), rel=1e-6)


@given(ratios)
def test_betas_in_samples_with_the_root_are_the_sde_rule_to_first_order(ratio: float) -> None:
    mine, theirs = at(BETAS, ADAM, ratio), at(SDE, ADAM, ratio)
    assert mine["lr"] == theirs["lr"]
    for found, expected, beta in zip(mine["betas"], theirs["betas"], ADAM["betas"], strict=True):
        assert abs(found - expected) <= 0.5 * (ratio * (1 - beta)) ** 2 + (1 - beta) ** 2 * ratio


@pytest.mark.parametrize("rule", ["constant", "linear", "sqrt", "noise_scale"])
@given(ratio=ratios, schedule=st.floats(0.01, 1))
def test_decay_in_samples_shrinks_the_weights_alike_per_sample(rule: str, ratio: float, schedule: float) -> None:
    factor = build_rule(rule)(ratio, noise_scale=100.0, base_batch=32)
    found = DECAY.settings(ADAM, StepScale(ratio=ratio, rule=factor, schedule=schedule))
    per_sample = found["lr"] * found["weight_decay"] / (32 * ratio)
    assert per_sample == pytest.approx(schedule * ADAM["lr"] * ADAM["weight_decay"] / 32, rel=1e-12)


@pytest.mark.parametrize(("rule", "times"), [("linear", 1.0), ("sqrt", 2.0), ("constant", 4.0)])
def test_decay_in_samples_at_four_times_the_batch(rule: str, times: float) -> None:
    assert at(DECAY, ADAM, 4.0, rule=rule)["weight_decay"] == pytest.approx(0.01 * times, rel=1e-14)


def update_of(optimizer: torch.optim.Optimizer, companions: Companions, *, base_batch: int = 32) -> WeightUpdate:
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return WeightUpdate(
        optimizer,
        trained,
        scaler=None,
        max_grad_norm=None,
        device=torch.device("cpu"),
        collective=Solo(),
        base_batch=base_batch,
        companions=companions,
    )


def moved(
    make: Any, companions: Companions, *, ratios: list[float], gradient: float = 1.0, jump: bool = True
) -> list[float]:
    """How far a single weight moves in each step, under a constant gradient and the rule ``linear``."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([weight])
    update = update_of(optimizer, companions)
    found, old = [], ratios[0]
    for ratio in ratios:
        if ratio != old and jump:
            update.carry_over(Jump(old_batch=round(32 * old), new_batch=round(32 * ratio)))
        before, old = weight.item(), ratio
        update.begin_step()
        with update.part(share=1.0, loss_scale=1.0):
            (gradient * weight).sum().backward()
        update.apply(StepScale(ratio=ratio, rule=ratio))
        found.append(before - weight.item())
    return found


MOMENTA = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
}


@pytest.mark.parametrize("make", MOMENTA.values(), ids=MOMENTA.keys())
def test_momentum_in_samples_moves_as_far_per_sample_at_once_after_a_jump(make: Any) -> None:
    """In the steady state each step of four base batches moves four times as far, and the jump does not disturb it."""
    steps = moved(make, MOMENTUM, ratios=[1.0] * 300 + [4.0] * 20 + [1.0] * 20)
    assert steps[300:320] == pytest.approx([4 * steps[299]] * 20, rel=1e-9)
    assert steps[320:] == pytest.approx([steps[299]] * 20, rel=1e-9)


def asked_for(optimizer: str, setting: str, **own: Any) -> Companions:
    """As a run with this optimizer has them, whose config asks that ``setting`` keeps its meaning per sample."""
    section = {"name": optimizer, "lr": 0.1, "momentum": None} | own
    return companions_from(config("runs", optimizer=section, lr_rule={"in_samples": [setting]}))


@pytest.mark.parametrize(("name", "make", "own"), [("lars", LARS, {}), ("clars", CLARS, PARTS)])
def test_lars_and_clars_go_on_at_the_old_rate_and_come_to_the_new_one(name: str, make: Any, own: Any) -> None:
    companions = asked_for(name, "momentum", **own | {"momentum": 0.9})
    steps = moved(lambda p: make(p, lr=0.1, momentum=0.9), companions, ratios=[1.0] * 300 + [4.0] * 100)
    old, new = steps[299], 4 * steps[299]
    kept = 0.9**4
    assert steps[300] == pytest.approx(kept * old + (1 - kept) * new, rel=1e-9)
    assert all(old < step < new * (1 + 1e-9) for step in steps[300:])
    assert steps[-1] == pytest.approx(new, rel=1e-9)


@pytest.mark.parametrize("rule", [2.0, 4.0])
@pytest.mark.parametrize(("name", "make", "own"), [("adamw", torch.optim.AdamW, {}), ("vr_adam", VRAdam, PARTS)])
def test_a_decay_apart_from_the_gradient_shrinks_real_weights_alike_per_sample(
    name: str, make: Any, own: Any, rule: float
) -> None:
    shrunk = []
    for scale in (StepScale(), StepScale(ratio=4.0, rule=rule)):
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        update = update_of(make([weight], lr=0.1, weight_decay=0.01), asked_for(name, "weight_decay", **own))
        update.begin_step()
        with update.part(share=1.0, loss_scale=1.0):
            (0.0 * weight).sum().backward()
        update.apply(scale)
        shrunk.append(1 - weight.item())
    assert shrunk == pytest.approx([0.001, 4 * 0.001], rel=1e-9)


@pytest.mark.parametrize("companions", [SDE, BETAS], ids=["sde", "in samples"])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, LAMB], ids=lambda make: make.__name__)
@pytest.mark.parametrize("warm", [1, 30])
def test_adams_correction_stays_exact_through_jumps_of_the_betas(make: Any, companions: Companions, warm: int) -> None:
    """Under a constant gradient the corrected square is its square from the first step on, whatever the batches."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([weight], lr=1e-3, eps=1e-12)
    update = update_of(optimizer, companions)
    for ratio, jump in ((1.0, None), (8.0, (32, 256)), (2.0, (256, 64))):
        if jump is not None:
            update.carry_over(Jump(old_batch=jump[0], new_batch=jump[1]))
        for _ in range(warm):
            weight.grad = torch.full_like(weight, 3.0)
            update.apply(StepScale(ratio=ratio, rule=1.0))
            state, beta = optimizer.state[weight], optimizer.param_groups[0]["betas"][1]
            corrected = state["exp_avg_sq"] / (1 - beta ** state["step"].double())
            assert corrected.item() == pytest.approx(9.0, rel=1e-4)  # the step count is a float32


def test_the_second_moment_tends_to_what_the_rescaling_makes_of_it() -> None:
    """E g^2 = |G|^2 + S |G|^2 / B per element, with S = 100: the average at batch 32 against that at batch 256."""
    assert second_moment_factor(Jump(old_batch=32, new_batch=256, noise_scale=100.0)) == pytest.approx(
        (1 + 100 / 256) / (1 + 100 / 32), rel=1e-14
    )
    assert second_moment_factor(Jump(old_batch=32, new_batch=256, noise_scale=0.0)) == 1.0
    assert second_moment_factor(Jump(old_batch=32, new_batch=256, noise_scale=1e15)) == pytest.approx(1 / 8, rel=1e-9)
    assert second_moment_factor(Jump(old_batch=32, new_batch=256)) == 1.0


@pytest.mark.parametrize("noise_scale", [None, 96.0])
def test_rescaling_touches_the_averaged_squares_and_nothing_else(noise_scale: float | None) -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, amsgrad=True)
    update = update_of(optimizer, RESCALE)
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    update.apply(StepScale())
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    update.carry_over(Jump(old_batch=32, new_batch=96, noise_scale=noise_scale))
    factor = 1.0 if noise_scale is None else 2 / 4
    assert set(before) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    for key, value in optimizer.state[weight].items():
        assert torch.equal(value, before[key] * (factor if key.endswith("_sq") else 1.0)), key


def test_settings_are_computed_afresh_and_other_settings_are_left_alone() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([{"params": [weight], "lr": torch.tensor(0.5)}], lr=1.0, betas=(0.9, 0.99))
    update = update_of(optimizer, SDE)
    group = optimizer.param_groups[0]
    for ratio in (4.0, 4.0, 2.0, 1.0):
        weight.grad = torch.ones(1)
        update.apply(StepScale(ratio=ratio, rule=ratio**0.5))
        expected = SDE.settings({"lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8}, StepScale(ratio=ratio, rule=ratio**0.5))
        assert (group["lr"].item(), group["betas"], group["eps"]) == (
            pytest.approx(expected["lr"]),
            expected["betas"],
            expected["eps"],
        )
        assert group["weight_decay"] == 0
    assert (group["betas"], group["eps"]) == ((0.9, 0.99), 1e-8)


@pytest.mark.parametrize(
    ("make", "companions", "missing"),
    [
        (torch.optim.SGD, BETAS, "betas"),
        (torch.optim.SGD, SDE, "betas, eps"),
        (torch.optim.Adam, MOMENTUM, "momentum"),
    ],
)
def test_an_optimizer_without_the_setting_is_refused(make: Any, companions: Companions, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"that {missing} follow the batch, and parameter group 0"):
        update_of(make([nn.Parameter(torch.zeros(1))], lr=0.1), companions)


def test_the_settings_exist_in_the_optimizers_for_which_they_are_allowed() -> None:
    makes = {
        "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
        "lars": LARS, "lamb": LAMB, "lans": LANS, "clars": CLARS, "vr_adam": VRAdam,
    }  # fmt: skip
    groups = {name: make([nn.Parameter(torch.ones(2, 2))], lr=0.1).param_groups[0] for name, make in makes.items()}
    assert set(IN_SAMPLES) == set(get_args(Memory))
    for setting, names in IN_SAMPLES.items():
        assert all(setting in groups[name] for name in names)
    assert all({"betas", "eps"} <= groups[name].keys() for name in SDE_OPTIMIZERS)
    for name in RESCALED_OPTIMIZERS:
        weight = nn.Parameter(torch.ones(2, 2))
        optimizer = makes[name]([weight], lr=0.1)
        weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert "exp_avg_sq" in optimizer.state[weight]
