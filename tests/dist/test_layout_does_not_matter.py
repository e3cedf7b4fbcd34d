"""Promise 1: the trajectory depends on the micro-batch list and the learning rate, not on who computed what."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.session import Session
from tests.dist.test_reproducible import Jittered, model as dropping
from tests.support import blobs, config, cross_entropy, mlp, run_fleet

STEPS = 20


def train(rank: int, folder: str, micro_batch: int, batch: int, estimator: str) -> None:
    settings = config(
        folder,
        train={"samples": STEPS * batch},
        batch={"initial": batch, "micro_batch": micro_batch, "max": batch},
        measure={"estimator": estimator},
        controller={"mode": "advise", "policy": "noise_scale"},
    )
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.dist
@pytest.mark.parametrize("estimator", ["micro_batch", "per_example", "split"])
def test_equal_lists_give_equal_losses_and_moments_on_any_layout(tmp_path: Path, estimator: str) -> None:
    layouts = {1: [4], 2: [2, 2], 4: [1, 1, 1, 1], 3: [2, 1, 1]}
    found = {}
    for world_size in layouts:
        folder = tmp_path / str(world_size)
        run_fleet(train, world_size, str(folder), 16 if estimator == "split" else 8, 32, estimator)
        found[world_size] = history(folder)
    for world_size, runs in layouts.items():
        assert [row["accum_steps"] for row in found[world_size]] == [max(runs)] * STEPS
    alone = found.pop(1)
    worst = {"loss": 0.0, "grad_sq": 0.0, "trace_cov": 0.0}
    for rows in found.values():
        for mine, theirs in zip(rows, alone, strict=True):
            # The moments are differences of sums of this size; float32 rounds each sum to 6e-8 of it.
            scale = {"loss": abs(theirs["loss"])}
            scale["grad_sq"] = scale["trace_cov"] = abs(theirs["grad_sq"]) + abs(theirs["trace_cov"])
            for name in worst:
                worst[name] = max(worst[name], abs(mine[name] - theirs[name]) / scale[name])
    print(f"largest relative difference between layouts over {STEPS} steps: {worst}")
    assert max(worst.values()) < 2e-5


def train_drawing(rank: int, folder: str, seed_each_sample: bool) -> None:
    """With dropout, on samples that are moved at random where they are read."""
    settings = config(
        folder,
        train={"samples": STEPS * 32},
        batch={"initial": 32, "micro_batch": 8, "max": 32},
        data={"seed_each_sample": seed_each_sample},
    )
    torch.manual_seed(100 + rank)
    model = dropping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Session(settings, model=model, optimizer=optimizer, dataset=Jittered()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()


@pytest.mark.dist
def test_dropout_and_augmentation_are_drawn_by_the_samples_position_on_any_layout(tmp_path: Path) -> None:
    losses = {}
    for world_size, seeded in ((1, True), (3, True), (3, False)):
        folder = tmp_path / f"{world_size} {seeded}"
        run_fleet(train_drawing, world_size, str(folder), seeded)
        losses[world_size, seeded] = np.array([row["loss"] for row in history(folder)])
    alone = losses.pop((1, True))
    assert np.abs(losses.pop((3, False)) / alone - 1).max() > 1e-3  # what is drawn does matter
    assert np.abs(losses[3, True] / alone - 1).max() < 2e-5


@pytest.mark.dist
def test_gradients_of_samples_read_the_same_however_the_samples_are_cut(tmp_path: Path) -> None:
    found = {}
    for world_size, micro in ((1, 30), (1, 8), (2, 7), (4, 10)):
        folder = tmp_path / f"{world_size}-{micro}"
        run_fleet(frozen, world_size, str(folder), micro, "per_example")
        found[world_size, micro] = np.array([[row["grad_sq"], row["trace_cov"]] for row in history(folder)])
    whole = found[1, 30]
    for key, values in found.items():
        assert np.abs(values - whole).max() < 2e-5 * np.abs(whole).sum(axis=1).max(), key


@pytest.mark.dist
def test_the_same_samples_cut_differently_have_moments_of_the_same_expectation(tmp_path: Path) -> None:
    # At one point of weight space (learning rate ~ 0), so that only the cut differs: 30 = 8+8+8+6, 7+7+7+7+2, 15+15.
    readings = {}
    for world_size, micro in ((1, 8), (2, 7), (3, 15), (4, 8)):
        folder = tmp_path / f"{world_size}-{micro}"
        run_fleet(frozen, world_size, str(folder), micro, "micro_batch")
        rows = history(folder)
        readings[world_size, micro] = np.array([[row["grad_sq"], row["trace_cov"]] for row in rows])
    reference = readings[1, 8]
    for key, values in readings.items():
        # Paired over steps: the same samples each step. Four standard errors: one false alarm in 15,000.
        difference = values - reference
        error = difference.std(axis=0, ddof=1) / np.sqrt(len(difference)) + 1e-6 * np.abs(reference).mean(axis=0)
        assert (np.abs(difference.mean(axis=0)) < 4 * error).all(), key


def frozen(rank: int, folder: str, micro_batch: int, estimator: str) -> None:
    settings = config(
        folder,
        train={"samples": 30 * 150},
        batch={"initial": 30, "micro_batch": micro_batch, "max": 30},
        optimizer={"lr": 1e-12, "momentum": 0.0},
        measure={"estimator": estimator},
        controller={"mode": "advise", "policy": "noise_scale"},
    )
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
