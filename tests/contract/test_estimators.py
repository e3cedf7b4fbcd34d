"""What every registered way to measure promises, whatever it is called."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from orchestrator.config.batch_size import ESTIMATORS as NAMES, MeasureSection
from orchestrator.core.noise import moments_from_sums
from orchestrator.core.planner import make_plan
from orchestrator.measure.estimators import ESTIMATORS, find_estimator
from orchestrator.measure.meter import CalibratedMeter, Estimator, Meter
from orchestrator.types import BatchPlan
from tests.contract.plugins import PLUGINS

MICRO, DIM, LABEL_NOISE = 4, 5, 1.0
BATCH = 14  # the last micro-batch is smaller
Samples = tuple[Tensor, Tensor]


AFTER = " after calibration"
CALIBRATED = [name for name in NAMES if MeasureSection(estimator=name).calibration_samples is not None]
METERS = [*NAMES, *PLUGINS["estimator"], *(name + AFTER for name in CALIBRATED)]


def estimator(name: str) -> Estimator:
    return find_estimator(name.removesuffix(AFTER))


def meter(name: str, model: nn.Module) -> Meter:
    settings = MeasureSection.model_validate({"estimator": name.removesuffix(AFTER)})
    found = estimator(name).build(model, list(model.parameters()), settings)
    assert isinstance(found, CalibratedMeter) is (settings.calibration_samples is not None)
    if isinstance(found, CalibratedMeter) and name.endswith(AFTER):
        found.go_on_with("part")
    return found


def plan(name: str, batch: int) -> BatchPlan:
    """As a run that advises cuts it."""
    halves = estimator(name).halves
    micro_batch = MICRO // 2 if halves else MICRO
    return make_plan(batch, world_size=1, micro_batch=micro_batch, generation=0, measurable=halves)


def mean_squares(model: nn.Module, samples: Samples) -> Tensor:
    inputs, labels = samples
    return 0.5 * (model(inputs).squeeze(1) - labels).square().mean()


def step(
    name: str, found: Meter, model: nn.Module, samples: Samples, *, factor: float = 1.0, measure: bool = True
) -> tuple[float, float] | None:
    """(|G|^2, tr(Sigma)) as one step of ``samples`` reads them; the gradient stays in ``.grad``."""
    cut = plan(name, len(samples[0]))
    found.begin_step(measure=measure)
    for offset, size in cut.spans(0):
        loss = factor * mean_squares(model, (samples[0][offset : offset + size], samples[1][offset : offset + size]))
        weight = size / cut.batch
        (loss * weight).backward()
        found.end_micro_batch(size=size, loss=loss.detach(), loss_scale=weight)
    reading = found.read()
    return moments_from_sums(
        weighted_sq_sum=reading.weighted_sq_sum,
        mean_grad_sq=reading.mean_grad_sq,
        batch=cut.batch,
        micro_batches=estimator(name).parts(cut),
    )


def regression(*, at_distance: float = 1.0) -> nn.Module:
    linear = nn.Linear(DIM, 1, bias=False).double()
    nn.init.constant_(linear.weight, at_distance / math.sqrt(DIM))
    return linear


def normalised_regression() -> nn.Module:
    """The same with inputs of one length: the weights are the gains of an RMSNorm, and the rest only sums."""
    norm, rest = nn.RMSNorm(DIM, eps=0.0), nn.Linear(DIM, 1, bias=False)
    nn.init.constant_(norm.weight, 1 / math.sqrt(DIM))
    nn.init.ones_(rest.weight)
    return nn.Sequential(norm, rest.requires_grad_(False)).double()


def draw(samples: int, generator: torch.Generator) -> Samples:
    """x ~ N(0, I) with labels of nothing but noise: the best weights are zero."""
    inputs = torch.randn(samples, DIM, generator=generator).double()
    return inputs, LABEL_NOISE * torch.randn(samples, generator=generator).double()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(DIM, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()


def test_the_config_knows_the_estimators_that_there_are() -> None:
    assert tuple(ESTIMATORS) == NAMES


# Theory F1 with A = I and |e| = 1: |G|^2 = 1, tr(Sigma) = 1 + q DIM with q = 1 + LABEL_NOISE^2. Where |x|^2 is DIM for
# each x, the mean of |g|^2 is q DIM, and tr(Sigma) = q DIM - 1.
NOISE = DIM * (1.0 + LABEL_NOISE**2)
REGRESSIONS = [(name, regression, 1.0 + NOISE) for name in (*NAMES, *PLUGINS["estimator"]) if name not in CALIBRATED]
REGRESSIONS += [(name, normalised_regression, NOISE - 1.0) for name in METERS]


@pytest.mark.parametrize(("name", "build", "trace_cov"), REGRESSIONS)
def test_readings_are_unbiased_on_a_regression_of_known_noise(
    name: str, build: Callable[[], nn.Module], trace_cov: float
) -> None:
    model, generator = build(), torch.Generator().manual_seed(5)
    found, read = meter(name, model), []
    for _ in range(800):
        read.append(step(name, found, model, draw(BATCH, generator)))
        model.zero_grad()
    values = torch.tensor(read).double()
    errors = values.std(0) / math.sqrt(len(values))
    truth = torch.tensor([1.0, trace_cov]).double()
    assert ((values.mean(0) - truth).abs() < 4 * errors).all(), (values.mean(0), errors)  # one false alarm in 8,000
    assert (errors < 0.1 * truth + 0.05).all()  # else the line above says nothing


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
@pytest.mark.parametrize("name", METERS)
def test_both_moments_are_multiplied_by_the_square_of_what_multiplies_the_loss(name: str, factor: float) -> None:
    model, samples = net(), draw(BATCH, torch.Generator().manual_seed(1))
    found = meter(name, model)
    plain = step(name, found, model, samples)
    model.zero_grad()
    scaled = step(name, found, model, samples, factor=factor)
    assert plain is not None
    assert scaled == pytest.approx([factor**2 * moment for moment in plain], rel=1e-9)


@pytest.mark.parametrize("name", METERS)
def test_the_gradient_is_bit_identical_with_and_without(name: str) -> None:
    samples = draw(BATCH, torch.Generator().manual_seed(1))
    gradients = []
    for measure in (True, True, False):  # the first measured step of a meter may look closer
        model = net()
        found = meter(name, model)
        step(name, found, model, samples, measure=measure)
        model.zero_grad()
        step(name, found, model, samples, measure=measure)
        found.close()
        gradients.append([p.grad for p in model.parameters()])
    model = net()
    for offset, size in plan(name, BATCH).spans(0):
        loss = mean_squares(model, (samples[0][offset : offset + size], samples[1][offset : offset + size]))
        (loss * (size / BATCH)).backward()
    for measured in gradients:
        for mine, plain in zip(measured, model.parameters(), strict=True):
            assert mine is not None
            assert torch.equal(mine, plain.grad)


@pytest.mark.parametrize("name", METERS)
def test_a_step_that_is_not_measured_has_no_hooks_and_leaves_none(name: str) -> None:
    model, samples = net(), draw(BATCH, torch.Generator().manual_seed(1))
    found = meter(name, model)
    assert hooks(model) == 0
    for measure in (False, True, False, True):
        found.begin_step(measure=measure)
        assert (hooks(model) > 0) is measure
        step(name, found, model, samples, measure=measure)
        assert found.is_finite()
        model.zero_grad()
    found.close()
    assert hooks(model) == 0


def hooks(model: nn.Module) -> int:
    tables = [[m._forward_hooks, m._forward_pre_hooks, m._backward_hooks] for m in model.modules()]
    of_parameters = [p._backward_hooks or () for p in model.parameters()]
    return sum(len(table) for each in tables for table in each) + sum(map(len, of_parameters))


@pytest.mark.parametrize("name", METERS)
def test_nothing_is_left_of_a_step_that_was_given_up(name: str) -> None:
    model, samples = net(), draw(BATCH, torch.Generator().manual_seed(1))
    found = meter(name, model)
    whole = step(name, found, model, samples)
    found.begin_step(measure=True)
    mean_squares(model, samples).backward()  # memory ran out before the micro-batch was taken in
    model.zero_grad()
    assert step(name, found, model, samples) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", METERS)
def test_equal_samples_have_no_noise(name: str) -> None:
    one = draw(1, torch.Generator().manual_seed(1))
    samples = (one[0].expand(BATCH, DIM), one[1].expand(BATCH))
    model = net()
    found = meter(name, model)
    for _ in range(2):
        reading = step(name, found, model, samples)
        assert reading is not None
        grad_sq, trace_cov = reading
        assert trace_cov == pytest.approx(0, abs=1e-12 * grad_sq)
        model.zero_grad()


@pytest.mark.parametrize("name", METERS)
def test_the_noise_of_a_step_is_never_negative(name: str) -> None:
    model, generator = net(), torch.Generator().manual_seed(2)
    found = meter(name, model)
    for _ in range(50):
        reading = step(name, found, model, draw(BATCH, generator))
        assert reading is not None
        assert reading[1] >= 0
        model.zero_grad()


@pytest.mark.parametrize("name", METERS)
def test_a_step_of_one_sample_gives_no_reading(name: str) -> None:
    model = net()
    assert estimator(name).parts(plan(name, 1)) == 1
    assert step(name, meter(name, model), model, draw(1, torch.Generator().manual_seed(2))) is None


@pytest.mark.parametrize("name", METERS)
def test_losses_are_those_of_the_micro_batches_and_a_step_without_any_reads_as_nothing(name: str) -> None:
    model, samples = net(), draw(BATCH, torch.Generator().manual_seed(1))
    found = meter(name, model)
    found.begin_step(measure=True)
    nothing = found.read()
    assert (nothing.weighted_sq_sum, nothing.mean_grad_sq, nothing.losses) == (0.0, 0.0, ())
    assert nothing.grad_is_finite
    step(name, found, model, samples)
    losses = [
        float(mean_squares(model, (samples[0][first : first + size], samples[1][first : first + size])).detach())
        for first, size in plan(name, BATCH).spans(0)
    ]
    assert found.read().losses == pytest.approx(losses, rel=1e-12)
