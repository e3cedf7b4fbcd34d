"""Where memory runs out the same samples come again, exactly once, in smaller pieces, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.runtime import ledger
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp
from tests.unit.broken_tasks import TaskCase, check_told_and_kept, model_of
from tests.unit.small_runs import STEPS, events, rows_of, trained


class Hungry(nn.Module):
    """Needs more memory than there is for more than ``most`` samples, in the forward or in the backward pass."""

    def __init__(self, model: nn.Module, *, most: int, in_backward: bool = False, really: bool = False) -> None:
        super().__init__()
        self.model, self.most, self.in_backward, self.really = model, most, in_backward, really

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.model(inputs)
        if self.training and len(inputs) > self.most:
            if self.in_backward:
                out.register_hook(lambda gradient: self._eat())
            else:
                self._eat()
        return out

    def _eat(self) -> None:
        if self.really:
            torch.empty(1 << 60, dtype=torch.uint8)
        raise torch.OutOfMemoryError("planted: out of memory")


def recovered(name: str, make: Callable[[], nn.Module], *told: str) -> TaskCase:
    return TaskCase(name, model_of(make), told, recovers=True, trained=STEPS, saved=STEPS)


MEMORY = [
    TaskCase(
        "one sample does not fit",
        model_of(lambda: Hungry(mlp(), most=0)),
        ("a micro-batch of one sample does not fit in memory", "smaller model or sample"),
    ),
    recovered("three samples fit", lambda: Hungry(mlp(), most=3), "at most 4", "at most 2"),
    recovered("the allocator refuses five samples", lambda: Hungry(mlp(), most=4, really=True), "at most 4"),
    recovered(
        "five samples do not fit in the backward pass", lambda: Hungry(mlp(), most=4, in_backward=True), "at most 4"
    ),
]


@pytest.mark.parametrize("case", MEMORY, ids=lambda case: case.name)
def test_a_task_that_needs_too_much_memory_is_told_and_what_was_trained_is_kept(tmp_path: Path, case: TaskCase) -> None:
    check_told_and_kept(tmp_path, case)


class Appetite:
    """The most samples that fit, which the test changes on the way."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most

    def model(self) -> nn.Module:
        return mlp()

    def check(self, samples: Any) -> None:
        if len(samples[0]) > self.most:
            raise torch.OutOfMemoryError("planted: out of memory")


def ramped(path: Path, **more: Any) -> RunConfig:
    control = {"policy": "schedule", "ramp": [[64, 32]], "every_samples": 64, "lag_steps": 3, "deadband": 1.0}
    batch = {"initial": 16, "micro_batch": 8, "max": 32}
    return config(path, train={"samples": 320}, batch=batch, controller=control, ledger=True, **more)


def run_with(
    settings: RunConfig, appetite: Appetite, *, hungry_from: int, most: int, resume: bool = False
) -> nn.Module:
    model = appetite.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def loss(samples: Any) -> Tensor:
        appetite.check(samples)
        return cross_entropy(model, samples)

    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), resume=resume) as session:
        for step in session:
            appetite.most = most if session.step_number >= hungry_from else 1000
            for samples in step:
                session.backward(lambda samples=samples: loss(samples))
            session.step()
    return model


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fed")
    run_with(ramped(path), Appetite(), hungry_from=1000, most=1000)
    assert {batch for (batch,) in rows_of(path, "global_batch")} == {16, 32}
    (growth,) = [e for e in events(path, "decision") if "effective_step" in e]
    assert (growth["step"], growth["effective_step"]) == (3, 7)
    return path


# Decided after step 3, announced in step 6, in effect from step 7 on.
@pytest.mark.parametrize(("hungry_from", "most"), [*((step, 4) for step in range(9)), (0, 1), (3, 1), (6, 1), (7, 3)])
def test_running_out_of_memory_changes_no_batch_and_no_decision_wherever_it_happens(
    tmp_path: Path, fed: Path, hungry_from: int, most: int
) -> None:
    run_with(ramped(tmp_path), Appetite(), hungry_from=hungry_from, most=most)
    keys = ("step", "samples_seen", "global_batch", "lr")
    assert rows_of(tmp_path, *keys) == rows_of(fed, *keys)
    sizes = [(8 if step < hungry_from else {4: 4, 3: 2, 1: 1}[most]) for (step,) in rows_of(fed, "step")]
    assert [size for (size,) in rows_of(tmp_path, "micro_batch")] == sizes
    assert ledger.verify(tmp_path / "run").violation is None
    decided = [
        [(e["step"], e["target_batch"], e["reason"]) for e in events(path, "decision")] for path in (tmp_path, fed)
    ]
    assert decided[0] == decided[1]
    rejected = events(tmp_path, "plan_rejected")
    assert [e["step"] for e in rejected] == [hungry_from] * {4: 1, 3: 2, 1: 3}[most]
    assert all("out of memory" in e["reason"] for e in rejected)


def test_a_smaller_micro_batch_after_memory_ran_out_trains_like_one_that_was_configured(tmp_path: Path) -> None:
    small = run_with(
        ramped(tmp_path / "small").model_copy(
            update={"batch": ramped(tmp_path).batch.model_copy(update={"micro_batch": 2})}
        ),
        Appetite(),
        hungry_from=1000,
        most=1000,
    )
    halved = run_with(ramped(tmp_path / "halved"), Appetite(), hungry_from=0, most=3)
    keys = ("step", "loss", "grad_sq", "trace_cov", "micro_batch")
    assert rows_of(tmp_path / "halved", *keys) == rows_of(tmp_path / "small", *keys)
    for a, b in zip(small.parameters(), halved.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_remembers_what_did_not_fit(tmp_path: Path) -> None:
    run_with(ramped(tmp_path), Appetite(), hungry_from=2, most=4)
    longer = ramped(tmp_path).model_copy(update={"train": ramped(tmp_path).train.model_copy(update={"samples": 640})})
    run_with(longer, Appetite(), hungry_from=0, most=4, resume=True)
    assert len(events(tmp_path, "plan_rejected")) == 1
    assert rows_of(tmp_path, "samples_seen", "micro_batch")[-1] == (640, 4)


def test_memory_that_runs_out_outside_of_backward_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        trained(tmp_path, model=Hungry(mlp(), most=4))
    assert "OutOfMemoryError: planted" in events(tmp_path, "fault")[0]["reason"]
