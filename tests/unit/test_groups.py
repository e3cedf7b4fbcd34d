"""The noise scale by group of parameters: the readings are parts of the whole, and a run writes what follows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from orchestrator.core import groups, noise
from orchestrator.core.groups import GroupSums
from orchestrator.core.noise import NoiseSettings, moments_from_sums
from orchestrator.measure.groups import GroupMeter, layers, parameter_groups
from orchestrator.measure.micro_batch import GradMeter
from orchestrator.runtime import folder
from orchestrator.session import Session
from orchestrator.types import NoiseStats, Verdict
from tests.support import blobs, config, cross_entropy, mlp
from tests.unit.readings import sample

SIZES = (8, 8, 8, 3)
BATCH = sum(SIZES)
NUMBERS = ("grad_sq", "trace_cov", "noise_scale", "noise_low", "noise_high", "signal_to_noise", "diversity")


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, a bias of the model itself, one parameter never used."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12, sparse=sparse)
        self.block = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.LayerNorm(12))
        self.out = nn.Linear(12, 50)
        if not sparse:
            self.out.weight = self.embedding.weight
        self.shift = nn.Parameter(torch.zeros(12))
        self.unused = nn.Linear(3, 3)
        self.block[0].bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.block(self.embedding(tokens).mean(1) + self.shift))


def tokens(size: int) -> Tensor:
    return torch.randint(50, (size, 6))


def images(size: int) -> Tensor:
    return torch.randn(size, 3, 8, 8, dtype=torch.float64)


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "tied, frozen and unused": (Tied, tokens),
    "sparse": (lambda: Tied(sparse=True), tokens),
    "convolutions": (conv, images),
}


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().mean()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("name", MODELS)
def test_readings_are_those_of_whole_micro_gradients_and_add_up_to_the_global_ones(
    name: str, loss_scale: float
) -> None:
    torch.manual_seed(0)
    build, draw = MODELS[name]
    model = build().double()
    twin = copy.deepcopy(model)  # the hooks do not see what the truth is made of
    members = layers(model, trained(model))
    meter, whole = GroupMeter(members), GradMeter(model.parameters())
    meter.begin_step(measure=True)
    whole.begin_step(measure=True)
    weighted = np.zeros(len(members))
    exact = list(layers(twin, trained(twin)).values())
    mean = [[torch.zeros(()) for _ in group] for group in exact]
    for size in SIZES:
        loss, weight = loss_of(model, inputs := draw(size)), loss_scale * size / BATCH
        (loss * weight).backward()
        meter.end_micro_batch(size=size, loss_scale=weight)
        whole.end_micro_batch(size=size, loss=loss.detach(), loss_scale=weight)
        for i, group in enumerate(exact):
            found = torch.autograd.grad(loss_of(twin, inputs), group, allow_unused=True)
            dense = [torch.zeros(()) if g is None else g.to_dense() for g in found]
            weighted[i] += size * sum(float(g.square().sum()) for g in dense)
            mean[i] = [m + g * (size / BATCH) for m, g in zip(mean[i], dense, strict=True)]
    reading, total = meter.read(grad_scale=loss_scale), whole.read(grad_scale=loss_scale)
    mean_sqs = [sum(float(m.square().sum()) for m in group) for group in mean]
    assert reading.weighted_sq_sum.tolist() == pytest.approx(weighted.tolist(), rel=1e-12)
    assert reading.mean_grad_sq.tolist() == pytest.approx(mean_sqs, rel=1e-12)
    by_group = [
        moments(w, m) for w, m in zip(reading.weighted_sq_sum.tolist(), reading.mean_grad_sq.tolist(), strict=True)
    ]
    both = np.array(by_group).sum(axis=0)
    assert both.tolist() == pytest.approx(list(moments(total.weighted_sq_sum, total.mean_grad_sq)), rel=1e-12)


def moments(weighted_sq_sum: float, mean_grad_sq: float) -> tuple[float, float]:
    found = moments_from_sums(
        weighted_sq_sum=weighted_sq_sum, mean_grad_sq=mean_grad_sq, batch=BATCH, micro_batches=len(SIZES)
    )
    assert found is not None
    return found


@pytest.mark.parametrize("shape", [(1_000_000,), (2, 500_000), (1000, 1000)])
def test_a_million_equal_numbers_are_summed_to_1e_6(shape: tuple[int, ...]) -> None:
    # One float32 sum over all of them is off by 1e-5.
    parameter = nn.Parameter(torch.zeros(shape))
    meter = GroupMeter({"all": [parameter]})
    meter.begin_step(measure=False)
    parameter.grad = torch.full(shape, 0.1)
    assert meter.read().mean_grad_sq.item() == pytest.approx(float(torch.tensor(0.1)) ** 2 * 1e6, rel=1e-6)


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    parameter = nn.Parameter(torch.ones(300, 300, dtype=torch.bfloat16))
    meter = GroupMeter({"all": [parameter]})
    meter.begin_step(measure=True)
    (parameter.float() * torch.linspace(1, 2, 300)).sum().backward()
    meter.end_micro_batch(size=4, loss_scale=1.0)
    assert parameter.grad is not None
    exact = float(parameter.grad.double().square().sum())
    found = meter.read()
    assert (found.weighted_sq_sum.item(), found.mean_grad_sq.item()) == pytest.approx((4 * exact, exact), rel=1e-6)


def test_layers_are_modules_that_own_parameters_and_share_out_all_of_them() -> None:
    model = Tied()
    outside = nn.Parameter(torch.zeros(2))
    found = layers(model, [*trained(model), outside])
    assert list(found) == ["(model)", "embedding", "block.0", "block.2", "out", "unused", "(not in the model)"]
    assert [p.shape for p in found["out"]] == [(50,)]  # its weight is the embedding's
    assert [id(p) for group in found.values() for p in group] == [id(p) for p in [*trained(model), outside]]


def test_parameter_groups_are_called_by_name_or_number() -> None:
    a, b, c, d = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    d.requires_grad_(False)
    optimizer = torch.optim.SGD(
        [{"params": [a], "name": "head"}, {"params": [b, d]}, {"params": [c], "name": "head"}], lr=0.1
    )
    assert parameter_groups(optimizer) == {"head (0)": [a], "1": [b], "head (2)": [c]}


@given(
    st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=2, max_size=12).filter(
        lambda g: float(np.square(np.sum(g, axis=0)).sum()) > 1e-3
    )
)
def test_n_times_the_gradient_diversity_is_one_plus_the_noise_scale(gradients: list[list[float]]) -> None:
    g = np.array(gradients)
    mean, n = g.mean(axis=0), len(g)
    by_definition = n * float((g**2).sum()) / float((g.sum(axis=0) ** 2).sum())
    noise_scale = float(((g - mean) ** 2).sum()) / n / float(mean @ mean)
    stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=noise_scale)
    assert groups.diversity(stats) == pytest.approx(by_definition, rel=1e-9)
    if noise_scale:
        assert groups.signal_to_noise(stats) == pytest.approx(1 / noise_scale)


def test_what_is_unknown_is_null_and_not_zero() -> None:
    empty = groups.entry(NoiseStats(verdict=Verdict.TOO_NOISY))
    assert {empty[name] for name in NUMBERS} == {None}
    exact = groups.entry(NoiseStats(verdict=Verdict.MEASURED, noise_scale=0.0, low=0.0, high=0.0))
    assert (exact["signal_to_noise"], exact["diversity"]) == (None, 1.0)


def test_a_group_that_is_not_finite_leaves_its_averages_and_no_others() -> None:
    settings = NoiseSettings(half_life_samples=1e6)
    averages: dict[str, noise.NoiseState] = {}
    for step in range(4):
        sums = GroupSums(
            step=step, samples_seen=8 * (step + 1), batch=8, micro_batches=2, lr=0.1,
            weighted_sq_sums=(20.0, 30.0), mean_grad_sqs=(1.0, float("nan") if step == 2 else 2.0),
        )  # fmt: skip
        averages = groups.absorb(averages, sums, settings, names=("a", "b"))
    assert [len(state.blocks) for state in averages.values()] == [4, 3]
    alone = noise.init(settings)
    for step in range(4):
        alone = noise.absorb(alone, sample(8 * (step + 1), 8, 12.0, -0.5, 2), settings)
    assert noise.stats(averages["a"], settings) == noise.stats(alone, settings)
    with pytest.raises(ValueError, match="2 and 2 sums for 1 groups"):
        groups.absorb(averages, sums, settings, names=("a",))


# In a run


def run(place: Path, *, model: nn.Module | None = None, resume: bool = False, **sections: Any) -> list[Tensor]:
    stop_in_step, scaler = sections.pop("stop_in_step", None), sections.pop("grad_scaler", None)
    lr = sections.pop("lr", 0.05)
    model = nn.Sequential(mlp(), nn.Dropout(0.1)) if model is None else model
    base: dict[str, Any] = {
        "train": {"samples": 1280, "max_grad_norm": 0.5},
        "measure": {"groups": "layers"},
        "controller": {"policy": "fixed", "every_samples": 128, "half_life_samples": 512, "confidence": 0.8},
    }
    optimizer = torch.optim.SGD(
        [{"params": [p], "name": "first"} if i == 0 else {"params": [p]} for i, p in enumerate(model.parameters())],
        lr=lr,
        momentum=0.9,
    )
    session = Session(
        config(place, **(base | sections)),
        model=model,
        optimizer=optimizer,
        dataset=blobs(),
        resume=resume,
        grad_scaler=scaler,
    )
    with session:
        for step in session:
            for batch in step:
                session.backward(cross_entropy(session.model, batch))
            if session.step_number == stop_in_step:
                session.request_stop("the test asked")
            session.step()
    return [p.detach().clone() for p in model.parameters()]


def lines(place: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "attempt"} for row in folder.surviving(place / "run" / folder.GROUPS)]


def assert_alike(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], *, rel: float) -> None:
    assert [(row["step"], list(row["groups"])) for row in mine] == [
        (row["step"], list(row["groups"])) for row in theirs
    ]
    for a, b in zip(mine, theirs, strict=True):
        for name in a["groups"]:
            one, other = a["groups"][name], b["groups"][name]
            assert one["verdict"] == other["verdict"]
            for key in NUMBERS:
                assert one[key] == (None if other[key] is None else pytest.approx(other[key], rel=rel)), (name, key)


def test_a_run_writes_a_line_at_each_decision_and_trains_as_without(tmp_path: Path) -> None:
    with_groups = run(tmp_path / "on")
    without = run(tmp_path / "off", measure={"groups": "none"})
    assert all(torch.equal(a, b) for a, b in zip(with_groups, without, strict=True))
    assert not (tmp_path / "off" / "run" / folder.GROUPS).exists()
    found = lines(tmp_path / "on")
    decided = [row for row in folder.rows(tmp_path / "on" / "run" / folder.EVENTS) if row["kind"] == "decision"]
    assert [(row["step"], row["samples_seen"]) for row in found] == [
        (row["step"], row["samples_seen"]) for row in decided
    ]
    assert list(found[-1]["groups"]) == ["0.0", "0.2", "0.4"]
    assert found[-1]["groups"]["0.4"]["noise_scale"] > 0
    assert found[-1]["groups"]["0.4"]["diversity"] == 1 + found[-1]["groups"]["0.4"]["noise_scale"]


def test_the_curves_have_a_point_of_each_group_at_each_decision_that_knows_it(tmp_path: Path) -> None:
    run(tmp_path)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("0.0", "0.2", "0.4"):
        known = [(r["samples_seen"], r["groups"][name]["noise_scale"]) for r in lines(tmp_path)]
        points = [(point.step, point.value) for point in board.Scalars(f"noise_scale/{name}")]
        assert points == [(seen, pytest.approx(value, rel=1e-6)) for seen, value in known if value is not None]


def test_one_group_of_all_parameters_reads_as_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run(tmp_path, model=nn.Linear(20, 4), lr=1e-4)  # slowly, so that there is a signal to the end
    whole = {row["step"]: row for row in folder.surviving(tmp_path / "run" / folder.METRICS)}
    bounded = 0
    for line in lines(tmp_path):
        assert list(line["groups"]) == ["(model)"]
        group, row = line["groups"]["(model)"], whole[line["step"]]
        for key in ("noise_scale", "noise_low", "noise_high"):
            assert group[key] == (None if row[key] is None else pytest.approx(row[key], rel=1e-5))
        bounded += group["noise_high"] is not None
    assert bounded >= 2


def test_parameter_groups_are_those_of_the_optimizer(tmp_path: Path) -> None:
    run(tmp_path, measure={"groups": "parameter_groups"})
    assert list(lines(tmp_path)[-1]["groups"]) == ["first", "1", "2", "3", "4", "5"]


def test_a_gradient_scaler_does_not_reach_the_readings(tmp_path: Path) -> None:
    run(tmp_path / "plain")
    run(tmp_path / "scaled", grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7))
    assert_alike(lines(tmp_path / "scaled"), lines(tmp_path / "plain"), rel=1e-3)


def test_a_run_that_was_stopped_between_decisions_goes_on_with_its_averages(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"measure": {"groups": "layers", "every_steps": 2}}
    run(tmp_path / "whole", **sections)
    run(tmp_path / "stopped", stop_in_step=21, **sections)
    run(tmp_path / "stopped", resume=True, **sections)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_another_estimator_beside_them_leaves_the_groups_as_they_are(tmp_path: Path) -> None:
    run(tmp_path / "micro_batch")
    run(tmp_path / "per_example", measure={"groups": "layers", "estimator": "per_example"})
    assert lines(tmp_path / "per_example") == lines(tmp_path / "micro_batch")


def test_steps_of_one_micro_batch_say_that_they_cannot_be_measured(tmp_path: Path) -> None:
    run(tmp_path, batch={"initial": 8, "micro_batch": 8, "max": 8})
    verdicts = {entry["verdict"] for row in lines(tmp_path) for entry in row["groups"].values()}
    assert verdicts == {Verdict.TOO_FEW_MICRO_BATCHES.value}
