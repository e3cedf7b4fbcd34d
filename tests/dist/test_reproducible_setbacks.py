"""``train.reproducible`` where a step does not go as usual: nobody waits, and what is trained is the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp, run_fleet
from tests.unit.late_expert import LateExpert
from tests.unit.parts import optimizer_of
from tests.unit.small_runs import events, rows_of

pytestmark = pytest.mark.dist

STEPS, MICRO = 6, 6
State = dict[str, "np.ndarray[Any, Any]"]


def batch_norm() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": batch_norm,
    "late expert": LateExpert,  # whose parameters have no gradient at first
    "vr_adam": mlp,
    "clars": mlp,
    "scaler": mlp,  # one step overflows, and is passed over
    "memory": mlp,
    "memory in backward": mlp,
    "idle": mlp,
}


def trained(rank: int, path: str) -> dict[str, State]:
    return {case: one_case(rank, f"{path}/{case}", case) for case in MODELS}


def one_case(rank: int, path: str, case: str) -> State:
    batch = 2 * MICRO if case == "idle" else 5 * MICRO
    of_parts = {"name": case, "part_samples": MICRO, "momentum": None, "lr": 0.01}
    settings = config(
        path,
        train={"samples": STEPS * batch, "reproducible": True},
        batch={"initial": batch, "micro_batch": MICRO, "max": batch},
        optimizer=of_parts if case in ("vr_adam", "clars") else {},
    )
    torch.manual_seed(100 + rank)
    model: Any = MODELS[case]()
    optimizer: torch.optim.Optimizer
    if case in ("vr_adam", "clars"):
        optimizer = optimizer_of(settings, model.parameters())
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2) if case == "scaler" else None
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), grad_scaler=scaler) as session:
        for step in session:
            model.asks_expert = session.step_number >= 3
            for samples in step:

                def loss(samples: Any = samples) -> Tensor:
                    value = cross_entropy(session.model, samples)
                    if "memory" in case and session.step_number == 2 and len(samples[0]) > 3:
                        if case == "memory":
                            eat(value)
                        value.register_hook(eat)
                    return value * 1e38 if scaler is not None and session.step_number == 3 else value

                session.backward(loss)
            session.step()
    found = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    return found if scaler is None else {**found, "scale": np.array(scaler.get_scale())}


def eat(gradient: Tensor) -> None:
    raise torch.OutOfMemoryError("planted")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, State]]]]:
    folders = {workers: tmp_path_factory.mktemp(str(workers)) for workers in (1, 3)}
    return {workers: (folder, run_fleet(trained, workers, str(folder))) for workers, folder in folders.items()}


@pytest.mark.parametrize("case", MODELS)
def test_the_weights_are_the_same_bits(runs: dict[int, tuple[Path, list[dict[str, State]]]], case: str) -> None:
    expected = runs[1][1][0][case]
    for rank in runs[3][1]:
        assert {key: value.tobytes() for key, value in rank[case].items()} == {
            key: value.tobytes() for key, value in expected.items()
        }
    for folder, _ in runs.values():
        rejected = [event["micro_batch"] for event in events(folder / case, "plan_rejected")]
        assert rejected == ([3] if "memory" in case else [])
        assert len(rows_of(folder / case, "loss")) == STEPS


def test_steps_that_should_have_been_unusual_were(runs: dict[int, tuple[Path, list[dict[str, State]]]]) -> None:
    (alone,) = runs[1][1]
    fresh = batch_norm().state_dict()
    assert alone["batch norm"]["1.num_batches_tracked"] == STEPS
    assert (alone["batch norm"]["1.running_mean"] != fresh["1.running_mean"].numpy()).all()
    assert alone["scaler"]["scale"] == 2.0**15  # doubled after two steps, halved, doubled after two more
    unused, fresh = LateExpert().unused.state_dict(), LateExpert().expert.state_dict()
    assert (alone["late expert"]["expert.weight"] != fresh["weight"].numpy()).all()
    assert (alone["late expert"]["unused.weight"] == unused["weight"].numpy()).all()
