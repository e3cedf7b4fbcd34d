"""The Hessian-weighted noise scale: right against closed forms and whole Hessians, and without a trace in the run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import Dataset

from orchestrator.core import curvature
from orchestrator.core.curvature import MICRO_BATCHES, READINGS, CurvatureReading, plan_curvature
from orchestrator.core.noise import moments
from orchestrator.errors import SessionError
from orchestrator.measure.curvature import NotTwiceDifferentiableError, read
from orchestrator.optim import VRSGD
from orchestrator.runtime import folder
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from orchestrator.train import train
from orchestrator.types import Verdict
from tests.support import blobs, config, cross_entropy, mlp

SMALL = 6  # samples in a micro-batch


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.unused = nn.Linear(2, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("signs", [(1, 1, 1, 1), (1, -1, -1, 1), (-1, 1, 1, 1)])
def test_a_reading_is_that_of_the_whole_hessian(signs: tuple[int, ...]) -> None:
    model = Tiny()
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    batches = [(torch.randn(SMALL, 3).double(), torch.randint(2, (SMALL,))) for _ in range(MICRO_BATCHES + 1)]

    def loss(batch: Any, flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in parameters])
        weights = {n: part.view_as(p) for n, part, p in zip(names, parts, parameters, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, batch[0]), batch[1])

    point = torch.cat([p.detach().flatten() for p in parameters])
    g = torch.stack([torch.autograd.functional.jacobian(partial(loss, b), point) for b in batches[:-1]]).numpy()
    hessian = torch.autograd.functional.hessian(partial(loss, batches[-1]), point).numpy()
    mean, n = g.mean(axis=0), MICRO_BATCHES
    u = sum(s * (SMALL / (n - 1)) ** 0.5 * (row - mean) for s, row in zip(signs, g, strict=True))
    trace = float(u @ hessian @ u)
    curved = float(mean @ hessian @ mean) - trace / (n * SMALL)
    trace_cov = SMALL * float(((g - mean) ** 2).sum()) / (n - 1)
    losses = [partial(cross_entropy, model, batch) for batch in batches]
    found = read(losses[:-1], losses[-1], parameters, signs=signs, micro_batch=SMALL)
    assert found.trace_hessian_cov == pytest.approx(trace, rel=1e-10)
    assert found.grad_hessian_grad == pytest.approx(curved, rel=1e-10)
    assert found.grad_sq == pytest.approx(float(mean @ mean) - trace_cov / (n * SMALL), rel=1e-10)
    assert all(p.grad is None for p in parameters)


def test_over_all_signs_readings_average_to_those_of_all_pairs_of_micro_batches() -> None:
    """G' H G from g_i' H g_j of different micro-batches, tr(H Sigma) from (b / 2) (g_i - g_j)' H (g_i - g_j); an
    indefinite H included. The weighted sample moments of ``noise.moments`` with v' H v for |v|^2 are the same."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    matrix, weight = root + root.T, nn.Parameter(torch.zeros(6, dtype=torch.float64))
    assert torch.linalg.eigvalsh(matrix)[0] < 0
    gradients = list(torch.randn(MICRO_BATCHES, 6, dtype=torch.float64, generator=generator))
    losses = [partial(torch.dot, gradient, weight) for gradient in gradients]
    found = [
        read(losses, lambda: 0.5 * weight @ matrix @ weight, [weight], signs=signs, micro_batch=8)
        for signs in product((1, -1), repeat=MICRO_BATCHES)
    ]
    pairs = list(combinations(gradients, 2))
    curved = np.mean([float(g @ matrix @ h) for g, h in pairs])
    trace = np.mean([4 * float((g - h) @ matrix @ (g - h)) for g, h in pairs])
    assert np.mean([reading.grad_hessian_grad for reading in found]) == pytest.approx(curved, rel=1e-12)
    assert np.mean([reading.trace_hessian_cov for reading in found]) == pytest.approx(trace, rel=1e-12)
    mean = torch.stack(gradients).mean(dim=0)
    weighted = moments([8] * MICRO_BATCHES, [float(g @ matrix @ g) for g in gradients], float(mean @ matrix @ mean))
    assert weighted == pytest.approx((curved, trace), rel=1e-12)


