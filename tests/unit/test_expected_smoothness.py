"""The expected-smoothness policy: its formulas by enumeration of all subsets, and its batch on two real problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from sklearn.datasets import load_breast_cancer, load_diabetes

from orchestrator.core.expected_smoothness import ExpectedSmoothness
from orchestrator.core.policies import PolicySettings, build_policy
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.types import NoiseStats, Verdict


def theory(n: int, **changes: float) -> ExpectedSmoothness:
    constants = {"smoothness": 4.0, "max_smoothness": 4.0 * min(n, 12), "strong_convexity": 0.1, "accuracy": 0.02}
    return ExpectedSmoothness(dataset_size=n, **(constants | changes))


def mean_of_squares(vectors: np.ndarray, batch: int) -> float:
    """E|mean over a subset|^2, all subsets of ``batch`` vectors being equally likely."""
    subsets = combinations(range(len(vectors)), batch)
    return float(np.mean([float((vectors[list(s)].mean(axis=0) ** 2).sum()) for s in subsets]))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_the_noise_of_a_batch_is_that_of_all_subsets(n) -> None:
    vectors = np.random.default_rng(n).standard_normal((n, 3)) * np.arange(1, n + 1)[:, None]
    vectors -= vectors.mean(axis=0)  # as at the optimum
    for batch in range(1, n + 1):
        found = theory(n).noise(batch, float((vectors**2).sum(axis=1).mean()))
        assert found == pytest.approx(mean_of_squares(vectors, batch), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 7])
def test_the_expected_smoothness_of_a_batch_bounds_that_of_all_subsets_and_is_reached(n) -> None:
    """Ridge-free least squares, f_i = (x_i w)^2 / 2 with w* = 0, so that grad f_S(w) - grad f_S(w*) is known."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 3)) * rng.uniform(0.2, 3, size=(n, 1))
    smoothness, worst = float(np.linalg.eigvalsh(x.T @ x / n)[-1]), float((x**2).sum(axis=1).max())
    bounds = theory(n, smoothness=smoothness, max_smoothness=worst, strong_convexity=1e-9)
    for batch in range(1, n + 1):
        for w in rng.standard_normal((20, 3)):
            gradients = (x @ w)[:, None] * x
            gap = float(((x @ w) ** 2).mean() / 2)
            assert mean_of_squares(gradients, batch) <= 2 * bounds.expected(batch) * gap * (1 + 1e-9)
    # Equal lengths in one dimension: every inequality of the derivation is an equality.
    alike = theory(n, smoothness=4.0, max_smoothness=4.0)
    for batch in range(1, n + 1):
        assert mean_of_squares(np.full((n, 1), 4.0 * 3.0), batch) == pytest.approx(2 * alike.expected(batch) * 18.0)


@given(
    n=st.integers(2, 400),
    smoothness=st.floats(0.1, 10),
    worst=st.floats(0, 1),
    mean_sq=st.floats(0, 1e3),
    accuracy=st.floats(1e-3, 10),
)
def test_no_batch_of_brute_force_costs_less(n, smoothness, worst, mean_sq, accuracy) -> None:
    most = smoothness * (1 + worst * (n - 1))
    found = theory(n, smoothness=smoothness, max_smoothness=most, accuracy=accuracy)
    batch = found.best_batch(mean_sq)
    assert 1 <= batch <= n
    least = min(found.cost(tau, mean_sq) for tau in range(1, n + 1))
    assert found.cost(batch, mean_sq) <= least * (1 + 1e-9)


@pytest.mark.parametrize(
    "constants",
    [
        {"smoothness": None},
        {"accuracy": 0.0},
        {"strong_convexity": 5.0},
        {"max_smoothness": 3.0},
        {"max_smoothness": 41.0},  # more than 10 functions of a mean smoothness of 4 can have
    ],
)
def test_constants_of_no_loss_are_refused(constants) -> None:
    with pytest.raises(ValueError, match=r"controller\."):
        theory(10, **constants)


def test_without_the_gradients_norm_the_batch_is_kept() -> None:
    inputs = PolicyInputs(
        stats=NoiseStats(verdict=Verdict.MEASURED, noise_scale=100, low=90, high=110), batch=8, samples_seen=0
    )
    policy = build_policy(PolicySettings(name="expected_smoothness", **CONSTANTS))
    decision = policy(inputs)
    assert decision.target_batch == 8
    assert "not measured" in decision.reason


CONSTANTS: dict[str, Any] = {
    "smoothness": 4.0,
    "max_smoothness": 40.0,
    "strong_convexity": 0.1,
    "accuracy": 0.02,
    "dataset_size": 100,
}


# On real data, by SGD in numpy


@dataclass(frozen=True)
class Problem:
    """``gradients(w, i)`` of single samples, with the constants of the mean loss and where its best weights are."""

    gradients: Callable[[np.ndarray, np.ndarray], np.ndarray]
    best: np.ndarray
    n: int
    smoothness: float
    max_smoothness: float
    strong_convexity: float

    def moments(self, w: np.ndarray) -> tuple[float, float]:
        """|G|^2 and tr(Sigma) over all samples."""
        each = self.gradients(w, np.arange(self.n))
        mean = each.mean(axis=0)
        return float(mean @ mean), float(((each - mean) ** 2).sum(axis=1).mean())


