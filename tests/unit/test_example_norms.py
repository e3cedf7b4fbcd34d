"""Norms of single samples' gradients, layer by layer, against one backward pass a sample in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from orchestrator.measure.layers import RULES
from orchestrator.measure.per_example import PerExampleMeter
from tests.unit.examples import one_by_one, read

EXACT = 1e-9  # float64 against float64; the promise is 1e-5
whole = st.integers


def squares(model: nn.Module, inputs: Tensor) -> Tensor:
    """A mean over the samples; no output's gradient is like another's."""
    out = model(inputs).flatten(1)
    return (out.tanh() * torch.linspace(0.5, 2, out.shape[1], dtype=out.dtype)).square().sum(1).mean()


def holds(model: nn.Module, inputs: Tensor, loss: Callable[[nn.Module, Tensor], Tensor] = squares) -> None:
    model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    meter = PerExampleMeter(model, model.parameters())
    truth = one_by_one(model, inputs, loss)
    cut = [part for part in inputs.split(2) if len(part)]
    # The first time the layers' sums are compared with the gradients too, which takes other ways through the formulas.
    for parts in ([inputs], [inputs], cut):
        assert read(meter, model, parts, loss).weighted_sq_sum == pytest.approx(truth, rel=EXACT)


@settings(max_examples=15, deadline=None)
@given(
    seed=whole(0, 99), n=whole(1, 4), middle=st.lists(whole(1, 5), max_size=2),
    features=st.tuples(whole(1, 9), whole(1, 9)), bias=st.booleans(),
)  # fmt: skip
def test_linear(seed: int, n: int, middle: list[int], features: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(seed)
    holds(nn.Linear(*features, bias=bias), torch.randn(n, *middle, features[0]))


@pytest.mark.parametrize("sizes", [(6, 40, 30), (40, 6, 5), (1, 6, 5)], ids=["pairs cost less", "formed", "one"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_either_way_of_summing_over_positions(sizes: tuple[int, int, int], bias: bool) -> None:
    positions, features, out = sizes
    torch.manual_seed(0)
    holds(nn.Linear(features, out, bias=bias), torch.randn(5, positions, features))


@st.composite
def convolutions(draw: Any, dims: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(whole(0, 99)))
    groups = draw(st.sampled_from([1, 2, 3]))
    kernel = tuple(draw(whole(1, 3)) for _ in range(dims))
    padding = draw(st.sampled_from(["same", "valid"]) | st.tuples(*[whole(0, 2)] * dims))
    stride = (1,) * dims if padding == "same" else tuple(draw(whole(1, 3)) for _ in range(dims))
    module = (nn.Conv1d, nn.Conv2d)[dims - 1](
        groups * draw(whole(1, 2)),
        groups * draw(whole(1, 2)),
        kernel,  # type: ignore[arg-type]  # one number a dimension
        stride=stride,  # type: ignore[arg-type]
        padding=padding,
        dilation=tuple(draw(whole(1, 2)) for _ in range(dims)),  # type: ignore[arg-type]
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    )
    return module, torch.randn(draw(whole(1, 3)), module.in_channels, *[draw(whole(6, 8)) for _ in range(dims)])


@settings(max_examples=25, deadline=None)
@given(convolutions(1))
# PyTorch says at an even kernel that it pads a copy.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution_of_signals(drawn: tuple[nn.Module, Tensor]) -> None:
    holds(*drawn)


@settings(max_examples=25, deadline=None)
@given(convolutions(2))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution_of_images(drawn: tuple[nn.Module, Tensor]) -> None:
    holds(*drawn)


@settings(max_examples=15, deadline=None)
@given(seed=whole(0, 99), n=whole(1, 4), t=whole(1, 6), padding=st.none() | whole(0, 4))
def test_embedding(seed: int, n: int, t: int, padding: int | None) -> None:
    torch.manual_seed(seed)
    module = nn.Embedding(5, 3, padding_idx=padding)
    nn.init.normal_(module.weight)  # the padding's row too: at zero, no gradient would arrive there
    holds(module, torch.randint(5, (n, t)))  # ids come twice in a sample


@settings(max_examples=15, deadline=None)
@given(
    seed=whole(0, 99), shape=st.lists(whole(1, 4), min_size=1, max_size=3), own=whole(1, 3), affine=st.booleans(),
    kind=st.sampled_from([nn.LayerNorm, nn.RMSNorm]),
)  # fmt: skip
def test_layer_and_rms_norm(seed: int, shape: list[int], own: int, affine: bool, kind: type[nn.Module]) -> None:
    torch.manual_seed(seed)
    normalised = shape[-own:]
    norm: nn.Module = kind(normalised)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if affine and kind is nn.LayerNorm:
        norm = nn.LayerNorm(normalised, bias=False)
    holds(norm, torch.randn(3, *shape))


@settings(max_examples=15, deadline=None)
@given(seed=whole(0, 99), groups=whole(1, 3), space=st.lists(whole(1, 4), max_size=2))
def test_group_norm(seed: int, groups: int, space: list[int]) -> None:
    torch.manual_seed(seed)
    norm = nn.GroupNorm(groups, 6 if groups != 3 else 9)
    nn.init.normal_(norm.weight)
    holds(norm, torch.randn(3, norm.num_channels, *(space or [2])))


class Tied(nn.Module):
    """An embedding tied to the output layer, layers that are called twice, and a weight of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6, padding_idx=0)
        self.again = nn.Linear(6, 6)
        self.same = self.again  # one module by two names
        self.conv, self.twin = nn.Conv1d(6, 6, 3, padding=1, groups=2), nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.twin.weight = self.conv.weight
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.again(self.table(tokens)).tanh())
        x = self.norm(self.again(x))
        x = self.twin(self.conv(x.mT).tanh()).mT
        return self.head(x + self.table(tokens.flip(1) % 3))


def test_parameters_that_are_used_several_times_have_their_cross_terms() -> None:
    torch.manual_seed(3)
    holds(Tied(), torch.randint(7, (5, 4)))


class Crossed(nn.Module):
    """One weight in a linear layer and in a convolution of another shape of grouping, or in a bias and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.LayerNorm(4)
        self.other.weight = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


def test_a_parameter_shared_by_layers_of_different_kinds() -> None:
    torch.manual_seed(3)
    holds(Crossed(), torch.randn(4, 3, 4))


def test_frozen_parameters_and_layers_without_samples_gradients_count_nothing() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[3].requires_grad_(False)
    model.double()
    trained, inputs = [p for p in model.parameters() if p.requires_grad], torch.randn(4, 4).double()
    meter = PerExampleMeter(model, trained)
    truth = one_by_one(model, inputs, squares, of=trained)
    assert read(meter, model, [inputs], squares).weighted_sq_sum == pytest.approx(truth, rel=EXACT)
    assert read(meter, model, [inputs], squares).weighted_sq_sum == pytest.approx(truth, rel=EXACT)


def test_every_kind_of_layer_with_a_rule_is_tested_here() -> None:
    assert {kind.__name__ for kind in RULES} == {
        "Linear", "Conv1d", "Conv2d", "Embedding", "LayerNorm", "RMSNorm", "GroupNorm",
    }  # fmt: skip