def test_parameters_that_the_curvature_does_not_reach_count_as_zero() -> None:
    """Gradients c_j in every direction with c = 1, 2, 3, 6 and H = 2 in two directions of the six: u is -6 there."""
    bent, straight, unused = parameters = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]

    def slope(c: float) -> Tensor:
        return c * (bent + straight + unused).sum()

    losses = [partial(slope, c) for c in (1.0, 2.0, 3.0, 6.0)]
    found = read(losses, lambda: bent.square().sum() + straight.sum(), parameters, signs=(1, 1, 1, -1), micro_batch=3)
    assert found.trace_hessian_cov == pytest.approx(2 * 2 * 36, rel=1e-12)
    assert found.grad_hessian_grad == pytest.approx(2 * 2 * 3**2 - 144 / 12, rel=1e-12)


@dataclass(frozen=True)
class Regression:
    """Linear: x ~ N(0, A), A diagonal, y = label noise of deviation sigma, at the distance e from the best weights.

    With q = e' A e + sigma^2, G = A e, H = A and Sigma = q A + A e e' A, so B_noise = 1 + q tr(A^2) / (e' A^3 e).
    """

    spectrum: tuple[float, ...]
    error: tuple[float, ...]
    sigma: float

    @property
    def truth(self) -> dict[str, float]:
        a, e = np.array(self.spectrum), np.array(self.error)
        q, curved = a @ e**2 + self.sigma**2, a**3 @ e**2
        return {"trace_hessian_cov": q * (a @ a) + curved, "grad_hessian_grad": curved, "grad_sq": a**2 @ e**2}

    @property
    def noise_scale(self) -> float:
        return self.truth["trace_hessian_cov"] / self.truth["grad_hessian_grad"]

    def batch(self, generator: torch.Generator) -> Any:
        x = torch.randn(SMALL, len(self.spectrum), generator=generator, dtype=torch.float64)
        noise = self.sigma * torch.randn(SMALL, generator=generator, dtype=torch.float64)
        return torch.tensor(self.spectrum, dtype=torch.float64).sqrt() * x, noise


STRETCHED = Regression(spectrum=(4.0, 1.0, 0.5, 0.25), error=(0.2, 0.6, -0.8, 0.5), sigma=0.7)
ROUND = Regression(spectrum=(1.0,) * 10, error=(10**-0.5,) * 10, sigma=1.0)


def squared_error(weight: nn.Parameter, batch: Any) -> Tensor:
    x, y = batch
    return 0.5 * (x @ weight - y).square().mean()


@pytest.fixture(scope="module", params=[STRETCHED, ROUND], ids=["stretched", "round"])
def measured(request: pytest.FixtureRequest) -> tuple[Regression, list[CurvatureReading]]:
    problem: Regression = request.param
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.tensor(problem.error, dtype=torch.float64))
    found = []
    for _ in range(50 * READINGS):
        losses = [partial(squared_error, weight, problem.batch(generator)) for _ in range(MICRO_BATCHES + 1)]
        signs = (1 - 2 * torch.randint(2, (MICRO_BATCHES,), generator=generator)).tolist()
        found.append(read(losses[:-1], losses[-1], [weight], signs=signs, micro_batch=SMALL))
    return problem, found


@pytest.mark.parametrize("name", STRETCHED.truth)
def test_readings_of_a_linear_regression_are_unbiased(
    measured: tuple[Regression, list[CurvatureReading]], name: str
) -> None:
    problem, readings = measured
    values = np.array([getattr(reading, name) for reading in readings])
    # Four standard errors: one false alarm in 15,000 seeds.
    assert abs(values.mean() - problem.truth[name]) < 4 * values.std(ddof=1) / len(values) ** 0.5


