"""A rank that takes no micro-batch, or whose loss is odd, changes nothing that it should not, and holds nobody up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from orchestrator.runtime import folder
from orchestrator.session import Session
from tests.support import blobs, config, mlp, run_fleet

pytestmark = pytest.mark.dist

STEPS = 5


class PartlyUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.used, self.unused = nn.Linear(20, 4), nn.Linear(20, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


class PartlyTrained(PartlyUnused):
    """Both layers take part and want gradients; the test's optimizer knows one of them."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs) + self.unused(inputs)


def bag_of_words() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Embedding(30, 8, sparse=True), nn.Flatten(), nn.Linear(40, 4))


def words() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randint(30, (64, 5), generator=generator), torch.randint(4, (64,), generator=generator))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "partly unused": PartlyUnused,
    "partly trained": PartlyTrained,
    "sparse embedding": bag_of_words,
}


def train(rank: int, path: str, name: str, micro_batch: int, options: dict[str, Any]) -> list[list[float]]:
    settings = config(
        path,
        train={"samples": STEPS * 8, "find_unused_parameters": name == "partly unused"},
        batch={"initial": 8, "micro_batch": micro_batch, "max": 8},
        evaluation={"every_samples": None},
    )
    model = MODELS[name]()
    trained = model.used.parameters() if name == "partly trained" else model.parameters()
    optimizer: torch.optim.Optimizer
    if name == "partly unused":
        optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.5)
    else:
        optimizer = torch.optim.SGD(trained, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if options.get("amp") else None
    data = words() if name == "sparse embedding" else blobs()
    fails_at = options.get("out_of_memory_at")
    with Session(settings, model=model, optimizer=optimizer, dataset=data, grad_scaler=scaler) as session:
        for step in session:
            for inputs, labels in step:

                def loss(inputs: Any = inputs, labels: Any = labels) -> Tensor:
                    outputs = session.model(inputs)
                    if session.step_number == fails_at and len(inputs) > 4:
                        raise torch.OutOfMemoryError("planted")
                    targets = torch.full_like(labels, -100) if options.get("no_target") else labels
                    return nn.functional.cross_entropy(outputs, targets)

                session.backward(loss)
            session.step()
            if session.evaluation_due:
                session.record_evaluation({"done": float(session.step_number)})
            if session.step_number == options.get("raises_after"):
                raise ValueError("the loop has an error")
    return [p.detach().flatten().tolist() for p in model.parameters()]


def told(rank: int, *args: Any) -> str:
    try:
        train(rank, *args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name", MODELS)
def test_a_fleet_with_an_idle_rank_trains_as_one_process_does(tmp_path: Path, name: str) -> None:
    alone = run_fleet(train, 1, str(tmp_path / "alone"), name, 8, {})[0]
    fleet = run_fleet(train, 2, str(tmp_path / "fleet"), name, 8, {})
    assert fleet[0] == fleet[1]
    for mine, theirs in zip(fleet[0], alone, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_an_idle_rank_has_a_gradient_scaler_too(tmp_path: Path) -> None:
    plain = run_fleet(train, 2, str(tmp_path / "plain"), "mlp", 8, {})
    scaled = run_fleet(train, 2, str(tmp_path / "scaled"), "mlp", 8, {"amp": True})
    assert scaled[0] == scaled[1]
    for mine, theirs in zip(scaled[0], plain[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_that_the_optimizer_does_not_know_survive_a_step_without_memory(
    tmp_path: Path, world_size: int
) -> None:
    options = {"out_of_memory_at": 2}
    fleet = run_fleet(train, world_size, str(tmp_path / "fleet"), "partly trained", 8, options)
    alone = run_fleet(train, 1, str(tmp_path / "alone"), "partly trained", 4, {})
    for mine, theirs in zip(fleet[0], alone[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_an_evaluation_is_written_once_though_the_step_after_it_begins_again(tmp_path: Path) -> None:
    def evaluated(name: str, options: dict[str, Any]) -> list[int]:
        run_fleet(train, 1, str(tmp_path / name), "mlp", 8, options)
        return [row["step"] for row in folder.rows(tmp_path / name / "run" / folder.EVALS)]

    assert evaluated("again", {"out_of_memory_at": 2}) == evaluated("sound", {}) == [STEPS - 1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_without_a_target_ends_all_ranks_though_its_gradient_is_zero(tmp_path: Path, world_size: int) -> None:
    found = run_fleet(told, world_size, str(tmp_path), "mlp", 4, {"no_target": True})
    assert len(set(found)) == 1
    assert found[0].startswith("NonFiniteError: step ")
    assert "every target of a micro-batch at ignore_index" in found[0]
    rows = list(folder.rows(tmp_path / "run" / folder.METRICS))
    assert all(row["loss"] is None and row["trace_cov"] is None for row in rows)


def test_the_last_steps_before_an_error_leave_their_lines(tmp_path: Path) -> None:
    found = run_fleet(told, 2, str(tmp_path), "mlp", 4, {"raises_after": 4})
    assert found == ["ValueError: the loop has an error"] * 2
    rows = list(folder.rows(tmp_path / "run" / folder.METRICS))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
