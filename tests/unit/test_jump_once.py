"""A jump of the batch takes effect once: the ramp, the restated state, through stops at any step and on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from orchestrator.config import RunConfig
from orchestrator.core.ramp import Ramp
from orchestrator.runtime import folder, replay
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp, run_fleet
from tests.unit.small_runs import events, rows_of

# Up, down and up again, each in force two steps after its decision; by the first, the noise scale has been measured.
JUMPS = {
    "train": {"samples": 1152},
    "batch": {"initial": 16, "micro_batch": 8, "max": 64, "min": 8},
    "controller": {
        "policy": "schedule",
        "ramp": [[512, 64], [768, 8], [896, 32]],
        "every_samples": 128,
        "lag_steps": 2,
        "max_growth": 8.0,
        "deadband": 1.0,
        "cooldown_samples": 0,
        "shrink": True,
        "half_life_samples": 256,
        "confidence": 0.1,
    },
}
JUMP = 34  # the first step of 64 samples
ADAM = {"name": "adamw", "lr": 0.01, "betas": [0.9, 0.99], "momentum": None}
SETTINGS: dict[str, dict[str, Any]] = {
    "sde": {"name": "sde", "second_moment": "rescale", "ramp_samples": 200, "in_samples": ["weight_decay"]},
    "sqrt": {"name": "sqrt", "second_moment": "rescale", "in_samples": ["betas"]},
    "linear": {"name": "linear", "ramp_samples": 400, "in_samples": ["momentum"]},
}


def settings_of(path: Path, name: str, **sections: Any) -> RunConfig:
    optimizer = {} if name == "linear" else ADAM
    return config(path, lr_rule=SETTINGS[name], optimizer=optimizer, **(JUMPS | sections))


def session_of(settings: RunConfig, *, resume: bool = False) -> Session:
    model = mlp()
    make: Any = torch.optim.AdamW if settings.optimizer.name == "adamw" else torch.optim.SGD
    optimizer = make(model.parameters(), **{k: v for k, v in settings.optimizer.settings().items() if k != "name"})
    return Session(settings, model=model, optimizer=optimizer, dataset=blobs(), resume=resume)


def run(session: Session, *, stop_in_step: int | None = None) -> dict[str, Tensor]:
    """All weights and all of the optimizer's state at the end."""
    with session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            if session.step_number == stop_in_step:
                session.request_stop("the test asked")
            session.step()
    found = {name: p.detach() for name, p in session.model.named_parameters()}
    for number, state in session.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{key}": value for key, value in state.items()}
    return found


def steps_of(path: Path) -> list[tuple[Any, ...]]:
    return rows_of(path, "step", "samples_seen", "global_batch", "lr", "loss")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Tensor], list[tuple[Any, ...]]]]:
    found = {}
    for name in SETTINGS:
        path = tmp_path_factory.mktemp(name)
        state = run(session_of(settings_of(path, name)))
        found[name] = state, steps_of(path)
    return found


def test_the_runs_that_are_stopped_below_jump_up_down_and_up_again(whole: Any) -> None:
    for _, rows in whole.values():
        batches = [batch for _, _, batch, _, _ in rows[:-1]]
        assert [b for i, b in enumerate(batches) if i == 0 or b != batches[i - 1]] == [16, 64, 8, 32]
        assert batches.index(64) == JUMP


