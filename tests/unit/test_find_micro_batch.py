"""The largest micro-batch that fits is found before the first step, and nothing else is there to show for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.errors import SessionError
from orchestrator.runtime import ledger, trials
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from orchestrator.train import train
from tests.support import blobs, config, cross_entropy, mlp
from tests.unit.small_runs import events, rows_of
from tests.unit.test_out_of_memory import Hungry

WHAT_IS_MEASURED = ("step", "samples_seen", "loss", "grad_sq", "trace_cov", "lr", "micro_batch", "global_batch")


class Planted:
    """Stands for the memory of the CPU, which has as much as the model that is tried wants."""

    def __init__(self, device: torch.device) -> None:
        pass

    def suffices_for(self, trial: Callable[[], None]) -> bool:
        trial()
        return True


@pytest.fixture
def tried_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trials.MEMORIES, "cpu", Planted)


def settings_of(path: Path, *, find: bool = True, **more: Any) -> RunConfig:
    """Ten steps of 16 samples, then five of 32, in micro-batches of at most 16 or what was found."""
    sections: dict[str, Any] = {
        "train": {"samples": 320},
        "batch": {"initial": 16, "micro_batch": 16, "max": 32, "find_micro_batch": find},
        "controller": {"policy": "schedule", "ramp": [[64, 32]], "every_samples": 64, "lag_steps": 3, "deadband": 1.0},
        "ledger": True,
    }
    for name, given in more.items():
        sections[name] = sections.get(name, {}) | given
    return config(path, **sections)


def trained(
    settings: RunConfig, model: nn.Module, *, adam: bool = False, resume: bool = False, loss_of: Any = cross_entropy
) -> nn.Module:
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    if adam:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), resume=resume) as session:
        session.find_micro_batch(loss_of)
        for step in session:
            for samples in step:
                session.backward(lambda samples=samples: cross_entropy(session.model, samples))
            session.step()
    return model


def eventful() -> nn.Module:
    """What a trial could leave something in: running means, and the generator that dropout draws from."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    ("estimator", "make"),
    [("micro_batch", eventful), ("split", eventful), ("per_example", mlp)],
    ids=["micro_batch", "split", "per_example"],
)
@pytest.mark.usefixtures("tried_on_the_cpu")
def test_a_search_that_finds_room_enough_leaves_no_trace(
    tmp_path: Path, estimator: str, make: Callable[[], nn.Module], adam: bool
) -> None:
    measure = {"estimator": estimator, "groups": "layers"}
    drawn, models = [], []
    for find in (False, True):
        model = make()
        torch.manual_seed(11)
        models.append(trained(settings_of(tmp_path / str(find), find=find, measure=measure), model, adam=adam))
        drawn.append(torch.rand(3))
    assert rows_of(tmp_path / "True", *WHAT_IS_MEASURED) == rows_of(tmp_path / "False", *WHAT_IS_MEASURED)
    for found, plain in zip(models[1].state_dict().values(), models[0].state_dict().values(), strict=True):
        assert torch.equal(found, plain)
    assert torch.equal(*drawn)
    (event,) = events(tmp_path / "True", "micro_batch_found")
    assert event["micro_batch"] == (8 if estimator == "split" else 16)
    assert events(tmp_path / "True", "plan_rejected") == []


