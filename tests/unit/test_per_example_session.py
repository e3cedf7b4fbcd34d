"""The per-example estimator inside a session: what reaches the run's folder, and the ways a loop may go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.core.cursor import Stream
from orchestrator.errors import MeasureError, NonFiniteError
from orchestrator.runtime import replay
from orchestrator.session import Session
from tests.support import EAGER, blobs, config, cross_entropy, mlp
from tests.unit.examples import one_by_one
from tests.unit.small_runs import readings_of, trained

BATCH, STEPS = 12, 3


def run(folder: Path, model: nn.Module, *, lr: float = 1e-30, steps: int = STEPS, **more: Any) -> list[dict[str, Any]]:
    scaler, loss = more.pop("scaler", None), more.pop("loss", cross_entropy)
    sections: dict[str, Any] = {
        "batch": {"initial": BATCH, "micro_batch": 5, "max": 96},
        "measure": {"estimator": "per_example", **more.pop("measure", {})},
        "train": {"samples": steps * BATCH, **more.pop("train", {})},
    }
    settings = config(folder, **{**sections, **more})
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), grad_scaler=scaler) as session:
        for step in session:
            for batch in step:
                session.backward(lambda batch=batch: loss(session.model, batch))  # type: ignore[misc]
            session.step()
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def truth(model: nn.Module, step: int) -> tuple[float, float]:
    """(|G|^2, tr(Sigma)) of a step's samples, from gradients one by one."""
    data = blobs()
    taken = [data[int(i)] for i in Stream(size=len(data), seed=0).indices(range(step * BATCH, (step + 1) * BATCH))]
    inputs, labels = torch.stack([x for x, _ in taken]).double(), torch.stack([y for _, y in taken])
    exact = mlp().double()
    exact.load_state_dict(model.state_dict())
    both = torch.cat([inputs, labels.unsqueeze(1).double()], 1)

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return cross_entropy(model, (rows[:, :-1], rows[:, -1].long()))

    mean = torch.autograd.grad(loss(exact, both), list(exact.parameters()))
    mean_sq = sum(float(g.square().sum()) for g in mean)
    trace_cov = (one_by_one(exact, both, loss) - BATCH * mean_sq) / (BATCH - 1)
    return mean_sq - trace_cov / BATCH, trace_cov


@pytest.mark.parametrize("how", ["plain", "clipped", "scaled"])
def test_the_rows_hold_the_moments_of_single_samples_gradients(tmp_path: Path, how: str) -> None:
    model = mlp()
    more: dict[str, Any] = {"train": {"max_grad_norm": 1e-3}} if how == "clipped" else {}
    if how == "scaled":
        more = {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**14)}
    for row in run(tmp_path, model, **more):
        grad_sq, trace_cov = truth(model, row["step"])
        assert row["trace_cov"] == pytest.approx(trace_cov, rel=1e-5)
        assert row["grad_sq"] == pytest.approx(grad_sq, abs=1e-5 * (abs(grad_sq) + trace_cov / BATCH))


def test_memory_that_runs_out_half_way_through_a_step_leaves_nothing_of_it_in_the_reading(tmp_path: Path) -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = cross_entropy(model, batch)
        if calls == 2:
            raise torch.OutOfMemoryError("made up")
        return value

    model = mlp()
    rows = run(tmp_path, model, loss=loss, measure={"every_steps": 2})
    assert rows[0]["micro_batch"] == 2
    assert rows[0]["trace_cov"] == pytest.approx(truth(model, 0)[1], rel=1e-5)
    assert rows[1]["trace_cov"] is None
    assert rows[2]["trace_cov"] == pytest.approx(truth(model, 2)[1], rel=1e-5)


def test_a_gradient_that_is_not_finite_is_caught_in_what_is_left_out_too(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        model[0].bias.register_hook(lambda gradient: gradient * torch.nan)  # type: ignore[index]
        return cross_entropy(model, batch)

    with pytest.raises(NonFiniteError, match="step 0: the gradient is not finite"):
        run(tmp_path, mlp(), loss=loss, measure={"leave_out": ["0"]})


def test_what_cannot_be_read_is_refused_before_the_run_has_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match="BatchNorm in training mode at 1"):
        run(tmp_path, nn.Sequential(nn.Linear(20, 4), nn.BatchNorm1d(4)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stop_in_step", [0, 3])
def test_a_run_that_was_stopped_and_resumed_reads_the_same_to_the_last_bit(tmp_path: Path, stop_in_step: int) -> None:
    # The first micro-batch of an attempt is looked at more closely, and that must not show.
    sections = {"measure": {"estimator": "per_example"}}
    trained(tmp_path / "at once", sections=sections)
    trained(tmp_path / "stopped", sections=sections, stop_in_step=stop_in_step)
    trained(tmp_path / "stopped", sections=sections, resume=True)
    assert readings_of(tmp_path / "stopped") == readings_of(tmp_path / "at once")


def test_a_batch_grows_by_the_reading_and_a_replay_of_the_folder_decides_alike(tmp_path: Path) -> None:
    rows = run(tmp_path, mlp(), lr=0.05, steps=200, controller={**EAGER})
    assert max(row["global_batch"] for row in rows) > BATCH
    found = replay.recorded(tmp_path / "run")
    assert found
    assert replay.recomputed(tmp_path / "run") == found
