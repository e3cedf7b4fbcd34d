"""CLARS is LARS with the mean of the parts' norms for the norm of their mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.optim import CLARS, LARS
from tests.optimizers import GRADIENTS, WEIGHTS, layer, moved


def test_three_steps_by_hand() -> None:
    w = layer([[3.0, 4.0]])
    optimizer = CLARS([w], lr=2.0, momentum=0.5, trust=0.1, weight_decay=0.0)
    # |w| 5, the parts' norms 5 and 1: q = 0.1 * 5 / 3, g = (1.5, 2.5)
    step = moved(w, optimizer, [[1.5, 2.5]], [[[3.0, 4.0]], [[0.0, 1.0]]])
    torch.testing.assert_close(step, torch.tensor([[0.5, 5 / 6]], dtype=torch.float64))
    optimizer.param_groups[0].update(lr=1.0, weight_decay=0.5)
    before = w.detach().clone()
    size = float(before.norm())
    rate = 0.1 * size / (2.0 + 0.5 * size)
    expected = 0.5 * step + rate * (torch.tensor([[0.0, -2.0]]) + 0.5 * before)
    step = moved(w, optimizer, [[0.0, -2.0]], [[[0.0, -3.0]], [[0.0, -1.0]]])
    torch.testing.assert_close(step, expected)
    optimizer.param_groups[0]["lr"] = 0.0
    torch.testing.assert_close(moved(w, optimizer, [[1.0, 1.0]], [[[1.0, 1.0]]]), expected / 2)


def test_parts_that_cancel_leave_trust_finite_where_that_of_lars_is_without_bound() -> None:
    # A mean of 1e-9, as of parts +1 and -1 that nearly cancel: LARS moves by its whole share all the same.
    w, other = layer([[2.0]]), layer([[2.0]])
    step = moved(w, CLARS([w], lr=1.0, trust=0.01), [[1e-9]], [[[1.0 + 1e-9]], [[-1.0 + 1e-9]]])
    assert float(step) == pytest.approx(0.01 * 2.0 * 1e-9, rel=1e-6)
    assert float(moved(other, LARS([other], lr=1.0, trust=0.01), [[1e-9]])) == pytest.approx(0.01 * 2.0)
    assert float(moved(w, CLARS([w], lr=1.0, trust=0.01), [[0.0]], [[[1.0]], [[-1.0]]])) == 0.0


@pytest.mark.parametrize("shape", [(2, 3), (6,)])
def test_parts_that_agree_make_it_lars_to_the_last_bit(shape: tuple[int, ...]) -> None:
    settings = {"lr": 2.0, "momentum": 0.9, "trust": 0.02, "weight_decay": 0.1}
    w, other = layer(WEIGHTS.reshape(shape)), layer(WEIGHTS.reshape(shape))
    mine, theirs = CLARS([w], **settings), LARS([other], **settings)
    for gradient in GRADIENTS.reshape(4, *shape):
        moved(w, mine, gradient, [gradient] * 4)
        moved(other, theirs, gradient)
    assert torch.equal(w, other)


def test_a_step_without_momentum_is_never_longer_than_that_of_lars() -> None:
    draw = np.random.default_rng(3)
    for _ in range(50):
        parts = draw.normal(size=(5, 2, 3)) + draw.normal(size=(2, 3))
        w, other = layer(), layer()
        step = moved(w, CLARS([w], lr=1.0, momentum=0.0), parts.mean(0), parts)
        assert float(step.norm()) < float(moved(other, LARS([other], lr=1.0, momentum=0.0), parts.mean(0)).norm())
