"""LARS, LAMB and LANS do what their papers' formulas say, which are written out here once more in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.optim import LAMB, LANS, LARS, OPTIMIZERS
from orchestrator.runtime import folder
from orchestrator.runtime.worker import local_worker
from orchestrator.train import build_optimizer, train
from tests.support import config

Array = np.ndarray[Any, np.dtype[np.float64]]
each = pytest.mark.parametrize("name", OPTIMIZERS)
LRS = (0.1, 0.02, 0.3, 0.05)  # another at every step, as a schedule and a growing batch make it
WEIGHTS = np.array([[0.5, -1.0, 2.0], [0.25, 3.0, -0.75]])
GRADIENTS = np.random.default_rng(0).normal(size=(4, 2, 3)) * np.array([1.0, 0.1, 10.0, 1.0])[:, None, None]


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
SETTINGS: dict[str, dict[str, Any]] = {
    "lars": {"momentum": 0.9, "trust": 0.02, "weight_decay": 0.1},
    "lamb": {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    "lans": {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
}


def layer(values: Any = WEIGHTS, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def moved(w: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: Any) -> Tensor:
    """By how much one step with this gradient moves ``w``."""
    before = w.detach().clone()
    w.grad = torch.as_tensor(gradient, dtype=w.dtype)
    optimizer.step()
    return before - w.detach()


def make(name: str, parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](parameters, **{"lr": 0.1, **SETTINGS[name], **settings})


@each
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


@each
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e5, 1e15])
def test_the_size_of_the_gradient_does_not_matter(name: str, scale: float) -> None:
    tiny = {"weight_decay": 0.0} if name == "lars" else {"eps": 1e-60}
    one, other = layer(), layer()
    mine, theirs = make(name, [one], **tiny), make(name, [other], **tiny)
    for gradient in GRADIENTS:
        moved(one, mine, gradient)
        moved(other, theirs, gradient * scale)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


@each
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_zero_gradients_stay_finite_and_only_decay_moves_the_weights(name: str, decay: float) -> None:
    w = layer()
    step = moved(w, make(name, [w], weight_decay=decay), np.zeros_like(WEIGHTS))
    if decay == 0:
        assert not step.any()
    else:  # towards zero, by the same share of all
        share = step / torch.tensor(WEIGHTS)
        torch.testing.assert_close(share, torch.full_like(share, 0.1 * (0.02 if name == "lars" else 1.0)))


@each
def test_zero_weights_move_as_without_trust_and_all_zero_ones_do_not(name: str) -> None:
    zeros, flat = layer(np.zeros((2, 3))), layer(np.zeros(6))
    step = moved(zeros, make(name, [zeros]), GRADIENTS[0])
    # A ratio of 1 and nothing to decay is what parameters of one dimension have.
    torch.testing.assert_close(step.flatten(), moved(flat, make(name, [flat]), GRADIENTS[0].ravel()))
    assert step.all()
    still = layer(np.zeros((2, 3)))
    assert not moved(still, make(name, [still]), np.zeros((2, 3))).any()


@each
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
    moved(w, optimizer, gradient)
    moved(exact, other, gradient.float())
    assert w.dtype == dtype
    assert {v.dtype for k, v in optimizer.state[w].items() if k != "step"} == {dtype}
    torch.testing.assert_close(w.detach(), exact.detach().to(dtype), rtol=0, atol=0)


@each
def test_gradients_are_left_as_they_are_and_a_parameter_without_one_too(name: str) -> None:
    w, unused = layer(), layer()
    optimizer = make(name, [w, unused])
    w.grad = torch.tensor(GRADIENTS[0])
    for _ in range(2):
        optimizer.step()
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
        optimizer.step()


@each
def test_the_state_is_named_as_torchs_own_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    def train_on(w: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: Array) -> None:
        for gradient in gradients:
            moved(w, optimizer, gradient)

    whole = layer(dtype=torch.float32)
    train_on(whole, make(name, [whole]), GRADIENTS)
    first = layer(dtype=torch.float32)
    optimizer = make(name, [first])
    train_on(first, optimizer, GRADIENTS[:2])
    names = {"momentum_buffer"} if name == "lars" else {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[first]) == names
    torch.save({"w": first.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    second = nn.Parameter(saved["w"])
    resumed = OPTIMIZERS[name]([second], lr=9.0)
    resumed.load_state_dict(saved["optimizer"])
    train_on(second, resumed, GRADIENTS[2:])
    assert torch.equal(second, whole)


@each
def test_a_closure_is_run_with_gradients_and_its_loss_returned(name: str) -> None:
    w = layer()
    optimizer = make(name, [w])

    def closure() -> float:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


BROKEN = [
    *[(name, "lr", value, "lr is") for name in OPTIMIZERS for value in (-0.1, float("nan"), float("inf"))],
    *[(name, "weight_decay", value, "not negative; write 0") for name in OPTIMIZERS for value in (-1.0, float("nan"))],
    *[(name, "eps", value, "above 0; 1e-06") for name in ("lamb", "lans") for value in (0.0, -1.0, float("inf"))],
    *[(name, "betas", (0.9, 1.0), r"betas\[1\] is 1.0") for name in ("lamb", "lans")],
    *[(name, "betas", (-0.1, 0.9), r"betas\[0\] is -0.1") for name in ("lamb", "lans")],
    *[(name, "betas", value, "two fractions; write") for name in ("lamb", "lans") for value in (0.9, (0.9,))],
    ("lars", "momentum", 1.0, "below 1; 0.9 is usual"),
    ("lars", "momentum", -0.1, "at least 0"),
    ("lars", "trust", 0.0, "above 0; 0.001 is usual"),
    ("lars", "trust", float("nan"), "trust is nan"),
]


@pytest.mark.parametrize(("name", "key", "value", "said"), BROKEN)
@pytest.mark.parametrize("in_group", [False, True])
def test_a_setting_that_cannot_be_is_refused(name: str, key: str, value: Any, said: str, in_group: bool) -> None:
    group = {"params": [layer()], **({key: value} if in_group else {})}
    with pytest.raises(ValueError, match=said) as caught:
        make(name, [group], **({} if in_group else {key: value}))
    assert str(caught.value).startswith(name.upper())


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
    settings = config(tmp_path, optimizer={"name": name, "lr": 0.01, "momentum": None})
    model = nn.Linear(3, 2)
    built = build_optimizer(settings, model)
    by_hand = OPTIMIZERS[name](model.parameters(), lr=0.01)
    assert type(built) is type(by_hand)
    assert built.defaults == by_hand.defaults


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
