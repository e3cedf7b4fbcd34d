"""Decays of the LR schedule become growth of the batch, and the noise of the updates follows the decayed baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from orchestrator.config import RunConfig
from orchestrator.config.optimization import OPTIMIZER_KEYS
from orchestrator.core.families import FAMILIES, NOISE_EXPONENTS
from orchestrator.core.lr_rules import auto
from orchestrator.core.policies import PolicySettings, build_policy
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.core.schedules import ScheduleSettings, build_schedule
from orchestrator.runtime import folder
from orchestrator.runtime.rules import rules_from
from orchestrator.session import Session
from orchestrator.types import NoiseStats, Verdict
from tests.support import blobs, config, cross_entropy, mlp
from tests.unit.planted import drive, level, rules

SILENT = NoiseStats(verdict=Verdict.TOO_NOISY)


def run_config(optimizer: str = "sgd", lr: float = 0.1, initial: int = 128, **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "batch": {"initial": initial, "micro_batch": 32, "max": 10_000},
        "controller": {"policy": "decay_to_growth", "deadband": 1.0},
        "schedule": {"name": "step", "milestones_samples": [20_000], "gamma": 0.2},
        "train": {"samples": 100_000},
    }
    # Merged into the tests' sgd, whose momentum belongs to no other optimizer.
    own: dict[str, Any] = {"momentum": 0.9 if optimizer in ("sgd", "lars") else None}
    if "part_samples" in OPTIMIZER_KEYS.get(optimizer, ()):
        own["part_samples"] = 16
    return config("runs", optimizer={"name": optimizer, "lr": lr, **own}, **(base | sections))


def wished(settled: Any, batch: int, **more: Any) -> int:
    return settled.policy(PolicyInputs(stats=SILENT, batch=batch, samples_seen=20_000, **more)).target_batch


@pytest.mark.parametrize(
    ("optimizer", "lr", "initial", "gamma", "batch", "expected_lr"),
    [
        ("sgd", 0.1, 128, 0.2, 640, 0.1),  # Smith et al.: 0.1 -> 0.02 becomes 128 -> 640
        ("adamw", 1e-3, 256, 0.5, 512, 1e-3 / math.sqrt(2)),  # Seesaw: (1e-3, 256) -> (7.07e-4, 512)
    ],
)
def test_known_answers_of_the_papers(optimizer, lr, initial, gamma, batch, expected_lr) -> None:
    schedule = {"name": "step", "milestones_samples": [20_000], "gamma": gamma}
    settled = rules_from(run_config(optimizer, lr, initial, schedule=schedule), dataset_size=50_000)
    fraction = settled.schedule(20_000)
    assert wished(settled, initial, lr_fraction=fraction) == batch
    factor = fraction * settled.lr_rule(batch / initial, noise_scale=None, base_batch=initial)
    assert lr * factor == pytest.approx(expected_lr, rel=1e-12)


@pytest.mark.parametrize("optimizer", list(OPTIMIZER_KEYS))
def test_noise_follows_the_decayed_baseline_whatever_the_batch(optimizer) -> None:
    """LR / batch for sgd and its kin, LR / sqrt(batch) for adam and its: as if the batch had stayed."""
    settled = rules_from(run_config(optimizer, schedule={"name": "cosine"}), dataset_size=50_000)
    power, base = 1.0 if optimizer in ("sgd", "lars", "clars", "vr_sgd") else 0.5, 128
    for seen in (0, 1, 49_999, 70_000, 99_999):
        for batch in (1, 100, 128, 129, 640, 10**6):
            fraction = settled.schedule(seen)
            factor = fraction * settled.lr_rule(batch / base, noise_scale=None, base_batch=base)
            assert factor / batch**power == pytest.approx(fraction / base**power, rel=1e-12)


def test_every_known_optimizer_has_a_family_and_its_exponent() -> None:
    assert set(FAMILIES) == set(OPTIMIZER_KEYS)
    for name, family in FAMILIES.items():
        grown = auto(name)(4.0, noise_scale=1e12, base_batch=1)  # where noise is all, auto keeps the same balance
        assert grown == pytest.approx(4.0 ** NOISE_EXPONENTS[family], rel=1e-6)


@pytest.mark.parametrize(
    ("fraction", "peak", "expected"),
    [(0.01, 0.01, 64), (0.7, 0.7, 64), (1.0, 1.0, 64), (0.5, 1.0, 128), (0.35, 0.7, 128), (0.0, 1.0, 4096)],
)
def test_growth_is_counted_from_the_peak_so_far_and_a_warm_up_is_none(fraction, peak, expected) -> None:
    settings = PolicySettings(name="decay_to_growth", base_batch=64, floor=64, ceiling=4096)
    inputs = PolicyInputs(stats=SILENT, batch=64, samples_seen=0, lr_fraction=fraction, peak_lr_fraction=peak)
    assert build_policy(settings)(inputs).target_batch == expected


@pytest.mark.parametrize(("fraction", "batch", "expected"), [(0.9, 64, 64), (0.1, 64, 640), (0.6, 64, 107)])
def test_the_dead_band_restrains_it_and_neither_cap_nor_cooldown_does(fraction, batch, expected) -> None:
    settings = PolicySettings(
        name="decay_to_growth", base_batch=64, floor=64, ceiling=4096, max_growth=1.1, cooldown_samples=10**9
    )
    inputs = PolicyInputs(
        stats=SILENT, batch=batch, samples_seen=9, last_change_samples=8, lr_fraction=fraction, peak_lr_fraction=1.0
    )
    assert build_policy(settings)(inputs).target_batch == expected


@pytest.mark.parametrize("most", [10_000, 160])
@pytest.mark.parametrize("deadband", [1.0, 1.2, 1.3, 1.5])
@pytest.mark.parametrize(
    ("schedule", "lowest"),
    [
        ({"name": "cosine", "final_fraction": 0.7}, 0.7),
        ({"name": "linear", "final_fraction": 0.8}, 0.8),
        ({"name": "wsd", "decay_samples": 50_000, "final_fraction": 0.998}, 0.998),
        ({"name": "one_cycle", "warmup_samples": 9000, "final_fraction": 0.75}, 0.75),
        ({"name": "step", "milestones_samples": [20_000, 40_000], "gamma": 0.9}, 0.81),
    ],
    ids=lambda each: each["name"] if isinstance(each, dict) else "",
)
def test_a_dead_band_is_refused_exactly_where_a_whole_run_would_never_leave_it(
    schedule, lowest, deadband, most
) -> None:
    """The controller itself is the oracle: on every step of the run it decides, with the policy the config asks for."""
    settings = PolicySettings(name="decay_to_growth", base_batch=128, floor=128, ceiling=most, deadband=deadband)
    curve = build_schedule(ScheduleSettings(**schedule), total_samples=100_000)
    policy = build_policy(settings)
    run = drive(rules(total_samples=100_000, base_batch=128, every_samples=128, policy=policy, schedule=curve), level)
    asked = {"deadband": deadband, "policy": "decay_to_growth"}
    batch = {"initial": 128, "micro_batch": 32, "max": most}
    if run.largest > 128:
        run_config(schedule=schedule, controller=asked, batch=batch)
    else:
        with pytest.raises(ValidationError, match=rf"the schedule falls to {lowest:.4g}"):
            run_config(schedule=schedule, controller=asked, batch=batch)


TOTAL, BASE = 80_000, 20


def steps_of(schedule: Callable[[int], float], *, deadband: float, warm: bool = False) -> tuple[int, list[int]]:
    """The steps of a whole run by the real controller, and its batches."""
    policy = build_policy(
        PolicySettings(name="decay_to_growth", base_batch=BASE, floor=BASE, ceiling=TOTAL, deadband=deadband)
    )
    run = drive(rules(total_samples=TOTAL, base_batch=BASE, every_samples=100, policy=policy, schedule=schedule), level)
    return sum(1 for event, _ in run.history if hasattr(event, "sample")), [batch for _, batch in run.batches]


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        (lambda u: math.cos(math.pi * u / TOTAL / 2), 2 / math.pi),  # Seesaw's: it saves 36.3 % of the steps
        (lambda u: (1 + math.cos(math.pi * u / TOTAL)) / 2, 1 / 2),  # ours
    ],
)
def test_the_steps_that_remain_are_the_mean_of_the_schedule(schedule, share) -> None:
    """The integral of the schedule is the ideal; what lags, decision intervals and the dead-band cost comes on top."""
    points = 10_000
    mean = math.fsum(schedule(TOTAL * (i + 0.5) / points) for i in range(points)) / points
    assert mean == pytest.approx(share, rel=1e-6)
    ideal, (ungated, _), (gated, batches) = (
        mean * TOTAL / BASE,
        steps_of(schedule, deadband=1.0),
        steps_of(schedule, deadband=1.5),
    )
    assert ideal < ungated < 1.03 * ideal
    assert ungated < gated < 1.2 * ideal
    assert len(batches) > 5
    assert all(b >= 1.5 * a for a, b in pairwise(batches))


def test_a_warm_up_leaves_the_batch_alone_in_a_whole_run() -> None:
    settings = ScheduleSettings(name="one_cycle", warmup_samples=20_000, start_fraction=0.04, final_fraction=0.25)
    policy = build_policy(PolicySettings(name="decay_to_growth", base_batch=BASE, floor=BASE, ceiling=TOTAL))
    schedule = build_schedule(settings, total_samples=TOTAL)
    run = drive(rules(total_samples=TOTAL, base_batch=BASE, policy=policy, schedule=schedule), level)
    grown = [(seen, batch) for seen, batch in run.batches if batch != BASE]
    assert min(seen for seen, _ in grown) > 20_000
    assert 2 * BASE < run.largest <= 4 * BASE


def test_a_session_trains_with_the_batch_and_the_rate_that_the_policy_means(tmp_path: Path) -> None:
    """Up to the ceiling of 4 x the LR of sgd stays as it was, above it the LR takes the rest of the decay."""
    settings = config(
        tmp_path,
        train={"samples": 4096},
        batch={"initial": 16, "micro_batch": 8, "max": 64},
        optimizer={"lr": 0.1},
        schedule={"name": "step", "milestones_samples": [1024, 2048, 3072], "gamma": 0.5},
        controller={"policy": "decay_to_growth", "every_samples": 128},
    )
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    rows = list(folder.surviving(tmp_path / "run" / folder.METRICS))
    settled = {0: (16, 0.1), 1024: (32, 0.1), 2048: (64, 0.1), 3072: (64, 0.05)}
    for begins, expected in settled.items():
        # The decision and its lag over, and the next milestone not reached.
        inside = [r for r in rows if begins + 512 < r["samples_seen"] <= begins + 1024]
        assert {(r["global_batch"], round(r["lr"], 12)) for r in inside} == {expected}
    for row in rows:
        began = row["samples_seen"] - row["global_batch"]
        noise = 0.1 * 0.5 ** sum(began >= m for m in (1024, 2048, 3072)) / 16
        assert row["lr"] / row["global_batch"] == pytest.approx(noise, rel=1e-9)
