"""What every registered optimizer promises, whatever it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.optim import OPTIMIZERS, PartsOptimizer
from orchestrator.train import build_optimizer
from tests.contract.plugins import PLUGINS
from tests.optimizers import GRADIENTS, SETTINGS, WEIGHTS, Array, layer, make, moved, named, parts_of
from tests.support import config

each = pytest.mark.parametrize("name", OPTIMIZERS)
every = pytest.mark.parametrize("name", [*OPTIMIZERS, *PLUGINS["optimizer"]])
# Biases and gains are neither decayed nor scaled to their norm by these.
SPARING = ("lars", "lamb", "lans", "clars", "vr_lamb")
# At weight decay 0, or an eps of next to nothing, the size of the gradient cancels in these.
UNSCALED: dict[str, dict[str, Any]] = {
    "lars": {"weight_decay": 0.0},
    "clars": {"weight_decay": 0.0},
    "lamb": {"eps": 1e-60},
    "lans": {"eps": 1e-60},
    "vr_adam": {"eps": 1e-60},
    "vr_lamb": {"eps": 1e-60},
}
MOMENTUM, MOMENTS = {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}
STATE = {
    "lars": MOMENTUM,
    "clars": MOMENTUM,
    "vr_sgd": MOMENTUM,
    "lamb": MOMENTS,
    "lans": MOMENTS,
    "vr_adam": {*MOMENTS, "exp_avg_ratio_less_one"},
    "vr_lamb": {*MOMENTS, "exp_avg_ratio_less_one"},
}
# Of its weights, what a step at lr 0.1 and weight decay 0.1 takes away where the gradient is zero.
DECAYED = {"lars": 0.1 * 0.02, "clars": 0.1 * 0.02, "lamb": 0.1, "lans": 0.1, "vr_lamb": 0.1} | dict.fromkeys(
    ("vr_sgd", "vr_adam"), 0.1 * 0.1
)


def ready(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """``optimizer`` with the gradients at hand told as those of one part, if it wants to know."""
    if isinstance(optimizer, PartsOptimizer):
        with_gradient = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        optimizer.take_parts({p: optimizer.of_part(p.grad) for p in with_gradient})
    return optimizer


@pytest.mark.parametrize("name", UNSCALED)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e5, 1e15])
def test_the_size_of_the_gradient_does_not_matter(name: str, scale: float) -> None:
    one, other = layer(), layer()
    mine, theirs = make(name, [one], **UNSCALED[name]), make(name, [other], **UNSCALED[name])
    for gradient in GRADIENTS:
        moved(one, mine, gradient)
        moved(other, theirs, gradient * scale)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


@every
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e37])
def test_tiny_and_huge_gradients_leave_weights_finite(name: str, scale: float) -> None:
    w = layer(dtype=torch.float32)
    optimizer = make(name, [w], lr=1e-3)
    for gradient in GRADIENTS:
        assert moved(w, optimizer, gradient / np.abs(gradient).max() * scale).isfinite().all()


@each
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_zero_gradients_stay_finite_and_only_decay_moves_the_weights(name: str, decay: float) -> None:
    w = layer()
    step = moved(w, make(name, [w], weight_decay=decay), np.zeros_like(WEIGHTS))
    if decay == 0:
        assert not step.any()
    else:  # towards zero, by the same share of all
        share = step / torch.tensor(WEIGHTS)
        torch.testing.assert_close(share, torch.full_like(share, DECAYED[name]))


@pytest.mark.parametrize("name", SPARING)
def test_zero_weights_move_as_without_trust_and_all_zero_ones_do_not(name: str) -> None:
    zeros, flat = layer(np.zeros((2, 3))), layer(np.zeros(6))
    step = moved(zeros, make(name, [zeros]), GRADIENTS[0])
    # A ratio of 1 and nothing to decay is what parameters of one dimension have.
    torch.testing.assert_close(step.flatten(), moved(flat, make(name, [flat]), GRADIENTS[0].ravel()))
    assert step.all()
    still = layer(np.zeros((2, 3)))
    assert not moved(still, make(name, [still]), np.zeros((2, 3))).any()


def test_the_size_of_the_gradient_is_the_size_of_the_step_of_vr_sgd() -> None:
    one, other = layer(), layer()
    mine, theirs = make("vr_sgd", [one], weight_decay=0.0), make("vr_sgd", [other], weight_decay=0.0, lr=0.1 / 64)
    for gradient in GRADIENTS:
        moved(one, mine, gradient)
        moved(other, theirs, gradient * 64)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in SPARING])
def test_the_others_decay_biases_as_they_decay_all(name: str) -> None:
    small, large = layer(np.full(6, 1.0)), layer(np.full(6, 101.0))
    steps = [moved(w, make(name, [w], weight_decay=0.5), np.full(6, 0.3)) for w in (small, large)]
    torch.testing.assert_close(steps[1] - steps[0], torch.full((6,), 0.1 * 0.5 * 100.0, dtype=torch.float64))


@pytest.mark.parametrize("name", SPARING)
@pytest.mark.parametrize("shape", [(), (6,), (0,), (0, 3)])
def test_biases_gains_scalars_and_empty_parameters_are_neither_decayed_nor_scaled(
    name: str, shape: tuple[int, ...]
) -> None:
    small, large = layer(np.full(shape, 1.0)), layer(np.full(shape, 1e4))
    steps = [moved(w, make(name, [w], weight_decay=0.5), np.full(shape, 0.3)) for w in (small, large)]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-7, atol=0)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_what_it_is_and_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    w, exact = layer(dtype=dtype), layer(dtype=torch.float32)
    optimizer, other = make(name, [w]), make(name, [exact])
    gradient = torch.tensor(GRADIENTS[0]).to(dtype)
    parts = parts_of(gradient)
    moved(w, optimizer, gradient, parts)
    moved(exact, other, gradient.float(), parts)
    assert w.dtype == dtype
    assert {v.dtype for k, v in optimizer.state[w].items() if k != "step"} == {dtype}
    torch.testing.assert_close(w.detach(), exact.detach().to(dtype), rtol=0, atol=0)


@every
def test_gradients_are_left_as_they_are_and_a_parameter_without_one_too(name: str) -> None:
    w, unused = layer(), layer()
    optimizer = make(name, [w, unused])
    w.grad = torch.tensor(GRADIENTS[0])
    for _ in range(2):
        ready(optimizer).step()
    assert torch.equal(w.grad, torch.tensor(GRADIENTS[0]))
    assert torch.equal(unused, torch.tensor(WEIGHTS))
    assert unused not in optimizer.state


@each
def test_a_step_reads_nothing_back_from_the_device(name: str) -> None:
    # Tensors on "meta" have no values: whatever asks for one raises.
    w = nn.Parameter(torch.zeros(2, 3, device="meta"))
    bias = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = make(name, [w, bias])
    for _ in range(2):
        w.grad, bias.grad = torch.zeros_like(w), torch.zeros_like(bias)
        ready(optimizer).step()


@every
def test_the_state_is_named_as_torchs_own_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    def train_on(w: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: Array) -> None:
        for gradient in gradients:
            moved(w, optimizer, gradient)

    whole = layer(dtype=torch.float32)
    train_on(whole, make(name, [whole]), GRADIENTS)
    first = layer(dtype=torch.float32)
    optimizer = make(name, [first])
    train_on(first, optimizer, GRADIENTS[:2])
    if name in STATE:
        assert set(optimizer.state[first]) == STATE[name]
    torch.save({"w": first.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    second = nn.Parameter(saved["w"])
    resumed = named(name)([second], lr=9.0)
    resumed.load_state_dict(saved["optimizer"])
    train_on(second, resumed, GRADIENTS[2:])
    assert torch.equal(second, whole)


@every
def test_a_closure_is_run_with_gradients_and_its_loss_returned(name: str) -> None:
    w = layer()
    optimizer = make(name, [w])

    def closure() -> float:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        ready(optimizer)
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


WITH_MOMENTUM = [name for name in OPTIMIZERS if "momentum" in SETTINGS[name]]
DOUBTING = ("vr_sgd", "vr_adam", "vr_lamb")
ADAPTIVE = [name for name in OPTIMIZERS if "betas" in SETTINGS[name]]
BROKEN = [
    *[(name, "lr", value, "lr is") for name in OPTIMIZERS for value in (-0.1, float("nan"), float("inf"))],
    *[(name, "weight_decay", value, "not negative; write 0") for name in OPTIMIZERS for value in (-1.0, float("nan"))],
    *[(name, "eps", value, "above 0; 1e-06 is usual") for name in ADAPTIVE for value in (0.0, -1.0, float("inf"))],
    *[(name, "betas", (0.9, 1.0), r"betas\[1\] is 1.0") for name in ADAPTIVE],
    *[(name, "betas", (-0.1, 0.9), r"betas\[0\] is -0.1") for name in ADAPTIVE],
    *[(name, "betas", value, "two fractions; write") for name in ADAPTIVE for value in (0.9, (0.9,))],
    *[(name, "momentum", 1.0, "below 1; 0.9 is usual") for name in WITH_MOMENTUM],
    *[(name, "momentum", -0.1, "at least 0") for name in WITH_MOMENTUM],
    *[(name, "ratio_floor", value, "above 0 and at most 1") for name in DOUBTING for value in (0.0, 1.5, float("nan"))],
    *[(name, "ratio_beta", 1.0, "below 1; 0.9 is usual") for name in ("vr_adam", "vr_lamb")],
    *[(name, "trust", 0.0, "above 0; 0.001 is usual") for name in ("lars", "clars")],
    *[(name, "trust", float("nan"), "trust is nan") for name in ("lars", "clars")],
]


@pytest.mark.parametrize(("name", "key", "value", "said"), BROKEN)
@pytest.mark.parametrize("in_group", [False, True])
def test_a_setting_that_cannot_be_is_refused(name: str, key: str, value: Any, said: str, in_group: bool) -> None:
    group = {"params": [layer()], **({key: value} if in_group else {})}
    with pytest.raises(ValueError, match=said) as caught:
        make(name, [group], **({} if in_group else {key: value}))
    assert str(caught.value).startswith(f"{OPTIMIZERS[name].__name__}: ")


@each
def test_sparse_gradients_and_complex_parameters_are_refused(name: str) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse gradient.*\(4, 2\).*sparse=False"):
        make(name, table.parameters()).step()
    w = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match="complex parameter"):
        make(name, [w]).step()


@each
def test_the_config_builds_it_with_the_defaults_of_its_class(name: str, tmp_path: Path) -> None:
    part = {"part_samples": 4} if issubclass(OPTIMIZERS[name], PartsOptimizer) else {}
    settings = config(tmp_path, optimizer={"name": name, "lr": 0.01, "momentum": None, **part})
    model = nn.Linear(3, 2)
    built = build_optimizer(settings, model)
    by_hand = OPTIMIZERS[name](model.parameters(), lr=0.01)
    assert type(built) is type(by_hand)
    assert built.defaults == by_hand.defaults