@pytest.mark.parametrize(
    ("name", "stop"), [("sde", JUMP - 2), ("sde", JUMP - 1), ("sde", JUMP), ("sqrt", JUMP - 1), ("linear", JUMP - 1)]
)
def test_a_run_stopped_about_a_jump_goes_on_as_if_it_had_not_been(
    tmp_path: Path, whole: Any, name: str, stop: int
) -> None:
    """Stopped while the decision is on its way, right before the first step of the new batch, and right after it."""
    run(session_of(settings_of(tmp_path, name)), stop_in_step=stop)
    assert steps_of(tmp_path)[-1][0] == stop
    state = run(session_of(settings_of(tmp_path, name), resume=True))
    expected, rows = whole[name]
    assert steps_of(tmp_path) == rows
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_every_jump_is_carried_over_once_and_says_by_how_much(tmp_path: Path) -> None:
    run(session_of(settings_of(tmp_path, "sqrt")), stop_in_step=JUMP - 1)
    run(session_of(settings_of(tmp_path, "sqrt"), resume=True))
    rows = events(tmp_path, "second_moment")
    assert len(rows) == 3
    assert rows[0]["step"] == JUMP
    up, down, again = (row["factor"] for row in rows)
    assert max(up, again) < 1 < down


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 10**6), st.integers(0, 10**9))
def test_a_ramp_is_a_straight_line_in_samples(start: float, goal: float, length: int, since: int) -> None:
    ramp = Ramp(start_factor=start, start_samples=since)

    def at(samples: int) -> float:
        return ramp.factor(goal, samples_seen=since + samples, length_samples=length)

    assert at(0) == start
    assert at(length) == at(10 * length) == goal
    assert at(length // 2) == pytest.approx(start + (goal - start) * (length // 2) / length, rel=1e-9, abs=1e-12)
    assert ramp.factor(goal, samples_seen=since, length_samples=0) == goal


def test_the_ramp_begins_again_at_each_jump_from_the_factor_in_force_and_the_schedule_is_outside(
    tmp_path: Path,
) -> None:
    """Longer than the stretches between the jumps, so that each begins on the way of the one before."""
    length = 400
    run(session_of(settings_of(tmp_path, "linear", schedule={"name": "linear"})))
    factor, since, start, last = 1.0, 0, 1.0, 16
    rows = folder.surviving(tmp_path / "run" / folder.METRICS)
    for row in rows[:-1]:
        seen, batch, lr = row["samples_seen"], row["global_batch"], row.get("rule_lr", row["lr"])
        before = seen - batch
        if batch != last:
            since, start, last = before, factor, batch
            on_its_way = start not in (1.0, 4.0, 0.5)
        goal = batch / 16
        progress = 1.0 if since == 0 else min(1.0, (before - since) / length)
        factor = start + (goal - start) * progress
        assert lr == pytest.approx(0.05 * (1 - before / 1152) * factor, rel=1e-12)
        # What a jump would start from is the factor at the samples seen when it comes, with the old batch.
        factor = start + (goal - start) * (1.0 if since == 0 else min(1.0, (seen - since) / length))
    assert on_its_way


def on_a_rank(rank: int, path: str, stop: int | None, resume: bool) -> list[list[float]]:
    state = run(session_of(settings_of(Path(path), "sde"), resume=resume), stop_in_step=stop)
    return [value.double().flatten().tolist() for value in state.values()]


@pytest.mark.dist
def test_two_ranks_stay_alike_through_a_stop_before_a_jump_and_train_as_one_does(tmp_path: Path, whole: Any) -> None:
    run_fleet(on_a_rank, 2, str(tmp_path), JUMP - 1, False)
    first, second = run_fleet(on_a_rank, 2, str(tmp_path), None, True)
    assert first == second
    expected, rows = whole["sde"]
    assert [row[:4] for row in steps_of(tmp_path)] == [row[:4] for row in rows]
    for mine, value in zip(first, expected.values(), strict=True):
        assert mine == pytest.approx(value.double().flatten().tolist(), rel=1e-3, abs=1e-5)


def test_a_line_names_the_rate_that_the_optimizer_stepped_with_and_a_replay_that_of_the_rule(tmp_path: Path) -> None:
    used = []
    with session_of(settings_of(tmp_path, "linear")) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            used.append(session.optimizer.param_groups[0]["lr"])
    rows = folder.surviving(tmp_path / "run" / folder.METRICS)
    assert [row["lr"] for row in rows] == used
    assert {row["global_batch"] for row in rows if "rule_lr" not in row} == {16}
    large = next(row for row in rows if row["global_batch"] == 64)
    assert large["lr"] > 1.5 * large["rule_lr"]
    assert replay.recomputed(tmp_path / "run") == replay.recorded(tmp_path / "run")
