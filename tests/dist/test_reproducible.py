"""``train.reproducible``: the weights are the same, to the last bit, on any layout of the same micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.session import Session
from tests.support import EAGER, blobs, config, cross_entropy, mlp, run_fleet
from tests.unit.small_runs import events, rows_of

pytestmark = pytest.mark.dist

STEPS, BATCH, MICRO = 12, 32, 4
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
State = dict[str, "np.ndarray[Any, Any]"]


class Jittered:
    """Points that are moved a little each time they are read."""

    def __init__(self) -> None:
        self.points = blobs()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.points[index]
        return inputs + 0.1 * torch.randn(inputs.shape), label


def model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(20, 33), nn.LayerNorm(33), nn.Tanh(), nn.Dropout(0.3), nn.Linear(33, 32), nn.Tanh(), nn.Linear(32, 4)
    )


def trained(rank: int, path: str, reproducible: bool, steps: int, resume: bool) -> dict[str, State]:
    """With each optimizer from the same weights: model and optimizer after ``steps`` steps of all."""
    found: dict[str, State] = {}
    for name, make in OPTIMIZERS.items():
        settings = config(
            f"{path}/{name}",
            train={"samples": steps * BATCH, "reproducible": reproducible, "max_grad_norm": 0.5},
            batch={"initial": BATCH, "micro_batch": MICRO, "max": BATCH},
            controller={"mode": "advise", "policy": "noise_scale"},
            data={"seed_each_sample": True},
        )
        torch.manual_seed(100 + rank)  # what a rank draws by itself must not matter
        net = model()
        optimizer = make(net.parameters())
        with Session(settings, model=net, optimizer=optimizer, dataset=Jittered(), resume=resume) as session:
            for step in session:
                for batch in step:
                    session.backward(cross_entropy(session.model, batch))
                session.step()
        state = dict(net.state_dict())
        for parameter, kept in optimizer.state.items():
            at = next(key for key, p in net.named_parameters() if p is parameter)
            state |= {f"{at}.{key}": value for key, value in kept.items() if isinstance(value, Tensor)}
        found[name] = {key: value.numpy().copy() for key, value in state.items()}
    return found


def apart(one: State, other: State) -> list[str]:
    """What differs in any bit."""
    assert one.keys() == other.keys()
    return [key for key in one if one[key].tobytes() != other[key].tobytes()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    (found,) = run_fleet(trained, 1, str(tmp_path_factory.mktemp("alone")), True, STEPS, False)
    assert any(key.endswith("momentum_buffer") for key in found["sgd"])
    assert any(key.endswith("exp_avg_sq") for key in found["adam"])
    return dict(found)


@pytest.mark.parametrize("workers", [2, 4, 8, 3])
def test_weights_and_optimizer_are_the_same_bits_on_any_layout(
    tmp_path: Path, alone: dict[str, State], workers: int
) -> None:
    fleet = run_fleet(trained, workers, str(tmp_path), True, STEPS, False)
    assert rows_of(tmp_path / "adam", "world_size", "accum_steps") == [(workers, -(-8 // workers))] * STEPS
    for rank in fleet:
        for name in OPTIMIZERS:
            assert apart(rank[name], alone[name]) == [], name


def test_so_they_are_after_a_run_that_changes_among_layouts(tmp_path: Path, alone: dict[str, State]) -> None:
    for workers, steps in ((2, 3), (4, 7), (1, STEPS)):
        fleet = run_fleet(trained, workers, str(tmp_path), True, steps, steps > 3)
    for name in OPTIMIZERS:
        assert [event["step"] for event in events(tmp_path / name, "resumed")] == [3, 7]
        assert apart(fleet[0][name], alone[name]) == [], name


def grown(rank: int, path: str, estimator: str) -> State:
    """A batch that follows the measured noise, and a learning rate that is computed from it."""
    settings = config(
        path,
        train={"samples": 3000, "reproducible": True},
        batch={"initial": 12, "micro_batch": MICRO, "max": 96},
        controller=EAGER,
        lr_rule={"name": "noise_scale", "ramp_samples": 200},
        measure={"estimator": estimator},
    )
    net = mlp()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    with Session(settings, model=net, optimizer=optimizer, dataset=blobs(seed=3)) as session:
        for step in session:
            for batch in step:
                session.backward(cross_entropy(session.model, batch))
            session.step()
    return {key: value.numpy().copy() for key, value in net.state_dict().items()}


@pytest.mark.parametrize("estimator", ["micro_batch", "per_example"])
def test_batch_and_learning_rate_follow_the_noise_to_the_same_bits(tmp_path: Path, estimator: str) -> None:
    (one,) = run_fleet(grown, 1, str(tmp_path / "1"), estimator)
    three = run_fleet(grown, 3, str(tmp_path / "3"), estimator)
    keys = ("step", "loss", "lr", "global_batch", "grad_sq", "trace_cov", "noise_scale", "noise_low", "noise_high")
    rows = rows_of(tmp_path / "1", *keys)
    assert rows == rows_of(tmp_path / "3", *keys)
    assert len({batch for _, _, _, batch, *_ in rows}) > 2
    assert apart(three[1], one) == []


def test_without_it_they_differ_by_rounding(tmp_path: Path) -> None:
    (one,) = run_fleet(trained, 1, str(tmp_path / "1"), False, STEPS, False)
    two = run_fleet(trained, 2, str(tmp_path / "2"), False, STEPS, False)
    for name in OPTIMIZERS:
        assert apart(one[name], two[0][name])
        for key, value in one[name].items():
            assert two[0][name][key] == pytest.approx(value, rel=1e-3, abs=1e-5)
