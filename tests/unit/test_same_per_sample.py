"""At another batch and over equal samples: does training stay what it was, by rule and by schedule?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orchestrator.core.companions import Companions, StepScale
from orchestrator.core.lr_rules import build_rule
from orchestrator.core.schedules import ScheduleSettings, build_schedule

LR = 0.01
BASE: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8}


def mean_square(
    rule: str, *, ratio: int, start: float, deviation: float, samples: int, averaged: int = 0
) -> tuple[float, float]:
    """Mean of x^2 under Adam on the loss x^2 / 2, and its standard error over 4096 chains.

    The gradient of a base batch is x plus noise of this ``deviation``, which dominates. All chains begin at ``start``
    and take ``samples`` base batches; x^2 is read at the end, or averaged over the last ``averaged`` base batches.
    """
    chains, generator = 4096, np.random.default_rng(7)
    scale = StepScale(ratio=float(ratio), rule=build_rule(rule)(float(ratio), noise_scale=None, base_batch=1))
    found = Companions(sde=rule == "sde").settings(BASE, scale)
    lr, (beta1, beta2), eps = found["lr"], found.get("betas", BASE["betas"]), found.get("eps", BASE["eps"])
    x, m = np.full(chains, start), np.zeros(chains)
    v = np.full(chains, deviation**2 / ratio)  # where it would come by itself
    total, count = np.zeros(chains), 0
    for seen in range(ratio, samples + 1, ratio):
        gradient = x + deviation / np.sqrt(ratio) * generator.standard_normal(chains)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        x = x - lr * m / (np.sqrt(v) + eps)
        if seen > samples - max(averaged, ratio):
            total, count = total + x**2, count + 1
    mean = total / count
    return float(mean.mean()), float(mean.std() / np.sqrt(chains))


def compared(**settings: Any) -> tuple[float, dict[str, float]]:
    """The base batch's mean square, and those at four times the batch by rule."""
    base = mean_square("constant", ratio=1, **settings)
    found = {rule: mean_square(rule, ratio=4, **settings) for rule in ("sde", "sqrt", "linear", "constant")}
    said = ", ".join(f"{rule} {x:.4f} +- {error:.4f}" for rule, (x, error) in found.items())
    print(f"\nbase {base[0]:.4f} +- {base[1]:.4f}; {said}")
    return base[0], {rule: x for rule, (x, _) in found.items()}


def test_under_the_sde_rule_weights_come_as_far_over_equal_samples_as_at_the_base_batch() -> None:
    """Malladi et al. 2022. Noise sets Adam's steps, so x falls off at a rate of lr / deviation for each step: the root
    alone makes up for fewer steps of a smaller deviation, ``linear`` is twice as fast and a rate that is kept half."""
    base, found = compared(start=3.0, deviation=32.0, samples=1200)
    left = base / 9
    assert found["sde"] == pytest.approx(base, rel=0.02)
    assert found["sqrt"] == pytest.approx(base, rel=0.04)
    assert abs(found["sde"] - base) < abs(found["sqrt"] - base)
    assert found["linear"] == pytest.approx(9 * left**2, rel=0.15)
    assert found["constant"] == pytest.approx(9 * left**0.5, rel=0.1)


def test_under_the_root_rules_weights_spread_as_they_did_at_the_base_batch() -> None:
    """Where x is at rest E x^2 is lr times half the deviation times rule / sqrt(ratio), for small rates."""
    base, found = compared(start=0.0, deviation=8.0, samples=8000, averaged=4000)
    assert base == pytest.approx(LR * 8 / 2, rel=0.05)
    for rule, times in (("sde", 1.0), ("sqrt", 1.0), ("linear", 2.0), ("constant", 0.5)):
        assert found[rule] == pytest.approx(times * base, rel=0.05)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_the_rates_of_a_run_sum_to_the_same_when_the_batch_doubles_half_way(name: str) -> None:
    """1000 base steps against 500 and 250 of twice the batch under ``linear``: equal to one part in a thousand."""
    schedule = build_schedule(ScheduleSettings(name=name), total_samples=16_000)
    rule = build_rule("linear")

    def summed(batches: list[int]) -> float:
        seen, total = 0, 0.0
        for batch in batches:
            total += schedule(seen) * rule(batch / 16, noise_scale=None, base_batch=16)
            seen += batch
        assert seen == 16_000
        return total

    assert summed([16] * 500 + [32] * 250) == pytest.approx(summed([16] * 1000), rel=1e-3)