def test_their_ratio_is_the_closed_form_and_intervals_cover_it(
    measured: tuple[Regression, list[CurvatureReading]],
) -> None:
    problem, readings = measured
    whole = curvature.stats(readings, confidence=0.95)
    assert whole.noise_scale is not None
    assert whole.epsilon_max is not None
    x, y = (np.array([getattr(r, name) for r in readings]) for name in ("trace_hessian_cov", "grad_hessian_grad"))
    error = (x - whole.noise_scale * y).std(ddof=1) / y.mean() / len(x) ** 0.5  # of the ratio, by the delta method
    assert abs(whole.noise_scale - problem.noise_scale) < 4 * error
    assert whole.noise_scale == pytest.approx(problem.noise_scale, rel=0.1)
    assert whole.epsilon_max == pytest.approx(problem.truth["grad_sq"] / problem.truth["grad_hessian_grad"], rel=0.1)
    covered = 0
    for first in range(0, len(readings), READINGS):
        found = curvature.stats(readings[first : first + READINGS], confidence=0.95)
        low, high = found.low or 0.0, np.inf if found.high is None else found.high
        covered += low <= problem.noise_scale <= high
    # 50 intervals at 95 %: fewer than 41 once in 5,000 seeds.
    assert covered >= 41


def test_the_round_regression_has_the_noise_scale_that_its_dimension_gives() -> None:
    """A = I: 1 + d + d sigma^2 / |e|^2, which is 21 at d = 10 and sigma = |e| = 1."""
    assert ROUND.noise_scale == pytest.approx(21.0)


def test_curvature_that_is_not_positive_has_no_noise_scale() -> None:
    rng = np.random.default_rng(0)
    saddle = [
        CurvatureReading(trace_hessian_cov=5 + a, grad_hessian_grad=-1 + 0.1 * b, grad_sq=1.0)
        for a, b in rng.standard_normal((READINGS, 2)).tolist()
    ]
    found = curvature.stats(saddle, confidence=0.95)
    assert (found.noise_scale, found.high, found.epsilon_max, found.verdict) == (None, None, None, Verdict.TOO_NOISY)
    broken = CurvatureReading(trace_hessian_cov=float("nan"), grad_hessian_grad=1.0, grad_sq=1.0)
    assert curvature.stats([broken], confidence=0.95).readings == 0
    assert curvature.stats([*saddle, broken], confidence=0.95) == found


@given(st.integers(5, 400), st.integers(1, 64), st.integers(0, 200))
def test_a_reading_takes_different_samples_of_one_epoch_and_the_next_reading_others(
    size: int, micro_batch: int, number: int
) -> None:
    plan = plan_curvature(size, micro_batch=micro_batch)
    spans = [[first + i for first in plan.firsts(n) for i in range(plan.micro_batch)] for n in (number, number + 1)]
    for span in spans:
        assert len(set(span)) == len(span) == plan.samples
        assert span[0] // size == span[-1] // size
    assert spans[0][-1] < spans[1][0]


# In a run


class Drawn(Dataset[Any]):
    """Points with noise from torch's and numpy's global generators; remembers which indices were read."""

    def __init__(self) -> None:
        self.blobs = blobs()
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.blobs)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        x, y = self.blobs[index]
        return x + 0.1 * torch.randn(20) + 0.01 * float(np.random.standard_normal()), y


def model_with_state() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4))


def run(
    place: Path, model: nn.Module, *, every: int | None = 128, resume: bool = False, **sections: Any
) -> dict[str, Any]:
    torch.manual_seed(11)
    np.random.seed(11)
    dataset, stop_in_step = Drawn(), sections.pop("stop_in_step", None)
    base: dict[str, Any] = {
        "train": {"samples": 320},
        "measure": {"curvature_every_samples": every, "groups": "layers"},
        "data": {"seed_each_sample": False},
        "ledger": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    asked = []

    def loss_of(module: nn.Module, batch: Any) -> Tensor:
        # A meter's hook would keep every gradient with its graph.
        assert not any(p._backward_hooks for p in module.parameters())
        return cross_entropy(module, batch)

    session = Session(
        config(place, **(base | sections)), model=model, optimizer=optimizer, dataset=dataset, resume=resume
    )
    with session:
        for step in session:
            for batch in step:
                session.backward(cross_entropy(session.model, batch))
            if session.step_number == stop_in_step:
                session.request_stop("the test asked")
            session.step()
            if session.curvature_due:
                del dataset.read[:]
                asked.append((session.step_number, session.measure_curvature(loss_of), list(dataset.read)))
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.standard_normal(),
        "lines": [[row[k] for k in ("step", "loss", "grad_sq", "trace_cov")] for row in rows(place, folder.METRICS)],
        "ledger": rows(place, folder.LEDGER),
        "groups": rows(place, folder.GROUPS),
        "asked": asked,
    }