PENALTY = 0.1


def standardised(data: Any) -> np.ndarray:
    return (data - data.mean(axis=0)) / data.std(axis=0)


def ridge() -> Problem:
    data = load_diabetes()
    x, y = standardised(data.data), standardised(data.target)
    n, hessian = len(x), x.T @ x / len(x) + PENALTY * np.eye(x.shape[1])
    low, high = np.linalg.eigvalsh(hessian)[[0, -1]]
    return Problem(
        gradients=lambda w, i: (x[i] @ w - y[i])[:, None] * x[i] + PENALTY * w,
        best=np.linalg.solve(hessian, x.T @ y / n),
        n=n,
        smoothness=float(high),
        max_smoothness=float((x**2).sum(axis=1).max()) + PENALTY,
        strong_convexity=float(low),
    )


def logistic() -> Problem:
    data = load_breast_cancer()
    x, y = standardised(data.data), 2.0 * data.target - 1
    n, size = x.shape

    def gradients(w: np.ndarray, i: np.ndarray) -> np.ndarray:
        return (-y[i] / (1 + np.exp(y[i] * (x[i] @ w))))[:, None] * x[i] + PENALTY * w

    w = np.zeros(size)
    for _ in range(30):  # Newton
        p = 1 / (1 + np.exp(y * (x @ w)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x / n + PENALTY * np.eye(size)
        w = w - np.linalg.solve(hessian, gradients(w, np.arange(n)).mean(axis=0))
    return Problem(
        gradients=gradients,
        best=w,
        n=n,
        smoothness=float(np.linalg.eigvalsh(x.T @ x / n)[-1]) / 4 + PENALTY,
        max_smoothness=float((x**2).sum(axis=1).max()) / 4 + PENALTY,
        strong_convexity=PENALTY,
    )


def samples_to_target(problem: Problem, bounds: ExpectedSmoothness, *, batch: int, follow: bool, seed: int) -> int:
    """From zero to the accuracy with the theory's step, on seeded permutations as our stream cuts them.

    A fixed batch is told the gradient noise at the optimum, which no run knows. The policy measures at its own weights,
    every 256 samples, and takes batch and step from there.
    """
    rng, w, used, decided = np.random.default_rng(seed), np.zeros_like(problem.best), 0, -256
    policy = build_policy(
        PolicySettings(
            name="expected_smoothness",
            dataset_size=problem.n,
            ceiling=problem.n,
            deadband=1.1,
            shrink=True,
            smoothness=problem.smoothness,
            max_smoothness=problem.max_smoothness,
            strong_convexity=problem.strong_convexity,
            accuracy=bounds.accuracy,
        )
    )
    mean_sq = sum(problem.moments(problem.best))
    order, position = rng.permutation(problem.n), 0
    accuracy, convexity = bounds.accuracy or 0.0, problem.strong_convexity
    while ((w - problem.best) ** 2).sum() > accuracy:
        if follow and used - decided >= 256:
            grad_sq, trace = problem.moments(w)
            mean_sq, scale, decided = grad_sq + trace, trace / grad_sq, used
            stats = NoiseStats(
                verdict=Verdict.MEASURED, noise_scale=scale, low=scale, high=scale, grad_sq=grad_sq, trace_cov=trace
            )
            batch = policy(PolicyInputs(stats=stats, batch=batch, samples_seen=used)).target_batch
        if position + batch > problem.n:
            order, position = rng.permutation(problem.n), 0
        noise = max(bounds.noise(batch, mean_sq), 1e-300)
        step = min(1 / bounds.expected(batch), accuracy * convexity / (2 * noise)) / 2
        w = w - step * problem.gradients(w, order[position : position + batch]).mean(axis=0)
        position, used = position + batch, used + batch
    return used


@pytest.mark.parametrize(
    ("make", "part", "within"),
    [
        (ridge, 0.1, 1.3),
        (logistic, 0.005, 1.3),
    ],
)
def test_on_real_data_the_policy_needs_hardly_more_samples_than_the_best_fixed_batch(make, part, within) -> None:
    """The target is ``part`` of the squared distance at the start; fixed batches are powers of two, and all samples.

    Found: 1.07 times the best fixed batch on ridge, 1.27 on logistic regression. A coarser target ends before the
    gradients have fallen to those at the optimum, and the policy overrates their noise: 1.7 at 0.02 on the latter.
    """
    problem = make()
    bounds = ExpectedSmoothness(
        smoothness=problem.smoothness,
        max_smoothness=problem.max_smoothness,
        strong_convexity=problem.strong_convexity,
        accuracy=part * float(problem.best @ problem.best),
        dataset_size=problem.n,
    )

    def mean(batch: int, follow: bool) -> float:
        return float(
            np.mean([samples_to_target(problem, bounds, batch=batch, follow=follow, seed=s) for s in range(2)])
        )

    fixed = {batch: mean(batch, False) for batch in (16, 32, 64, 128, 256, problem.n)}
    policy = mean(32, True)
    print(make.__name__, {batch: round(used) for batch, used in fixed.items()}, "policy", round(policy))
    assert policy < within * min(fixed.values())
    assert policy < 0.7 * max(fixed.values()), "the batch matters on this problem"
