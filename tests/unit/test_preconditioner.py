"""The preconditioned noise scale: Adam's own metric, from earlier steps, and unbiased in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.core.companions import Companions, Jump, StepScale
from orchestrator.core.noise import moments_from_sums
from orchestrator.errors import SessionError
from orchestrator.measure.groups import GroupMeter
from orchestrator.measure.preconditioner import SETTLED_STEPS, AdamPreconditioner
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.update import WeightUpdate
from orchestrator.session import Session
from tests.support import blobs, config, mlp

SIZES = (4, 2, 2, 1)


def planted(diagonal: list[float], *, settled: int = 10**6) -> tuple[nn.Parameter, torch.optim.Adam]:
    """A parameter, and an Adam whose state after many steps says P = ``diagonal``."""
    parameter = nn.Parameter(torch.zeros(len(diagonal), dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], eps=0.5)
    root = 1 / torch.tensor(diagonal, dtype=torch.float64) - 0.5
    step = torch.tensor(float(settled))
    square = root**2 * (1 - 0.999 ** float(settled))
    optimizer.state[parameter] = {"step": step, "exp_avg": torch.zeros_like(root), "exp_avg_sq": square}
    return parameter, optimizer


def test_planted_gradients_give_the_moments_of_both_metrics_without_bias() -> None:
    # Sigma = diag(1, 100), G = (1, 1), P = diag(1, 0.1): 101 / 2 = 50.5 as it is, 11 / 1.1 = 10 in the metric P.
    parameter, optimizer = planted([1.0, 0.1])
    meter = GroupMeter({"plain": [parameter]}, preconditioner=AdamPreconditioner(optimizer))
    assert meter.names == ("plain", "preconditioned")
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 10.0], dtype=torch.float64)
    batch, readings = sum(SIZES), []
    for _ in range(4000):
        parameter.grad = None
        meter.begin_step(measure=True)
        for size in SIZES:
            noise = spread * torch.randn(2, generator=generator, dtype=torch.float64) / size**0.5
            (parameter @ (1 + noise) * (size / batch)).backward()
            meter.end_micro_batch(size=size, loss_scale=size / batch)
        found = meter.read()
        readings.append(
            [
                moments_from_sums(weighted_sq_sum=w, mean_grad_sq=m, batch=batch, micro_batches=len(SIZES))
                for w, m in zip(found.weighted_sq_sum.tolist(), found.mean_grad_sq.tolist(), strict=True)
            ]
        )
    values = torch.tensor(readings, dtype=torch.float64)  # [steps, metric, (|G|^2, tr Sigma)]
    truth = torch.tensor([[2.0, 101.0], [1.1, 11.0]], dtype=torch.float64)
    error = values.std(dim=0) / len(values) ** 0.5
    # Four standard errors, four numbers: one false alarm in 4,000 seeds.
    assert ((values.mean(dim=0) - truth).abs() < 4 * error).all()


def test_gradients_of_exactly_these_moments_give_exactly_these_noise_scales() -> None:
    # Four deviations whose sample covariance is Sigma, about the mean for which |G|^2 is found to be that of (1, 1).
    parameter, optimizer = planted([1.0, 0.1])
    meter = GroupMeter({"plain": [parameter]}, preconditioner=AdamPreconditioner(optimizer))
    meter.begin_step(measure=True)
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        root = torch.tensor([1.25**0.5 + signs[0] * 0.75**0.5, 26**0.5 + signs[1] * 75**0.5], dtype=torch.float64)
        (parameter @ root / 4).backward()
        meter.end_micro_batch(size=1, loss_scale=0.25)
    found = meter.read()
    moments = [
        moments_from_sums(weighted_sq_sum=w, mean_grad_sq=m, batch=4, micro_batches=4)
        for w, m in zip(found.weighted_sq_sum.tolist(), found.mean_grad_sq.tolist(), strict=True)
    ]
    assert moments == [pytest.approx((2.0, 101.0)), pytest.approx((1.1, 11.0))]  # 50.5 and 10 samples


@pytest.mark.parametrize("factory", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_metric_is_that_of_the_optimizers_own_update(factory: Any, amsgrad: bool) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = factory([parameter], lr=0.1, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.0, amsgrad=amsgrad)
    metric = AdamPreconditioner(optimizer)
    assert metric.root_times(torch.ones(50), parameter).any() == torch.tensor(False)
    for _ in range(7):
        parameter.grad = torch.randn(50, dtype=torch.float64)
        before = parameter.detach().clone()
        optimizer.step()
    state = optimizer.state[parameter]
    moved = (before - parameter.detach()) / (0.1 * state["exp_avg"] / (1 - 0.8**7))  # lr x m_hat x P
    gradient = torch.randn(50, dtype=torch.float64)
    weighed = metric.root_times(gradient, parameter)
    assert (weighed**2 / gradient**2).tolist() == pytest.approx(moved.tolist(), rel=1e-9)
    # A group's mapping is another one after a checkpoint was loaded.
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["eps"] = 10.0
    assert (metric.root_times(gradient, parameter).abs() < weighed.abs()).all()


def read_after(steps: list[int], *, used: int) -> Tensor:
    """What a model of one parameter for each of ``steps`` reads, ``used`` of them, after so many updates of each."""
    planted_ones = [planted([1.0, 0.1], settled=count) for count in steps]
    optimizer = torch.optim.Adam([p for p, _ in planted_ones], eps=0.5)
    for parameter, alone in planted_ones:
        if alone.state[parameter]["step"] > 0:
            optimizer.state[parameter] = alone.state[parameter]
    meter = GroupMeter({}, preconditioner=AdamPreconditioner(optimizer))
    meter.begin_step(measure=True)
    torch.stack([p.sum() for p, _ in planted_ones[:used]]).sum().backward()
    meter.end_micro_batch(size=4, loss_scale=1.0)
    return meter.read().mean_grad_sq


def test_nothing_is_read_before_every_parameter_in_use_is_settled() -> None:
    enough, few = SETTLED_STEPS, SETTLED_STEPS - 1
    assert read_after([enough], used=1).tolist() == pytest.approx([1.1])
    assert read_after([few], used=1).isnan().all()
    assert read_after([enough, few], used=2).isnan().all()
    assert read_after([enough, 0], used=2).isnan().all()
    assert read_after([enough, 0], used=1).tolist() == pytest.approx([1.1])


class Stepped:
    """One parameter, Adam, and its metric; its betas follow the batch, which begins at 8."""

    def __init__(self, companions: Companions) -> None:
        self.parameter = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        self.optimizer = torch.optim.Adam([self.parameter], lr=1e-3, betas=(0.9, 0.99))
        self.metric = AdamPreconditioner(self.optimizer)
        self.update = WeightUpdate(
            self.optimizer,
            [self.parameter],
            scaler=None,
            max_grad_norm=None,
            device=torch.device("cpu"),
            collective=Solo(),
            base_batch=8,
            companions=companions,
        )

    def steps(self, count: int, *, batch: int) -> None:
        generator = torch.Generator().manual_seed(batch)
        for _ in range(count):
            self.parameter.grad = torch.randn(6, generator=generator, dtype=torch.float64)
            self.update.apply(StepScale(ratio=batch / 8))

    def reading(self) -> list[float]:
        return self.metric.root_times(torch.ones(6, dtype=torch.float64), self.parameter).tolist()

    def is_settled(self) -> bool:
        return bool(self.metric.is_settled([self.parameter], torch.device("cpu")))


FOLLOWING = {"in samples": Companions(in_samples=frozenset({"betas"})), "sde": Companions(sde=True)}


@pytest.mark.parametrize("companions", FOLLOWING.values(), ids=FOLLOWING)
@pytest.mark.parametrize("taken", [SETTLED_STEPS, 3 * SETTLED_STEPS])
def test_a_jump_leaves_the_metric_and_its_being_settled_as_they_are(companions: Companions, taken: int) -> None:
    run = Stepped(companions)
    run.steps(taken, batch=8)
    before = run.reading()
    for old, new in ((8, 64), (64, 16), (16, 8)):  # read in a step before the optimizer moves in it
        run.update.carry_over(Jump(old_batch=old, new_batch=new))
        assert run.reading() == pytest.approx(before, rel=1e-5)
        assert run.is_settled()


def test_steps_before_and_after_a_jump_count_by_what_they_forget() -> None:
    run = Stepped(FOLLOWING["in samples"])
    run.steps(20, batch=8)
    run.update.carry_over(Jump(old_batch=8, new_batch=64))
    run.steps(3, batch=64)
    assert not run.is_settled()  # 20 + 3 x 8 = 44
    resumed = Stepped(FOLLOWING["in samples"])
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    for either in (run, resumed):
        either.steps(1, batch=64)
        assert either.is_settled()


def test_betas_of_zero_have_their_steps_counted() -> None:
    run = Stepped(Companions(in_samples=frozenset({"betas"})))
    run.steps(SETTLED_STEPS - 1, batch=8)
    run.optimizer.param_groups[0]["betas"] = (0.0, 0.0)  # as a checkpoint may say
    assert not run.is_settled()
    run.optimizer.state[run.parameter]["step"] += 1
    assert run.is_settled()


def test_another_optimizer_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    model = mlp()
    settings = config(
        tmp_path, optimizer={"name": "adam", "lr": 0.1, "momentum": None}, measure={"preconditioned": True}
    )
    with pytest.raises(SessionError, match=r"remove measure\.preconditioned"):
        Session(settings, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), dataset=blobs())
