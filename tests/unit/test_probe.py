"""A probe measures the model as it stands: right against a closed form, and without a trace in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from orchestrator.config import RunConfig
from orchestrator.core.policies import POLICIES, PolicySettings
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.core.probing import fewest_samples, more_samples_for, plan_probe, relative_precision
from orchestrator.errors import CheckpointError, ConfigError, NonFiniteError
from orchestrator.runtime.checkpoints import CheckpointStore, load_weights
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.probe import measure, probe
from orchestrator.runtime.worker import local_worker
from orchestrator.tasks.protocol import build_task
from orchestrator.train import train
from orchestrator.types import NoiseStats, Verdict
from tests import support

CPU = torch.device("cpu")
DIM, LABEL_NOISE = 10, 1.0
CLOSED_FORM = 1 + DIM + DIM * LABEL_NOISE**2  # theory F1 with A = I and |e| = 1: 21


class Regression:
    """x ~ N(0, I), y = label noise, and a model at distance 1 from the best; ``inside`` joins the linear layer."""

    def __init__(self, seed: int, *, size: int = 4096, inside: nn.Module | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(size, DIM, generator=generator)
        self.train_set = TensorDataset(x, LABEL_NOISE * torch.randn(size, generator=generator))
        self.eval_set = self.train_set
        self._inside = nn.Identity() if inside is None else inside

    def model(self) -> nn.Module:
        linear = nn.Linear(DIM, 1, bias=False)
        nn.init.constant_(linear.weight, DIM**-0.5)
        return nn.Sequential(self._inside, linear, nn.Flatten(0))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return 0.5 * nn.functional.mse_loss(model(x), y)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        return {}


def settings(place: Path, **sections: Any) -> RunConfig:
    return support.config(place, **sections)


def test_the_interval_covers_the_closed_form(tmp_path: Path) -> None:
    covered = 0
    for seed in range(20):
        config = settings(tmp_path, run={"name": "run", "dir": str(tmp_path), "seed": seed})
        task = Regression(seed)
        stats = measure(config, task=task, model=task.model(), device=CPU).stats
        assert stats.verdict is Verdict.MEASURED
        assert stats.low is not None
        assert stats.high is not None
        covered += stats.low <= CLOSED_FORM <= stats.high
    assert covered >= 18


def test_the_only_layer_reads_as_the_whole_and_measuring_it_changes_nothing_else(tmp_path: Path) -> None:
    task = Regression(0)
    found = measure(settings(tmp_path), task=task, model=task.model(), device=CPU)
    ((name, layer),) = found.layers.items()
    assert (name, layer.verdict) == ("1", found.stats.verdict)
    for key in ("noise_scale", "low", "high", "grad_sq", "trace_cov"):
        assert getattr(layer, key) == pytest.approx(getattr(found.stats, key), rel=1e-5)
    without = measure(settings(tmp_path), task=task, model=task.model(), device=CPU, by_layer=False)
    assert (without.stats, without.loss, without.layers) == (found.stats, found.loss, {})


@pytest.mark.parametrize("samples", [4096, 1000])
def test_the_model_is_afterwards_what_it_was(tmp_path: Path, samples: int) -> None:
    task = Regression(0, inside=nn.Sequential(nn.BatchNorm1d(DIM), nn.Dropout(0.2)))
    model = task.model()
    model(torch.randn(8, DIM)).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [p.grad for p in model.parameters()]
    kept = [g.clone() for g in gradients if g is not None]
    state = torch.get_rng_state()
    first = measure(settings(tmp_path), task=task, model=model, device=CPU, samples=samples)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(g, k) for g, k in zip(gradients, kept, strict=True) if g is not None)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    torch.manual_seed(99)  # dropout belongs to the positions
    assert measure(settings(tmp_path), task=task, model=model, device=CPU, samples=samples) == first


def test_a_failing_loss_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    task = Regression(0, inside=nn.BatchNorm1d(DIM))
    task.train_set.tensors[1][:] = torch.nan
    model = task.model()
    with pytest.raises(NonFiniteError, match="stream positions 0 to 63"):
        measure(settings(tmp_path), task=task, model=model, device=CPU)
    assert model.state_dict()["0.num_batches_tracked"] == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_checkpoint_of_a_run_measures_as_the_model_in_memory(tmp_path: Path) -> None:
    config = settings(
        tmp_path,
        task={"name": "digits", "options": {"model": "batchnorm", "width": 8}},
        train={"samples": 256},
        batch={"initial": 32, "micro_batch": 8, "max": 64},
    )
    assert train(config, local_worker(config), resume=False)
    run = tmp_path / "run"
    task = build_task(config.task.name, config.task.options, seed=0)
    model = task.model()
    path, _ = load_weights(run, model)
    model.to(local_worker(config).device)
    in_memory = measure(config, task=task, model=model, device=local_worker(config).device, samples=640)
    for place in (run, run / "checkpoints", path):
        found = probe(config, checkpoint=place, samples=640)
        assert found.checkpoint == str(path)
        assert (found.stats, found.loss, found.advice) == (in_memory.stats, in_memory.loss, in_memory.advice)
    assert probe(config, samples=640).stats != in_memory.stats


def test_what_is_no_checkpoint_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = support.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    store = CheckpointStore(tmp_path / "checkpoints", keep=3, collective=Solo())
    paths = [store.save(model, optimizer, step=step, meta={}) for step in (1, 2)]
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_weights(tmp_path, support.mlp(width=16))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_weights(tmp_path / "elsewhere", model)
    (paths[1] / "meta.json").write_text("{} ")
    with pytest.raises(CheckpointError, match="is whole"):
        load_weights(paths[1], model)
    chosen, faults = load_weights(tmp_path, model)
    assert chosen == paths[0]
    assert [fault.path for fault in faults] == [str(paths[1])]


def test_too_few_samples_are_refused_with_the_number_that_is_needed(tmp_path: Path) -> None:
    task = Regression(0, size=400)
    with pytest.raises(ConfigError, match=r"(?s)320 samples.*write --samples 320 or more"):
        measure(settings(tmp_path), task=task, model=task.model(), device=CPU, samples=319)
    measure(settings(tmp_path), task=task, model=task.model(), device=CPU, samples=320)
    small = Regression(0, size=200)
    with pytest.raises(ConfigError, match=r"(?s)320 samples.*batch.micro_batch=5 or less"):
        measure(settings(tmp_path), task=small, model=small.model(), device=CPU)
    with pytest.raises(ConfigError, match="write 200 or less"):
        measure(settings(tmp_path), task=small, model=small.model(), device=CPU, samples=201)


@pytest.mark.parametrize("samples", [40, 41, 97, 160, 333, 5000])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_plan_uses_every_whole_micro_batch(samples: int, micro_batch: int) -> None:
    if samples < fewest_samples(micro_batch):
        with pytest.raises(ValueError, match="120 samples"):
            plan_probe(samples, micro_batch=micro_batch)
        return
    plan = plan_probe(samples, micro_batch=micro_batch)
    assert plan.micro_batches == samples // micro_batch
    assert len(plan.groups) >= 20
    assert min(plan.groups) >= 2
    assert max(plan.groups) - min(plan.groups) <= 1


def test_the_samples_for_a_precision_grow_with_the_square_of_the_width() -> None:
    stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=100.0, low=80.0, high=120.0)
    assert relative_precision(stats) == pytest.approx(0.2)
    assert more_samples_for(stats, samples=1000, precision=0.1) == pytest.approx(3000, abs=1)
    assert more_samples_for(stats, samples=1000, precision=0.3) == 0
    open_ended = NoiseStats(verdict=Verdict.TOO_NOISY, noise_scale=100.0, low=80.0)
    assert more_samples_for(open_ended, samples=1000, precision=0.1) is None


def test_the_advice_is_the_policies_own_answer_and_names_what_is_missing(tmp_path: Path) -> None:
    task = Regression(0)
    config = settings(
        tmp_path,
        batch={"initial": 4, "micro_batch": 4, "max": 128},
        controller={"policy": "tradeoff", "exchange_rate": 50.0},
        lr_rule={"name": "power", "exponent": 0.7},
    )
    found = measure(config, task=task, model=task.model(), device=CPU)
    inputs = PolicyInputs(stats=found.stats, batch=4, samples_seen=0)
    for name, decision in found.advice.decisions.items():
        own = PolicySettings(name=name, exchange_rate=50.0)
        assert decision == POLICIES[name](own)(inputs)
        assert found.advice.factors["power"][name] == pytest.approx((decision.target_batch / 4) ** 0.7)
    assert list(found.advice.decisions) == ["noise_scale", "tradeoff"]
    missing = {"norm_test", "surge", "decay_to_growth", "goodput", "expected_smoothness", "branched"}
    assert set(found.advice.left_out) == missing
    assert "controller.theta is missing" in found.advice.left_out["norm_test"]
    capped = settings(tmp_path, batch={"initial": 4, "micro_batch": 4, "max": 8}, controller={"policy": "noise_scale"})
    advice = measure(capped, task=task, model=task.model(), device=CPU).advice
    assert advice.decisions["noise_scale"].target_batch == 8
