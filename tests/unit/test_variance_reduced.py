"""VR-SGD, VR-Adam and VR-LAMB against the formula of their paper, written out in numpy over explicit parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from orchestrator.optim import LAMB, VRLAMB, VRSGD, VRAdam
from orchestrator.optim.variance import belief, signal_to_noise
from tests.optimizers import WEIGHTS, Array, layer, make, moved

NAMES = ("vr_sgd", "vr_adam", "vr_lamb")
LRS = (0.1, 0.02, 0.3, 0.05)
PARTS = np.random.default_rng(5).normal(size=(4, 6, 2, 3)) + np.random.default_rng(6).normal(size=(4, 1, 2, 3))


def believed(parts: Array, floor: float = 0.1) -> Array:
    """r from parts [k, ...] of equal size."""
    mean = parts.mean(0)
    ratio = mean**2 / ((parts - mean) ** 2).mean(0)
    return np.clip(ratio / ratio.mean(), floor, 1)


def by_numpy(name: str, w: Array, steps: Array) -> Array:
    p, m, v = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t, (lr, parts) in enumerate(zip(LRS, steps, strict=True), start=1):
        g, r = parts.mean(0), believed(parts)
        if name == "vr_sgd":
            m = 0.9 * m + r * g + 0.1 * w
            w = w - lr * m
            continue
        p = 0.7 * p + 0.3 * r
        h = p / (1 - 0.7**t) * g
        m, v = 0.8 * m + 0.2 * h, 0.95 * v + 0.05 * h**2
        u = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        if name == "vr_adam":
            w = w - lr * u - lr * 0.1 * w
        elif w.ndim > 1:
            u = u + 0.1 * w
            w = w - lr * np.linalg.norm(w) / np.linalg.norm(u) * u
        else:
            w = w - lr * u
    return w


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flat", [False, True])
def test_four_steps_are_the_papers_formula_over_explicit_parts(name: str, flat: bool) -> None:
    shape = (6,) if flat else (2, 3)
    w = layer(WEIGHTS.reshape(shape))
    optimizer = make(name, [w])
    steps = PARTS.reshape(4, 6, *shape)
    for lr, parts in zip(LRS, steps, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        moved(w, optimizer, parts.mean(0), parts)
    np.testing.assert_allclose(w.detach().numpy(), by_numpy(name, WEIGHTS.reshape(shape), steps), rtol=1e-11)


def test_a_step_by_hand() -> None:
    # Two parts, 1 -+ s around a mean of 1: g^2 / variance is 1 / s^2, here 0.1, 1 and 1.9 times a mean of 1.
    ratios = np.array([0.1, 1.0, 1.9])
    spread = 1 / np.sqrt(ratios)
    parts = np.stack([1 - spread, 1 + spread])
    w = layer([5.0, 5.0, 5.0])
    step = moved(w, VRSGD([w], lr=2.0), np.ones(3), parts)
    torch.testing.assert_close(step, torch.tensor([0.2, 2.0, 2.0], dtype=torch.float64))
    w = layer([5.0, 5.0, 5.0])
    step = moved(w, VRSGD([w], lr=2.0, ratio_floor=0.5), np.ones(3), parts)
    torch.testing.assert_close(step, torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64))


def test_the_average_of_r_is_of_all_steps_and_its_first_is_r_itself() -> None:
    w = layer([[1.0, 1.0]])
    optimizer = VRAdam([w], lr=1.0, betas=(0.0, 0.0), ratio_beta=0.5)
    apart, alike = [[[2.0, 1.0]], [[0.0, 1.0]]], [[[1.0, 1.0]], [[1.0, 1.0]]]
    means = []
    for parts in (apart, alike):  # r is (0.1, 1), for the second element has no variance; then (1, 1)
        moved(w, optimizer, [[1.0, 1.0]], parts)
        means.append(optimizer.state[w]["exp_avg"].squeeze().tolist())  # h, where betas are 0
    assert means[0] == pytest.approx([0.1, 1.0])
    assert means[1] == pytest.approx([(0.25 * 0.1 + 0.5 * 1) / 0.75, 1.0])


@pytest.mark.parametrize(
    ("make_it", "plain"),
    [
        (lambda w: VRSGD(w, lr=0.1, momentum=0.9, weight_decay=0.1), torch.optim.SGD),
        (lambda w: VRAdam(w, lr=0.1, weight_decay=0.1), torch.optim.AdamW),
        (lambda w: VRLAMB(w, lr=0.1, weight_decay=0.1), LAMB),
    ],
    ids=NAMES,
)
@pytest.mark.parametrize("parts", [1, 4])
def test_one_part_or_parts_that_agree_make_it_the_plain_optimizer(
    make_it: Callable[[Any], torch.optim.Optimizer], plain: Callable[..., torch.optim.Optimizer], parts: int
) -> None:
    w, other = layer(), layer()
    mine = make_it([w])
    shared = {"lr", "momentum", "betas", "eps", "weight_decay"}
    theirs = plain([other], **{key: value for key, value in mine.defaults.items() if key in shared})
    for step in PARTS:
        moved(w, mine, step[0], [step[0]] * parts)
        moved(other, theirs, step[0])
    torch.testing.assert_close(w, other, rtol=1e-12, atol=0)


def test_elements_without_a_gradient_or_without_noise_are_numbers() -> None:
    parts = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, -1.0, 1.0, 3.0]], dtype=torch.float64)
    mean, mean_square = parts.mean(0), parts.square().mean(0)
    ratio = signal_to_noise(mean, mean_square)
    assert ratio.isfinite().all()
    assert ratio[[0, 1, 3]].tolist() == [0, 0, 4]  # nothing at all; no signal; 2^2 / 1
    assert ratio[2] > 1e13  # no noise that float64 could tell
    # The third stands out so far that the fourth falls to the floor; the first is no part of it.
    assert belief(mean, mean_square, floor=0.1).tolist() == pytest.approx([1, 0.1, 1, 0.1])
    # An element that is zero in every part is no part of the layer's mean: 0.5 and 1.5 have a mean of 1.
    mean, variance = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), torch.tensor([0.0, 2.0, 2 / 3])
    assert belief(mean, mean**2 + variance, floor=0.1).tolist() == pytest.approx([1, 0.5, 1])
    nothing = torch.zeros(3, dtype=torch.float64)
    assert belief(nothing, nothing, floor=0.1).tolist() == [1, 1, 1]
    assert belief(nothing, nothing + 1, floor=0.1).tolist() == pytest.approx([0.1] * 3)


def test_rounding_is_not_taken_for_agreement() -> None:
    # In float32 the mean square of parts that agree differs from the square of their mean by an epsilon or so.
    gradient = torch.linspace(0.1, 3, 1000)
    noisy = gradient.double().square() * (1 + torch.linspace(-4, 4, 1000, dtype=torch.float64) * 2**-23)
    assert (belief(gradient, noisy, floor=0.1) > 1 - 1e-5).all()


@given(parts=st.lists(st.lists(st.floats(-1e30, 1e30), min_size=3, max_size=3), min_size=1, max_size=5))
def test_r_lies_between_its_floor_and_one_whatever_the_parts(parts: list[list[float]]) -> None:
    gradients = torch.tensor(parts, dtype=torch.float32)
    r = belief(gradients.mean(0), gradients.double().square().mean(0), floor=0.1)
    assert ((r >= 0.1 * (1 - 1e-6)) & (r <= 1)).all()


@pytest.mark.parametrize("parts", [8, 16])
def test_without_a_signal_the_expected_ratio_is_one_over_the_parts_less_three(parts: int) -> None:
    noise = torch.randn(parts, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratio = signal_to_noise(noise.mean(0), noise.square().mean(0))
    # Five standard errors, estimated from the same draws: one false alarm in a million seeds.
    assert float(ratio.mean()) == pytest.approx(1 / (parts - 3), abs=5 * float(ratio.std()) / 200_000**0.5)
