"""The estimator norm_layers inside a session: the calibration, the switch, and what is read after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.errors import MeasureError
from orchestrator.runtime import folder, replay
from orchestrator.session import Session
from orchestrator.tasks.protocol import build_task
from tests.support import EAGER, config
from tests.unit.small_runs import events, readings_of, trained

BATCH, STEPS = 32, 10
CALIBRATION = 6 * BATCH  # of which three steps count
Rows = list[dict[str, Any]]


def net(seed: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 8), nn.RMSNorm(8), nn.Linear(8, 4)
    )


class Gains(nn.Module):
    """All that is trained lies in one normalisation layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(20)
        self.rest = nn.Linear(20, 4).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.rest(self.norm(inputs))
        return scores


def measure(estimator: str = "norm_layers", **more: Any) -> dict[str, Any]:
    own = {"calibration_samples": CALIBRATION} if estimator == "norm_layers" else {}
    return {"estimator": estimator, **own, **more}


def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs have wide intervals; here it is not the fit's worth that matters."""
    monkeypatch.setattr("orchestrator.core.calibration.WIDEST", float("inf"))
    monkeypatch.setattr("orchestrator.core.calibration.CONFIDENCE", 0.1)


def run(path: Path, estimator: str, *, model: nn.Module | None = None, **sections: Any) -> Rows:
    sections = {"measure": measure(estimator), **sections}
    trained(path, model=net() if model is None else model, optimizer=slow, sections=sections)
    return folder.surviving(path / "run" / folder.METRICS)


def slow(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def test_after_the_calibration_the_layers_own_moments_are_read_times_the_factors_of_the_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable(monkeypatch)
    rows = run(tmp_path / "both", "norm_layers")
    whole = run(tmp_path / "whole", "per_example")
    part = run(tmp_path / "part", "per_example", measure=measure("per_example", leave_out=["0", "3", "5"]))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]  # measuring changes nothing
    (event,) = events(tmp_path / "both", "calibration")
    assert (event["step"], event["samples_seen"], event["steps"], event["problem"]) == (5, CALIBRATION, 3, None)
    assert event["slope"] == event["trace_cov_ratio"] / event["grad_sq_ratio"]
    assert "only the normalisation layers are read" in event["reason"]
    for name in ("grad_sq", "trace_cov"):
        factor = sum(row[name] for row in whole[3:6]) / sum(row[name] for row in part[3:6])
        assert event[f"{name}_ratio"] == pytest.approx(factor, rel=1e-12)
        assert [row[name] for row in rows[:6]] == [row[name] for row in whole[:6]]
        assert [row[name] for row in rows[6:]] == [event[f"{name}_ratio"] * row[name] for row in part[6:]]
        assert [row[name] for row in rows[6:]] != [row[name] for row in whole[6:]]


def test_where_all_parameters_are_in_normalisation_layers_the_factors_are_one_and_the_readings_per_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable(monkeypatch)
    run(tmp_path / "norms", "norm_layers", model=Gains())
    run(tmp_path / "whole", "per_example", model=Gains())
    (event,) = events(tmp_path / "norms", "calibration")
    assert (event["grad_sq_ratio"], event["trace_cov_ratio"], event["slope"], event["problem"]) == (1.0, 1.0, 1.0, None)
    assert readings_of(tmp_path / "norms") == readings_of(tmp_path / "whole")


@pytest.mark.parametrize("usable_fit", [True, False])
@pytest.mark.parametrize("stop_in_step", [1, 4, 5, 6])
def test_a_run_stopped_and_resumed_around_the_switch_reads_the_same_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_in_step: int, usable_fit: bool
) -> None:
    if usable_fit:
        usable(monkeypatch)
    sections = {"measure": measure(), "checkpoint": {"every_samples": 1000}}
    for name, stop in (("at once", None), ("stopped", stop_in_step)):
        trained(tmp_path / name, model=net(), optimizer=slow, sections=sections, stop_in_step=stop)
    trained(tmp_path / "stopped", model=net(), optimizer=slow, sections=sections, resume=True)
    assert readings_of(tmp_path / "stopped") == readings_of(tmp_path / "at once")
    (alone,), (event,) = (events(tmp_path / name, "calibration") for name in ("at once", "stopped"))
    assert (alone["problem"] is None) is usable_fit
    aside = ("time", "attempt")
    assert {k: v for k, v in event.items() if k not in aside} == {k: v for k, v in alone.items() if k not in aside}


def test_a_fit_that_cannot_be_used_keeps_the_run_measuring_per_example_and_says_why(tmp_path: Path) -> None:
    run(tmp_path / "norms", "norm_layers")  # three steps hardly tell a slope
    run(tmp_path / "whole", "per_example")
    (event,) = events(tmp_path / "norms", "calibration")
    assert event["problem"] == "the slope's interval is wider than 25 % to either side"
    assert event["spread"] > 0.25
    assert event["problem"] in event["reason"]
    assert "goes on measuring per example" in event["reason"]
    assert readings_of(tmp_path / "norms") == readings_of(tmp_path / "whole")


