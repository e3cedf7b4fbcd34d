"""Averaged weights: their half-life is in samples, whatever the batches; they are saved, and used where asked."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from orchestrator.core.companions import ema_weight
from orchestrator.errors import ConfigError, SessionError
from orchestrator.runtime import folder
from orchestrator.runtime.ema import EmaWeights
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from orchestrator.train import train
from tests.support import blobs, config, cross_entropy, mlp, run_fleet

GROWING = {
    "batch": {"initial": 16, "micro_batch": 8, "max": 64},
    "controller": {"policy": "schedule", "ramp": [[128, 64]], "every_samples": 128, "max_growth": 4.0},
}


def average(batches: list[int], values: list[float], *, half_life: float) -> float:
    """The definition: each value weighs 2^(-samples since / half-life) times what one step took of the samples."""
    seen, total, weights = sum(batches), 0.0, 0.0
    for batch, value in zip(batches, values, strict=True):
        seen -= batch
        weight = 2 ** (-seen / half_life) - 2 ** (-(seen + batch) / half_life)
        total, weights = total + weight * value, weights + weight
    return total / weights


@given(st.lists(st.tuples(st.integers(1, 512), st.floats(-10, 10)), min_size=1, max_size=12), st.integers(1, 4096))
def test_the_average_weighs_weights_by_their_age_in_samples(steps: list[tuple[int, float]], half_life: int) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema, seen = EmaWeights(model, half_life_samples=half_life), 0
    for batch, value in steps:
        nn.init.constant_(model.weight, value)
        seen += batch
        ema.update(batch, samples_seen=seen)
    batches, values = zip(*steps, strict=True)
    expected = average(list(batches), list(values), half_life=half_life)
    assert ema.tensors["weight"].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_eight_times_the_batch_keeps_the_eighth_power_of_what_is_kept() -> None:
    """Busbridge et al. 2023: 0.999 becomes 0.992028; far from the beginning, where all weights sum to one anyway."""
    kept = 0.999
    half_life = 32 * math.log(0.5) / math.log(kept)
    for ratio in (1, 8):
        left = 1 - ema_weight(32 * ratio, samples_seen=10**9, half_life_samples=half_life)
        assert left == pytest.approx(kept**ratio, rel=1e-9)
    assert kept**8 == pytest.approx(0.992028, abs=1e-6)


def test_a_model_in_bfloat16_is_averaged_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    ema = EmaWeights(model, half_life_samples=10_000)
    ema.update(1000, samples_seen=1000)
    nn.init.constant_(model.weight, 2.0)
    ema.update(1, samples_seen=1001)
    assert 1.0 < ema.tensors["weight"].item() < 1.004  # bfloat16 knows nothing between 1 and 1.0078
    with ema.in_place():
        assert model.weight.dtype == torch.bfloat16
        assert model.weight.item() == 1.0


def session_of(path: Path, *, half_life: int | None = 100, resume: bool = False) -> Session:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = config(path, train={"samples": 320, "ema_half_life_samples": half_life}, **GROWING)
    return Session(settings, model=model, optimizer=optimizer, dataset=blobs(), resume=resume)


def averaged(session: Session) -> dict[str, Tensor]:
    with session.ema_weights():
        return {name: p.detach().clone() for name, p in session.model.named_parameters()}


def run(session: Session, *, stop_in_step: int | None = None) -> dict[str, Tensor]:
    with session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            if session.step_number == stop_in_step:
                session.request_stop("the test asked")
            session.step()
    return averaged(session)


@pytest.mark.parametrize("stop_in_step", [10, 11])  # with step 12 the batch has grown
def test_a_resumed_run_has_the_same_average_bit_for_bit(tmp_path: Path, stop_in_step: int) -> None:
    whole = run(session_of(tmp_path / "whole"))
    run(session_of(tmp_path / "parts"), stop_in_step=stop_in_step)
    parts = run(session_of(tmp_path / "parts", resume=True))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_averaging_changes_nothing_in_training_and_the_models_own_weights_come_back(tmp_path: Path) -> None:
    plain, kept = session_of(tmp_path / "plain", half_life=None), session_of(tmp_path / "kept")
    unchanged, average = run(plain), run(kept)
    assert all(torch.equal(p, unchanged[name]) for name, p in kept.model.named_parameters())
    assert not any(torch.equal(average[name], unchanged[name]) for name in average)
    with pytest.raises(RuntimeError, match="in an evaluation"), kept.ema_weights():
        raise RuntimeError("in an evaluation")
    assert all(torch.equal(p, unchanged[name]) for name, p in kept.model.named_parameters())


@pytest.mark.parametrize("call", ["backward", "step"])
def test_training_with_the_averaged_weights_is_refused(tmp_path: Path, call: str) -> None:
    with session_of(tmp_path) as session:
        for samples in next(iter(session)):
            loss = cross_entropy(session.model, samples)
            if call == "step":
                session.backward(loss)
            else:
                break
        with session.ema_weights(), pytest.raises(SessionError, match="train after it has ended"):
            session.backward(loss) if call == "backward" else session.step()


def test_averaged_weights_are_not_put_into_the_model_twice(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    with session, session.ema_weights(), pytest.raises(SessionError, match="cannot be nested"), session.ema_weights():
        pass


def test_a_checkpoint_without_an_average_does_not_fit_a_run_that_wants_one(tmp_path: Path) -> None:
    run(session_of(tmp_path, half_life=None), stop_in_step=3)
    with pytest.raises(
        ConfigError, match=r"(?s)train\.ema_half_life_samples.*the checkpoint holds no averaged weights"
    ):
        session_of(tmp_path, resume=True)


def test_train_evaluates_with_the_average(tmp_path: Path) -> None:
    """A half-life of one sample leaves the last weights alone; one far longer than the run gives a plain mean."""
    task = {"name": "digits", "options": {"width": 8, "augment": False}}
    lines = {}
    for name, half_life in (("own", None), ("short", 1), ("long", 10**6)):
        settings = config(
            tmp_path / name, task=task, train={"samples": 320, "ema_half_life_samples": half_life}, **GROWING
        )
        assert train(settings, local_worker(settings), resume=False)
        lines[name] = folder.surviving(tmp_path / name / "run" / folder.EVALS)[-1]["loss"]
    assert lines["short"] == pytest.approx(lines["own"], rel=1e-6)  # 2^-64 is left of the weights before the last
    assert abs(lines["long"] / lines["own"] - 1) > 0.003


def on_a_rank(rank: int, path: str) -> list[list[float]]:
    return [average.flatten().tolist() for average in run(session_of(Path(path))).values()]


@pytest.mark.dist
def test_all_ranks_have_the_same_average(tmp_path: Path) -> None:
    first, second = run_fleet(on_a_rank, 2, str(tmp_path))
    assert first == second