@pytest.mark.parametrize(
    ("most", "estimator"), [(5, "micro_batch"), (1, "micro_batch"), (3, "split"), (16, "micro_batch")]
)
@pytest.mark.usefixtures("tried_on_the_cpu")
def test_what_was_found_trains_like_a_micro_batch_that_was_configured(
    tmp_path: Path, most: int, estimator: str
) -> None:
    measure = {"estimator": estimator}
    found = trained(settings_of(tmp_path / "found", measure=measure), Hungry(mlp(), most=most))
    written = {"micro_batch": most * (2 if estimator == "split" else 1)}
    plain = trained(settings_of(tmp_path / "plain", find=False, batch=written, measure=measure), mlp())
    assert rows_of(tmp_path / "found", *WHAT_IS_MEASURED) == rows_of(tmp_path / "plain", *WHAT_IS_MEASURED)
    assert {batch for (batch,) in rows_of(tmp_path / "found", "global_batch")} == {16, 32}
    assert {size for (size,) in rows_of(tmp_path / "found", "micro_batch")} <= {most, 8, 16}
    for a, b in zip(found.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert ledger.verify(tmp_path / "found" / "run").violation is None
    (event,) = events(tmp_path / "found", "micro_batch_found")
    assert (event["step"], event["micro_batch"]) == (0, most)
    # Found beforehand: in training itself memory never ran out.
    assert len(events(tmp_path / "found", "plan_rejected")) == (0 if most == 16 else 1)


@pytest.mark.usefixtures("tried_on_the_cpu")
def test_a_resumed_run_remembers_what_was_found_and_does_not_look_again(tmp_path: Path) -> None:
    trained(settings_of(tmp_path), Hungry(mlp(), most=5))

    def not_again(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("looked for again")

    trained(settings_of(tmp_path, train={"samples": 640}), Hungry(mlp(), most=5), resume=True, loss_of=not_again)
    assert len(events(tmp_path, "micro_batch_found")) == len(events(tmp_path, "plan_rejected")) == 1
    assert rows_of(tmp_path, "samples_seen", "micro_batch")[-1] == (640, 5)


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
def test_beside_a_trial_lies_all_that_training_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adam: bool
) -> None:
    model, seen = mlp(), []

    class Watching(Planted):
        def suffices_for(self, trial: Callable[[], None]) -> bool:
            seen.append([p.grad is not None for p in model.parameters()])
            return super().suffices_for(trial)

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        seen.append([len(optimizer.state[p]) > 0 for p in model.parameters()])
        return cross_entropy(model, batch)

    monkeypatch.setitem(trials.MEMORIES, "cpu", Watching)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if adam:
        optimizer = torch.optim.Adam(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with Session(settings_of(tmp_path), model=model, optimizer=optimizer, dataset=blobs()) as session:
        session.find_micro_batch(loss_of)
        assert len(seen) == 4, "two trials, each looked at from without and from within"
        assert all(map(all, seen))
        assert not optimizer.state
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_on_the_cpu_the_micro_batch_stays_as_it_is_and_an_event_says_why(tmp_path: Path) -> None:
    trained(settings_of(tmp_path / "asked"), mlp())
    trained(settings_of(tmp_path / "plain", find=False), mlp())
    assert rows_of(tmp_path / "asked", *WHAT_IS_MEASURED) == rows_of(tmp_path / "plain", *WHAT_IS_MEASURED)
    (event,) = events(tmp_path / "asked", "micro_batch_not_sought")
    assert "batch.micro_batch stays 16" in event["reason"]
    assert "type cpu" in event["reason"]
    assert events(tmp_path / "plain", "micro_batch_not_sought") == []


@pytest.mark.usefixtures("tried_on_the_cpu")
def test_where_not_even_one_sample_fits_the_run_ends_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="one sample does not fit in the memory of every worker"):
        trained(settings_of(tmp_path), Hungry(mlp(), most=0))
    assert rows_of(tmp_path, "step") == []


@pytest.mark.usefixtures("tried_on_the_cpu")
def test_another_error_in_a_trial_is_raised_as_it_is_and_leaves_no_trace(tmp_path: Path) -> None:
    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        raise ValueError("planted")

    model, plain = mlp(), mlp()
    with pytest.raises(ValueError, match="planted"):
        trained(settings_of(tmp_path), model, loss_of=loss_of)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_loop_that_leaves_the_search_out_is_told(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        Session(settings_of(tmp_path), model=model, optimizer=optimizer, dataset=blobs()) as session,
        pytest.raises(SessionError, match="was looked for: call session"),
    ):
        next(iter(session))


@pytest.mark.usefixtures("tried_on_the_cpu")
def test_a_task_is_searched_for_without_a_line_of_its_own(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, task={"name": "tests.unit.test_find_micro_batch:HungryTask"})
    assert train(settings, local_worker(settings), resume=False)
    assert {size for (size,) in rows_of(tmp_path, "micro_batch")} == {6}
    assert len(events(tmp_path, "plan_rejected")) == 1


class HungryTask:
    """Has no room for more than six samples, whether it is trained or evaluated."""

    def __init__(self) -> None:
        self.train_set, self.eval_set = blobs(), blobs(24, seed=7)

    def model(self) -> nn.Module:
        return mlp()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        _check_room(batch)
        return cross_entropy(model, batch)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        _check_room(batch)
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).double().mean()}


def _check_room(batch: Any) -> None:
    if len(batch[0]) > 6:
        raise torch.OutOfMemoryError("planted: out of memory")


@pytest.mark.parametrize(("peak", "fits"), [(90, True), (91, False)])
def test_a_tenth_of_what_was_free_is_left(monkeypatch: pytest.MonkeyPatch, peak: int, fits: bool) -> None:
    answers = {
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "mem_get_info": (60, 1000),  # the other 900 are another process's
        "memory_reserved": 40,
        "max_memory_allocated": peak,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    ran: list[bool] = []
    assert trials.CudaMemory(torch.device("cuda", 0)).suffices_for(lambda: ran.append(True)) is fits
    assert ran == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device_what_takes_more_than_there_is_does_not_fit() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory = trials.CudaMemory(device)
    free, _ = torch.cuda.mem_get_info(device)

    def take(size: float) -> None:
        torch.empty(int(size), dtype=torch.uint8, device=device)

    assert memory.suffices_for(lambda: take(0.5 * free))
    assert not memory.suffices_for(lambda: take(0.95 * free))
    with pytest.raises(torch.OutOfMemoryError):
        memory.suffices_for(lambda: take(4 * free))