def rows(place: Path, name: str, *kinds: str) -> list[dict[str, Any]]:
    found = [{k: v for k, v in row.items() if k != "attempt"} for row in folder.rows(place / "run" / name)]
    return [row for row in found if not kinds or row["kind"] in kinds]


def assert_trained_alike(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine["state"].keys() == theirs["state"].keys()
    assert all(torch.equal(mine["state"][name], theirs["state"][name]) for name in mine["state"])
    assert torch.equal(mine["torch"], theirs["torch"])
    for key in ("numpy", "lines", "ledger", "groups"):
        assert mine[key] == theirs[key], key


def test_a_run_is_the_same_to_the_last_bit_with_and_without(tmp_path: Path) -> None:
    on = run(tmp_path / "on", model_with_state())
    assert_trained_alike(on, run(tmp_path / "off", model_with_state(), every=None))
    assert [step for step, *_ in on["asked"]] == [4, 8]
    measured = rows(tmp_path / "on", folder.EVENTS, "curvature")
    assert [(row["step"], row["samples_seen"]) for row in measured] == [(3, 128), (7, 256)]
    for row, (_, found, _) in zip(measured, on["asked"], strict=True):
        assert found is not None
        assert (row["hessian_noise_scale"], row["hessian_noise_low"]) == (found.noise_scale, found.low)
        assert (row["epsilon_max"], row["verdict"]) == (found.epsilon_max, found.verdict.value)
        assert row["trace_hessian_cov"] > 0
        assert row["readings"] == READINGS
    assert on["asked"][0][2] != on["asked"][1][2]  # other samples each time
    assert not rows(tmp_path / "off", folder.EVENTS, "curvature")


def test_a_meter_that_watches_the_layers_does_not_see_it(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"estimator": "per_example", "groups": "layers"}
    on = run(tmp_path / "on", mlp(), measure=sections | {"curvature_every_samples": 128})
    assert_trained_alike(on, run(tmp_path / "off", mlp(), measure=sections))
    assert len(rows(tmp_path / "on", folder.EVENTS, "curvature")) == 2


def test_gradients_and_hessian_of_a_reading_come_from_different_samples(tmp_path: Path) -> None:
    taken = run(tmp_path, model_with_state())["asked"][0][2]
    each = (MICRO_BATCHES + 1) * 8
    assert len(taken) == READINGS * each
    for first in range(0, len(taken), each):
        assert len(set(taken[first : first + each])) == each


def test_a_resumed_run_measures_what_it_would_have_measured(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    sections: dict[str, Any] = {"data": {"seed_each_sample": True}}
    run(whole, model_with_state(), **sections)
    run(stopped, model_with_state(), stop_in_step=5, **sections)
    run(stopped, model_with_state(), resume=True, **sections)
    keys = ("step", "hessian_noise_scale", "hessian_noise_low", "epsilon_max", "grad_sq")
    found = [
        [[row[key] for key in keys] for row in rows(place, folder.EVENTS, "curvature")] for place in (whole, stopped)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("estimator", "sections", "fits", "expected"),
    [
        ("micro_batch", {}, 8, 8),
        ("micro_batch", {}, 2, 2),  # memory runs out in the first step, and it is cut to what fits
        ("split", {"batch": {"initial": 8, "micro_batch": 8, "max": 8}}, 8, 4),
        ("micro_batch", {"optimizer": {"name": "vr_sgd", "lr": 0.05, "momentum": 0.9, "part_samples": 4}}, 4, 4),
    ],
    ids=["as configured", "after memory ran out", "split", "parts"],
)
def test_it_takes_the_micro_batches_that_training_takes(
    tmp_path: Path, estimator: str, sections: dict[str, Any], fits: int, expected: int
) -> None:
    model, sizes = mlp(), []

    def limited(module: nn.Module, batch: Any) -> Tensor:
        if len(batch[1]) > fits:
            raise torch.OutOfMemoryError("planted")
        sizes.append(len(batch[1]))
        return cross_entropy(module, batch)

    settings = config(tmp_path, measure={"curvature_every_samples": 64, "estimator": estimator}, **sections)
    optimizer_class = VRSGD if "optimizer" in sections else torch.optim.SGD
    with Session(
        settings, model=model, optimizer=optimizer_class(model.parameters(), lr=0.05), dataset=blobs()
    ) as session:
        for step in session:
            for batch in step:
                session.backward(lambda batch=batch: limited(session.model, batch))
            session.step()
            if session.curvature_due:
                del sizes[:]
                assert session.measure_curvature(limited) is not None
                assert set(sizes) == {expected}
                break
    (event,) = rows(tmp_path, folder.EVENTS, "curvature")
    assert event["samples"] == READINGS * (MICRO_BATCHES + 1) * expected


@pytest.mark.parametrize("every", [None, 128])
def test_calls_at_any_place_read_other_samples_and_the_same_after_a_resume(tmp_path: Path, every: int | None) -> None:
    def asked(place: Path, *, resume: bool, stop_in_step: int | None = None) -> list[tuple[int, list[int]]]:
        model, dataset, found = mlp(), Drawn(), []
        settings = config(
            place, train={"samples": 160}, measure={"curvature_every_samples": every}, data={"seed_each_sample": True}
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Session(settings, model=model, optimizer=optimizer, dataset=dataset, resume=resume) as session:
            for step in session:
                for batch in step:
                    session.backward(cross_entropy(session.model, batch))
                if session.step_number == stop_in_step:
                    session.request_stop("the test asked")
                session.step()
                for _ in range(2):
                    del dataset.read[:]
                    session.measure_curvature(cross_entropy)
                    found.append((session.step_number, list(dataset.read)))
        return found

    whole = asked(tmp_path / "whole", resume=False)
    assert [step for step, _ in whole] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len({tuple(read) for _, read in whole}) == 10
    parts = asked(tmp_path / "parts", resume=False, stop_in_step=1) + asked(tmp_path / "parts", resume=True)
    assert parts == whole


def test_a_call_within_a_step_is_refused_and_the_step_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def trained(place: Path, *, asks: bool) -> tuple[list[Any], list[Any]]:
        model = mlp()
        settings = config(place, train={"samples": 160}, measure={"groups": "layers"})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
            for step in session:
                for batch in step:
                    session.backward(cross_entropy(session.model, batch))
                    if asks:
                        with pytest.raises(SessionError, match=r"within step \d.*call it after session\.step\(\)"):
                            session.measure_curvature(cross_entropy)
                session.step()
        return rows(place, folder.GROUPS), [
            [row[k] for k in ("step", "loss", "grad_sq", "trace_cov")] for row in rows(place, folder.METRICS)
        ]

    assert trained(tmp_path / "on", asks=True) == trained(tmp_path / "off", asks=False)


def test_it_may_be_asked_for_before_the_first_step_and_where_a_step_is_to_be_taken_again(tmp_path: Path) -> None:
    model, again = mlp(), []

    def limited(module: nn.Module, batch: Any) -> Tensor:
        if len(batch[1]) > 4:
            raise torch.OutOfMemoryError("planted")
        return cross_entropy(module, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Session(config(tmp_path, train={"samples": 64}), model=model, optimizer=optimizer, dataset=blobs()) as session:
        assert session.measure_curvature(cross_entropy) is not None
        for step in session:
            for batch in step:
                session.backward(lambda batch=batch: limited(session.model, batch))
            session.step()
            again.append(session.step_number)
            assert session.measure_curvature(limited) is not None
    assert again == [0, 1, 2]  # memory ran out in the first


class Once(torch.autograd.Function):
    """A square that says it can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class SquaredOnce(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_a_loss_that_cannot_be_differentiated_twice_is_refused_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def model() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(20, 16), SquaredOnce(), nn.Linear(16, 4))

    with caplog.at_level(logging.WARNING, logger="orchestrator"):
        on = run(tmp_path / "on", model())
    assert_trained_alike(on, run(tmp_path / "off", model(), every=None))
    assert [found for _, found, _ in on["asked"]] == [None]
    (event,) = rows(tmp_path / "on", folder.EVENTS, "curvature_refused")
    assert "once_differentiable" in event["reason"]
    assert event["samples_seen"] == 128
    assert [record.getMessage() for record in caplog.records].count(event["reason"]) == 1


def test_out_of_memory_refuses_and_other_errors_of_the_loss_are_the_users(tmp_path: Path) -> None:
    model = model_with_state()
    with Session(
        config(tmp_path, measure={"curvature_every_samples": 32}),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        dataset=blobs(),
    ) as session:
        step = next(iter(session))
        for batch in step:
            session.backward(cross_entropy(session.model, batch))
        session.step()

        def broken(module: nn.Module, batch: Any) -> Tensor:
            raise ValueError("of the user")

        def large(module: nn.Module, batch: Any) -> Tensor:
            raise torch.OutOfMemoryError("too large")

        assert session.curvature_due
        with pytest.raises(ValueError, match="of the user"):
            session.measure_curvature(broken)
        assert session.curvature_due
        assert session.measure_curvature(large) is None
        assert not session.curvature_due
    (event,) = rows(tmp_path, folder.EVENTS, "curvature_refused")
    assert "ran out of memory" in event["reason"]


def test_a_loss_that_is_not_curved_reads_zero_and_is_not_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    losses = [partial(torch.dot, weight, torch.randn(3)) for _ in range(MICRO_BATCHES + 1)]
    found = read(losses[:-1], losses[-1], [weight], signs=(1, -1, 1, 1), micro_batch=1)
    assert (found.trace_hessian_cov, found.grad_hessian_grad) == (0.0, 0.0)
    flat = curvature.stats([found] * READINGS, confidence=0.95)
    assert (flat.noise_scale, flat.verdict) == (None, Verdict.TOO_NOISY)


@pytest.mark.parametrize(
    "loss", [lambda w: (Once.apply(w * w) * w).sum(), lambda w: Once.apply(w * w).sum()], ids=["inside", "at the end"]
)
def test_a_part_that_cannot_be_differentiated_twice_is_found_wherever_it_stands(loss: Any) -> None:
    weight = nn.Parameter(torch.ones(3))
    losses = [partial(torch.dot, weight, torch.ones(3)) for _ in range(MICRO_BATCHES)]
    with pytest.raises(NotTwiceDifferentiableError, match="once_differentiable"):
        read(losses, partial(loss, weight), [weight], signs=(1, 1, 1, 1), micro_batch=1)


def test_a_data_set_too_small_for_a_reading_is_refused() -> None:
    assert plan_curvature(5, micro_batch=8).micro_batch == 1
    with pytest.raises(ValueError, match="the data set has 4"):
        plan_curvature(4, micro_batch=8)


def test_the_built_in_language_model_is_measured_by_the_built_in_loop(tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        task={"name": "char_lm", "options": {"depth": 1, "width": 16, "heads": 2, "context": 16}},
        train={"samples": 64},
        batch={"initial": 32, "micro_batch": 4, "max": 32},
        measure={"curvature_every_samples": 64},
    )
    assert train(settings, local_worker(settings), resume=False)
    (event,) = rows(tmp_path, folder.EVENTS, "curvature")
    assert event["trace_hessian_cov"] > 0
    assert event["readings"] == READINGS