def test_steps_that_are_not_measured_are_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usable(monkeypatch)
    rows = run(tmp_path / "some", "norm_layers", measure=measure(every_steps=2))
    (event,) = events(tmp_path / "some", "calibration")
    assert event["steps"] == 1
    assert [row["trace_cov"] is None for row in rows] == [False, True] * 5
    run(tmp_path / "none", "norm_layers", measure=measure(every_steps=4, calibration_samples=4 * BATCH))
    (event,) = events(tmp_path / "none", "calibration")
    assert event["problem"] == "no step of its second half was measured"


def test_a_run_resumed_as_norm_layers_beyond_the_calibration_measures_per_example(tmp_path: Path) -> None:
    sections = {"measure": measure("per_example"), "checkpoint": {"every_samples": 1000}}
    trained(tmp_path, model=net(), optimizer=slow, sections=sections, stop_in_step=7)
    trained(tmp_path, model=net(), optimizer=slow, sections=sections | {"measure": measure()}, resume=True)
    (event,) = events(tmp_path, "calibration")
    assert event["samples_seen"] == 9 * BATCH
    assert "goes on measuring per example" in event["reason"]


@pytest.mark.parametrize("left_out", [[], ["1"]])
def test_a_model_without_normalisation_layers_is_refused_before_the_run_has_a_folder(
    tmp_path: Path, left_out: list[str]
) -> None:
    model = nn.Sequential(
        nn.Linear(20, 4), *([nn.LayerNorm(4)] if left_out else [nn.LayerNorm(4, elementwise_affine=False)])
    )
    with pytest.raises(MeasureError, match=r"LayerNorm, RMSNorm, GroupNorm, .* none of .*estimator: per_example"):
        run(tmp_path, "norm_layers", model=model, measure=measure(leave_out=left_out))
    assert not (tmp_path / "run").exists()


def test_a_batch_grows_across_the_switch_and_a_replay_of_the_folder_decides_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable(monkeypatch)
    settings = {"batch": {"initial": 12, "micro_batch": 12, "max": 96}, "controller": EAGER, "train": {"samples": 4096}}
    rows = run(tmp_path, "norm_layers", measure=measure(calibration_samples=1024), **settings)
    (event,) = events(tmp_path, "calibration")
    assert event["problem"] is None
    assert max(row["global_batch"] for row in rows) > 12
    assert replay.recomputed(tmp_path / "run") == replay.recorded(tmp_path / "run")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small, a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_of_a_transformer_the_layers_tell_the_noise_scale_that_per_example_finds_on_the_same_run(
    tmp_path: Path, seed: int
) -> None:
    rows, whole = transformer(tmp_path / "norms", "norm_layers", seed), transformer(tmp_path, "per_example", seed)
    (event,) = events(tmp_path / "norms", "calibration")
    assert event["problem"] is None
    mine, theirs = rows[-1], whole[-1]
    assert mine["loss"] == theirs["loss"]
    assert mine["trace_cov"] != theirs["trace_cov"]
    print(f"\nseed {seed}: slope {event['slope']:.3g} +- {100 * event['spread']:.0f} %; noise scale ", end="")
    print(*(f"{r['noise_scale']:.1f} [{r['noise_low']:.1f}, {r['noise_high']:.1f}]" for r in (mine, theirs)), sep=", ")
    # Not by chance: without the slope, which is 1.7 or more, each would lie outside of the other's interval.
    assert event["slope"] > 1.5
    assert theirs["noise_low"] <= mine["noise_scale"] <= theirs["noise_high"]
    assert mine["noise_low"] <= theirs["noise_scale"] <= mine["noise_high"]
    assert mine["noise_scale"] / event["slope"] < theirs["noise_low"]


def transformer(path: Path, estimator: str, seed: int) -> Rows:
    """A small language model; equal seeds train alike, whatever is measured."""
    task = build_task("char_lm", {"width": 32, "depth": 1, "context": 16}, seed=seed)
    torch.manual_seed(seed)
    model = task.model()
    settings: RunConfig = config(
        path,
        run={"seed": seed},
        train={"samples": 10_240},
        batch={"initial": 16, "micro_batch": 16, "max": 16},
        measure={"estimator": estimator},  # calibrated on as many samples as are usual
        controller={"half_life_samples": 1024},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with Session(settings, model=model, optimizer=optimizer, dataset=task.train_set) as session:
        for step in session:
            for batch in step:
                session.backward(task.loss(session.model, batch))
            session.step()
    return folder.surviving(path / "run" / folder.METRICS)
