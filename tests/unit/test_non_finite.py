"""A loss or gradient that is not finite ends the run, with the state before it saved and its samples named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import NonFiniteError
from orchestrator.runtime.checkpoints import CheckpointStore
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from orchestrator.train import train
from tests.support import blobs, cross_entropy
from tests.unit.broken_tasks import (
    BAD_STEP,
    FULL,
    KINDS,
    Sound,
    TaskCase,
    check_told_and_kept,
    loss_is_nan,
    loss_that,
    where_bad,
)
from tests.unit.small_runs import BATCH, settings_of


class NanBackward(torch.autograd.Function):
    """The loss as it is, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


def non_finite(name: str, make: Callable[[], Any], what: str, *, step: int = 2, **more: Any) -> TaskCase:
    positions = f"stream positions {step * BATCH} to {step * BATCH + BATCH - 1}"
    told = (f"step {step}: {what} is not finite", positions, "saved in")
    return TaskCase(name, make, told, trained=step, saved=step, **more)


def nan_gradient_in(step: int) -> Callable[[], Any]:
    return loss_that(lambda task, loss: NanBackward.apply(loss) if task.in_step == step else loss)


SELDOM = {"measure": {"every_steps": 2}}
NOT_FINITE = [
    non_finite("loss is NaN", loss_is_nan, "the loss"),
    non_finite("loss is infinite", loss_that(lambda task, loss: loss + (FULL if task.in_step == 2 else 0)), "the loss"),
    non_finite("loss is NaN at once", loss_that(lambda task, loss: loss * float("nan")), "the loss", step=0),
    non_finite("a sample is NaN", where_bad(lambda sample: (sample[0] * FULL, sample[1])), "the loss", step=BAD_STEP),
    non_finite("gradient is NaN", nan_gradient_in(2), "the gradient"),
    non_finite("gradient is NaN in a step not measured", nan_gradient_in(3), "the gradient", step=3, sections=SELDOM),
]


@pytest.mark.parametrize("case", NOT_FINITE, ids=lambda case: case.name)
def test_a_non_finite_step_is_told_and_what_was_trained_is_kept(tmp_path: Path, case: TaskCase) -> None:
    check_told_and_kept(tmp_path, case)


class Normalised(Sound):
    """With a layer that remembers what went through it."""

    def model(self) -> Any:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))


def state_before(path: Path, make: Callable[[], Any], step: int, **sections: Any) -> dict[str, Tensor]:
    """The model's state after ``step`` steps of a sound run with the same model."""
    task = make()
    settings = settings_of(path, **sections)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for each in session:
            for batch in each:
                if session.step_number == step:
                    return {name: value.clone() for name, value in model.state_dict().items()}
                session.backward(cross_entropy(session.model, batch))
            session.step()
    raise AssertionError(f"the run has no step {step}")


def assert_saved_state_is_that_of_a_sound_run(
    path: Path, make: Callable[[], Any], step: int, told: str, **sections: Any
) -> None:
    model = make().model()
    store = CheckpointStore(path / "broken" / "run" / "checkpoints", keep=2, collective=Solo())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    checkpoint, meta, faults = store.load_latest(model, optimizer)
    assert str(checkpoint) in told
    assert (meta["step"], meta["samples_seen"], faults) == (step, step * BATCH, ())
    expected = state_before(path / "sound", make, step, **sections)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("case", NOT_FINITE, ids=lambda case: case.name)
def test_what_is_saved_before_a_non_finite_step_is_the_state_before_it(tmp_path: Path, case: TaskCase) -> None:
    settings = settings_of(tmp_path / "broken", case.name, **case.sections)
    with pytest.raises(NonFiniteError) as caught:
        train(settings, local_worker(settings), resume=False)
    assert case.saved is not None
    assert_saved_state_is_that_of_a_sound_run(tmp_path, Sound, case.saved, str(caught.value), **case.sections)


@pytest.mark.filterwarnings("ignore:1 BatchNorm")
def test_a_non_finite_sample_does_not_reach_the_saved_statistics_of_a_layer(tmp_path: Path) -> None:
    def make() -> Any:
        poisoned = Normalised()
        poisoned.train_set = where_bad(lambda sample: (sample[0] * FULL, sample[1]))().train_set
        return poisoned

    KINDS["normalised"] = make
    settings = settings_of(tmp_path / "broken", "normalised")
    with pytest.raises(NonFiniteError) as caught:
        train(settings, local_worker(settings), resume=False)
    assert_saved_state_is_that_of_a_sound_run(tmp_path, Normalised, BAD_STEP, str(caught.value))


def test_where_a_non_finite_step_cannot_be_saved_the_error_says_so(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "loss is NaN")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(NonFiniteError) as caught:
        train(settings, local_worker(settings), resume=False)
    assert "saved in None" not in str(caught.value)
    assert "could not be saved" in str(caught.value)
