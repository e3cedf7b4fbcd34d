"""An optimizer that compares parts of the batch gets the parts that the config names, whatever computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import SessionError
from orchestrator.measure.parts import PartMeter
from orchestrator.optim import OPTIMIZERS
from orchestrator.runtime.checkpoints import CheckpointStore
from orchestrator.runtime.collective import Solo
from orchestrator.session import Session
from orchestrator.train import build_optimizer
from tests.support import blobs, config, cross_entropy, mlp
from tests.unit.parts import BATCH, LR, PART, PARTS, STEPS, by_hand, by_session, data, furthest, optimizer_of, settings
from tests.unit.small_runs import rows_of, saved_steps
from tests.unit.test_out_of_memory import Hungry

each = pytest.mark.parametrize("name", PARTS)


@each
def test_a_session_trains_as_explicit_gradients_of_the_parts_do(tmp_path: Path, name: str) -> None:
    given = settings(tmp_path, name)
    mine = by_session(given)
    assert furthest(mine, by_hand(given)) < 1e-12
    assert furthest(mine, [p.detach().double() for p in mlp().parameters()]) > 0.01
    assert rows_of(tmp_path, "micro_batch") == [(PART,)] * STEPS


@each
def test_other_parts_are_another_optimizer(tmp_path: Path, name: str) -> None:
    halves = by_session(settings(tmp_path / "halves", name, optimizer={"part_samples": 15}))
    assert furthest(halves, by_hand(settings(tmp_path, name), sizes=(15, 15))) < 1e-12
    assert furthest(halves, by_session(settings(tmp_path / "quarters", name))) > 1e-4


@each
def test_seldom_measuring_changes_nothing(tmp_path: Path, name: str) -> None:
    often = by_session(settings(tmp_path / "often", name))
    seldom = by_session(settings(tmp_path / "seldom", name, measure={"every_steps": 4}))
    assert all(torch.equal(a, b) for a, b in zip(often, seldom, strict=True))


@each
def test_an_amp_scaler_changes_nothing(tmp_path: Path, name: str) -> None:
    plain = by_session(settings(tmp_path / "plain", name))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    scaled = by_session(settings(tmp_path / "scaled", name), grad_scaler=scaler)
    assert scaler.get_scale() > 2.0**12
    # The scaler multiplies the gradients by the reciprocal of its scale in float32: a power of two, exactly.
    assert furthest(plain, scaled) < 1e-12


@each
def test_a_step_that_the_scaler_passes_over_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    given = settings(tmp_path, name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    spoiled = by_session(given, grad_scaler=scaler, spoiled_step=1)
    assert scaler.get_scale() == 2.0**7
    assert furthest(spoiled, by_hand(given, without_step=1)) < 1e-12


@each
@pytest.mark.parametrize("most", [0.05, 100.0])
def test_clipping_clips_the_parts_as_it_clips_their_mean(tmp_path: Path, name: str, most: float) -> None:
    def factor(gradients: list[Tensor]) -> float:
        length = torch.stack([g.norm() for g in gradients]).norm()
        return min(1.0, most / (float(length) + 1e-6))

    given = settings(tmp_path, name, train={"max_grad_norm": most})
    assert furthest(by_session(given), by_hand(given, clip=factor)) < 1e-12


@each
def test_a_run_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    checkpoints = {"checkpoint": {"every_samples": 2 * BATCH, "keep": 9}}
    whole = by_session(settings(tmp_path / "whole", name, **checkpoints))
    by_session(settings(tmp_path / "cut", name, train={"samples": 4 * BATCH}, **checkpoints))
    resumed = by_session(settings(tmp_path / "cut", name, **checkpoints), resume=True)
    assert saved_steps(tmp_path / "cut") == [2, 4, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@each
def test_a_checkpoint_before_the_first_step_changes_nothing(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path, keep=1, collective=Solo())
    given = settings(tmp_path, name)
    models = [mlp() for _ in range(3)]  # one that is never saved, one that is, and one that is loaded
    optimizers = [optimizer_of(given, model.parameters()) for model in models]
    store.save(models[1], optimizers[1], step=0, meta={})
    store.load_latest(models[2], optimizers[2])
    for model, optimizer in zip(models, optimizers, strict=True):
        for p in model.parameters():
            p.grad = p.detach().sin()
        optimizer.take_parts({p: 2 * optimizer.of_part(p.grad) for p in model.parameters()})
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(models[0].parameters(), mlp().parameters(), strict=True))
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))


@each
def test_memory_that_runs_out_ends_the_run_and_does_not_cut_the_parts_smaller(tmp_path: Path, name: str) -> None:
    given = settings(tmp_path, name)
    model = Hungry(mlp(), most=PART - 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_of(given, model.parameters())
    with Session(given, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for inputs, labels in next(iter(session)):
            session.backward(lambda x=inputs, y=labels: nn.functional.cross_entropy(model(x), y))
        with pytest.raises(SessionError, match=r"rank 0: a micro-batch of 8 .* another opt.*part_samples: 4 or less"):
            session.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert rows_of(tmp_path, "step") == []


def test_a_config_and_an_optimizer_that_disagree_about_parts_are_refused(tmp_path: Path) -> None:
    model = mlp()
    clars = OPTIMIZERS["clars"](model.parameters(), lr=1.0)
    with pytest.raises(SessionError, match=r"CLARS is told how the parts.*write optimizer.part_samples"):
        Session(config(tmp_path), model=model, optimizer=clars, dataset=blobs())
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(SessionError, match=r"part_samples is 8, and SGD does not ask.*PartsOptimizer"):
        Session(settings(tmp_path, "clars"), model=model, optimizer=sgd, dataset=blobs())
    assert not (tmp_path / "run").exists()


def test_an_optimizer_of_ones_own_is_given_the_parts_of_the_config(tmp_path: Path) -> None:
    mine = {"name": "orchestrator.optim:CLARS", "trust": 0.001}  # by its path, as one that is imported from elsewhere
    imported = settings(tmp_path / "imported", "clars", optimizer=mine, lr_rule={"name": "constant"})
    model = mlp().double()
    optimizer = build_optimizer(imported, model)
    with Session(imported, model=model, optimizer=optimizer, dataset=data()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    trained = [p.detach() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(trained, by_session(settings(tmp_path, "clars")), strict=True))


def test_nothing_is_collected_for_an_optimizer_that_takes_no_parts(tmp_path: Path) -> None:
    model = mlp()
    seldom = config(tmp_path, measure={"every_steps": 1000})
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with Session(seldom, model=model, optimizer=sgd, dataset=blobs()) as session:
        next(iter(session))  # the first step is measured
        session._meter.close()
        assert not any(p._backward_hooks for p in model.parameters())


def test_the_hooks_are_gone_when_the_session_is_closed(tmp_path: Path) -> None:
    given = settings(tmp_path, "clars")
    model = mlp()
    session = Session(given, model=model, optimizer=optimizer_of(given, model.parameters()), dataset=blobs())
    assert all(p._backward_hooks for p in model.parameters())
    session.close()
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("loss_scale", [1.0, 3.0, 2.0**-20])
def test_a_meter_weighs_the_parts_divides_by_their_scale_and_looks_at_nothing_else(loss_scale: float) -> None:
    w, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    meter = PartMeter([w, unused], of_part=lambda g: g.double().square(), shape_of=lambda p: tuple(p.shape), degree=2)
    for _ in range(2):  # begin_step() forgets
        meter.begin_step()
        for share, slope in ((0.75, 2.0), (0.25, -4.0)):
            with meter.part(share=share, loss_scale=loss_scale):
                (w.sum() * slope * loss_scale).backward()
        (w.sum() * 100).backward()
    expected = torch.full((2,), 0.75 * 4 + 0.25 * 16, dtype=torch.float64)
    torch.testing.assert_close(meter.averages[w], expected, rtol=1e-12, atol=0)
    assert not meter.averages[unused].any()
    assert len(meter.totals) == 5
    meter.totals *= 2  # what a sum over two ranks does
    torch.testing.assert_close(meter.averages[w], 2 * expected, rtol=1e-12, atol=0)


def any_step(name: str) -> tuple[Any, nn.Parameter]:
    w = nn.Parameter(torch.ones(2, 3))
    w.grad = torch.full((2, 3), 0.5)
    return OPTIMIZERS[name]([w], lr=LR[name]), w


@each
def test_a_step_without_its_parts_is_refused_and_parts_serve_one_step(name: str) -> None:
    optimizer, w = any_step(name)
    with pytest.raises(RuntimeError, match=r"call take_parts\(\) before each step, or train with a Session"):
        optimizer.step()
    optimizer.take_parts({w: optimizer.of_part(w.grad)})
    optimizer.step()
    with pytest.raises(RuntimeError, match="take_parts"):
        optimizer.step()


@each
def test_parts_that_are_missing_or_of_another_shape_are_refused(name: str) -> None:
    optimizer, w = any_step(name)
    with pytest.raises(ValueError, match=r"given nothing for a parameter of shape \(2, 3\).*every parameter"):
        optimizer.take_parts({})
    with pytest.raises(ValueError, match=r"average of shape \(3,\) for a parameter of shape \(2, 3\)"):
        optimizer.take_parts({w: torch.ones(3)})
    w.grad = None
    optimizer.take_parts({})  # without a gradient a parameter needs none
