"""LARS, LAMB and LANS do what their papers' formulas say, which are written out here once more in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.optim import LAMB, LANS, LARS
from orchestrator.runtime import folder
from orchestrator.runtime.worker import local_worker
from orchestrator.train import train
from tests.optimizers import GRADIENTS, WEIGHTS, Array, layer, make, moved
from tests.support import config

LRS = (0.1, 0.02, 0.3, 0.05)  # another at every step, as a schedule and a growing batch make it


def lars(w: Array, gradients: Array, *, adapt: bool, m: float = 0.9, trust: float = 0.02, decay: float = 0.1) -> Array:
    v = np.zeros_like(w)
    for lr, g in zip(LRS, gradients, strict=True):
        if adapt:
            q = trust * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
            v = m * v + lr * q * (g + decay * w)
        else:
            v = m * v + lr * g
        w = w - v
    return w


def lamb(w: Array, gradients: Array, *, adapt: bool, decay: float = 0.1, eps: float = 1e-3) -> Array:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (lr, g) in enumerate(zip(LRS, gradients, strict=True), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        r = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + eps)
        if adapt:
            u = r + decay * w
            r = u * np.linalg.norm(w) / np.linalg.norm(u)
        w = w - lr * r
    return w


def lans(w: Array, gradients: Array, *, adapt: bool, decay: float = 0.1, eps: float = 1e-3) -> Array:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (lr, g) in enumerate(zip(LRS, gradients, strict=True), start=1):
        n = g / np.linalg.norm(g)
        m, v = 0.8 * m + 0.2 * n, 0.95 * v + 0.05 * n**2
        root = np.sqrt(v / (1 - 0.95**t)) + eps
        r, c = (m / (1 - 0.8**t)) / root, n / root
        if adapt:
            r, c = r + decay * w, c + decay * w
            r = r * np.linalg.norm(w) / np.linalg.norm(r)
            c = c * np.linalg.norm(w) / np.linalg.norm(c)
        w = w - lr * (0.8 * r + 0.2 * c)
    return w


ORACLES: dict[str, Callable[..., Array]] = {"lars": lars, "lamb": lamb, "lans": lans}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(("flat", "asked"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_four_steps_are_the_papers_formula(name: str, flat: bool, asked: bool, as_tensor: bool) -> None:
    start = WEIGHTS.ravel() if flat else WEIGHTS
    gradients = GRADIENTS.reshape(4, *start.shape)
    w = layer(start)
    rate = torch.tensor(1.0, dtype=torch.float64) if as_tensor else 1.0
    optimizer = make(name, [w], lr=rate, adapt_one_dimensional=asked)
    for lr, gradient in zip(LRS, gradients, strict=True):
        if as_tensor:
            optimizer.param_groups[0]["lr"].fill_(lr)
        else:
            optimizer.param_groups[0]["lr"] = lr
        moved(w, optimizer, gradient)
    expected = ORACLES[name](start, gradients, adapt=asked or not flat)
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_moves_a_layer_by_lr_times_its_norm_at_every_step(decay: float) -> None:
    w = layer()
    optimizer = LAMB([w], lr=0.03, weight_decay=decay)
    for gradient in GRADIENTS:
        size = float(w.detach().norm())
        assert float(moved(w, optimizer, gradient).norm()) == pytest.approx(0.03 * size, rel=1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lans_moves_a_layer_by_at_most_lr_times_its_norm_and_by_that_at_first(decay: float) -> None:
    w = layer()
    optimizer = LANS([w], lr=0.03, weight_decay=decay)
    shares = []
    for gradient in GRADIENTS:
        size = float(w.detach().norm())
        shares.append(float(moved(w, optimizer, gradient).norm()) / (0.03 * size))
    assert shares[0] == pytest.approx(1, rel=1e-13)
    assert all(share < 0.9999 for share in shares[1:])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_first_step_without_decay_is_the_trusted_share_of_the_norm(momentum: float) -> None:
    w = layer()
    step = moved(w, LARS([w], lr=2.0, momentum=momentum, trust=0.001), GRADIENTS[0])
    assert float(step.norm()) == pytest.approx(2.0 * 0.001 * np.linalg.norm(WEIGHTS), rel=1e-13)


def test_lars_goes_on_at_the_rate_at_which_its_momentum_was_gathered() -> None:
    w = layer()
    optimizer = LARS([w], lr=2.0, momentum=0.5)
    first = moved(w, optimizer, GRADIENTS[0])
    optimizer.param_groups[0]["lr"] = 0.0
    torch.testing.assert_close(moved(w, optimizer, GRADIENTS[1]), first / 2)


def test_two_epochs_of_digits_with_lamb_lower_the_loss(tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        task={"name": "digits", "options": {"width": 8, "augment": False}},
        train={"epochs": 2, "samples": None},
        optimizer={"name": "lamb", "lr": 0.02, "momentum": None},
    )
    assert train(settings, local_worker(settings), resume=False)
    losses = [row["loss"] for row in folder.surviving(tmp_path / "run" / folder.METRICS)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
