"""What the meter reads of a step, against float64 autograd over the same micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.measure.meter import Reading
from orchestrator.measure.micro_batch import GradMeter

SIZES = (8, 8, 8, 3)
BATCH = sum(SIZES)


class Tokens(nn.Module):
    """An embedding, sparse on request, under a layer; one parameter is never used."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12, sparse=sparse)
        self.out = nn.Linear(12, 3)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embedding(tokens).mean(1))


def floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, *shape)


def tokens(size: int) -> Tensor:
    return torch.randint(50, (size, 6))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "small layers": (lambda: nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3)), floats(20)),
    "a layer of 200,000": (lambda: nn.Sequential(nn.Linear(400, 500), nn.Tanh(), nn.Linear(500, 3)), floats(400)),
    "rows too long and too short": (
        lambda: nn.Sequential(nn.Linear(17000, 2, bias=False), nn.Linear(2, 9000), nn.Tanh(), nn.Linear(9000, 3)),
        floats(17000),
    ),
    "convolutions, channels last": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 60, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(60, 3),
        ).to(memory_format=torch.channels_last),
        floats(3, 8, 8),
    ),
    "an embedding": (lambda: Tokens(sparse=False), tokens),
    "a sparse embedding": (lambda: Tokens(sparse=True), tokens),
}  # fmt: skip


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().mean()


def read(model: nn.Module, parts: list[Tensor], *, loss_scale: float = 1.0) -> Reading:
    """The parts as the micro-batches of one step, the way the session goes through them."""
    meter = GradMeter(model.parameters())
    meter.begin_step(measure=True)
    for inputs in parts:
        loss = loss_of(model, inputs)
        weight = loss_scale * len(inputs) / BATCH
        (loss * weight).backward()
        meter.end_micro_batch(size=len(inputs), loss=loss.detach(), loss_scale=weight)
    found = meter.read(grad_scale=loss_scale)
    meter.close()
    return found


def truth(model: nn.Module, parts: list[Tensor]) -> Reading:
    """The same from whole micro-gradients in float64."""
    exact = model.double()
    weighted, mean, losses = 0.0, [torch.zeros(()) for _ in exact.parameters()], []
    for inputs in parts:
        loss = loss_of(exact, inputs.double() if inputs.is_floating_point() else inputs)
        gradients = torch.autograd.grad(loss, [*exact.parameters()], allow_unused=True)
        dense = [torch.zeros(()) if g is None else g.to_dense() for g in gradients]
        weighted += len(inputs) * sum(float(g.square().sum()) for g in dense)
        mean = [m + g * (len(inputs) / BATCH) for m, g in zip(mean, dense, strict=True)]
        losses.append(float(loss.detach()))
    mean_sq = sum(float(m.square().sum()) for m in mean)
    return Reading(weighted_sq_sum=weighted, mean_grad_sq=mean_sq, losses=tuple(losses))


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("name", MODELS)
def test_the_sums_of_a_step_are_those_of_its_whole_micro_gradients(name: str, loss_scale: float) -> None:
    torch.manual_seed(0)
    build, draw = MODELS[name]
    model, parts = build(), [draw(size) for size in SIZES]
    found, exact = read(model, parts, loss_scale=loss_scale), truth(model, parts)
    assert found.weighted_sq_sum == pytest.approx(exact.weighted_sq_sum, rel=2e-5)
    assert found.mean_grad_sq == pytest.approx(exact.mean_grad_sq, rel=2e-5)
    assert found.losses == pytest.approx(exact.losses, rel=2e-5)


def test_a_million_equal_numbers_are_summed_to_1e_6() -> None:
    # One float32 sum over all of them is off by 1e-5.
    layer = nn.Linear(1000, 1000, bias=False)
    meter = GradMeter(layer.parameters())
    meter.begin_step(measure=False)
    layer.weight.grad = torch.full((1000, 1000), 0.1)
    assert meter.read().mean_grad_sq == pytest.approx(float(torch.tensor(0.1)) ** 2 * 1e6, rel=1e-6)


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    layer = nn.Linear(300, 300, bias=False, dtype=torch.bfloat16)
    meter = GradMeter(layer.parameters())
    meter.begin_step(measure=True)
    layer(torch.ones(4, 300, dtype=torch.bfloat16)).float().mean().backward()
    meter.end_micro_batch(size=4, loss=torch.zeros(()), loss_scale=1.0)
    gradient: Any = layer.weight.grad
    exact = float(gradient.double().square().sum())
    found = meter.read()
    assert (found.weighted_sq_sum, found.mean_grad_sq) == pytest.approx((4 * exact, exact), rel=1e-6)


def test_a_step_that_is_not_measured_still_reads_the_mean_gradient_and_the_losses() -> None:
    model = nn.Linear(4, 2)
    meter = GradMeter(model.parameters())
    for measure in (True, False):  # the hooks of a measured step must not stay
        model.zero_grad()
        meter.begin_step(measure=measure)
        loss = loss_of(model, torch.ones(3, 4))
        loss.backward()
        meter.end_micro_batch(size=3, loss=loss.detach(), loss_scale=1.0)
        found = meter.read()
        assert found.mean_grad_sq > 0
        assert found.losses == (pytest.approx(float(loss.detach())),)
        assert (found.weighted_sq_sum > 0) is measure


def test_a_norm_that_overflows_is_told_apart_from_a_gradient_that_is_not_finite() -> None:
    layer = nn.Linear(4, 2, bias=False)
    meter = GradMeter(layer.parameters())
    meter.begin_step(measure=True)
    layer.weight.grad = torch.full((2, 4), 1e38)
    assert math.isinf(meter.read().mean_grad_sq)
    assert meter.is_finite()
    layer.weight.grad[1, 2] = math.inf
    assert not meter.is_finite()


def test_a_step_without_a_micro_batch_or_a_gradient_reads_as_nothing() -> None:
    meter = GradMeter(nn.Linear(4, 2).parameters())
    meter.begin_step(measure=True)
    assert meter.read() == Reading(weighted_sq_sum=0.0, mean_grad_sq=0.0, losses=())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of the compiler itself
def test_a_compiled_model_reads_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))
    parts = [torch.randn(size, 20) for size in SIZES]
    compiled: Any = torch.compile(model, backend="aot_eager")  # as graphs as by default; no C++ compiler
    compiled(parts[0])  # compiled before there are hooks, as where only some steps are measured
    model.zero_grad()
    found = read(compiled, parts)
    model.zero_grad()
    plain = read(model, parts)
    assert found.weighted_sq_sum == pytest.approx(plain.weighted_sq_sum, rel=1e-5)
    assert found.mean_grad_sq == pytest.approx(plain.mean_grad_sq, rel=1e-5)
