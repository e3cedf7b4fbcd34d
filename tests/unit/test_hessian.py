"""Hessian-weighted moments against closed forms: quadratics, the linear regression of theory F1, and brute force."""

from __future__ import annotations

from itertools import product as choices

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.core.noise import moments
from orchestrator.measure.hessian import hessian_moments, hessian_product

EXACT = torch.float64


def dense(matrix: Tensor):
    """The product with a known matrix, on vectors of one tensor."""
    return lambda vector: [matrix @ vector[0]]


def symmetric(dim: int, seed: int) -> Tensor:
    matrix = torch.randn(dim, dim, dtype=EXACT, generator=torch.Generator().manual_seed(seed))
    return matrix + matrix.T


@pytest.mark.parametrize("sizes", [[4, 4], [1, 2, 3, 16], [8] * 5])
def test_over_all_signs_they_are_the_weighted_sample_moments(sizes: list[int]) -> None:
    """(sum b_i g_i'Hg_i - N g'Hg) / (n - 1) and g'Hg - that / N, an indefinite H included."""
    generator = torch.Generator().manual_seed(len(sizes))
    matrix, batch = symmetric(6, seed=3), sum(sizes)
    gradients = [[torch.randn(6, dtype=EXACT, generator=generator)] for _ in sizes]
    mean = sum(b * g for b, (g,) in zip(sizes, gradients, strict=True)) / batch
    expected = moments(sizes, [float(g @ matrix @ g) for (g,) in gradients], float(mean @ matrix @ mean))
    found = [
        hessian_moments(gradients, sizes=sizes, signs=signs, product=dense(matrix))
        for signs in choices((1, -1), repeat=len(sizes))
    ]
    assert np.mean(found, axis=0) == pytest.approx(expected, rel=1e-12)


def test_two_equal_halves_give_the_pair_formulas() -> None:
    """G'HG from g1'Hg2, and tr(H Sigma) from (b / 2) (g1 - g2)'H (g1 - g2), on average over the signs."""
    matrix, generator = symmetric(5, seed=1), torch.Generator().manual_seed(2)
    one, two = (torch.randn(5, dtype=EXACT, generator=generator) for _ in range(2))
    found = [
        hessian_moments([[one], [two]], sizes=[8, 8], signs=signs, product=dense(matrix))
        for signs in choices((1, -1), repeat=2)
    ]
    difference = one - two
    expected = float(one @ matrix @ two), 4 * float(difference @ matrix @ difference)
    assert np.mean(found, axis=0) == pytest.approx(expected, rel=1e-12)


def test_the_product_is_that_of_the_full_hessian_across_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(EXACT)
    inputs, labels = torch.randn(7, 3, dtype=EXACT), torch.randint(2, (7,))
    parameters = list(model.parameters())
    shapes = [p.shape for p in parameters]

    def loss_at(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for (name, _), part, shape in zip(
            model.named_parameters(), parts, shapes, strict=True)}  # fmt: skip
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (inputs,)), labels)

    flat = torch.cat([p.detach().flatten() for p in parameters])
    matrix = torch.autograd.functional.hessian(loss_at, flat)
    times = hessian_product(nn.functional.cross_entropy(model(inputs), labels), parameters)
    for seed in range(3):  # one graph serves many vectors
        vector = torch.randn(len(flat), dtype=EXACT, generator=torch.Generator().manual_seed(seed))
        parts = [
            part.view(shape) for part, shape in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        found = torch.cat([part.flatten() for part in times(parts)])
        torch.testing.assert_close(found, matrix @ vector, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in parameters)


def test_parameters_that_the_curvature_does_not_reach_count_as_zero() -> None:
    used, linear, unused = (torch.ones(2, dtype=EXACT, requires_grad=True) for _ in range(3))
    times = hessian_product((used**2).sum() + linear.sum(), [used, linear, unused])
    vector = [torch.full((2,), 3.0, dtype=EXACT) for _ in range(3)]
    assert [part.tolist() for part in times(vector)] == [[6.0, 6.0], [0.0, 0.0], [0.0, 0.0]]
    straight = hessian_product(linear.sum(), [linear])
    assert straight(vector[:1])[0].tolist() == [0.0, 0.0]


def regression_steps(
    rng: np.random.Generator, spectrum: np.ndarray, error: np.ndarray, sigma: float, *, sizes: list[int], held: int
) -> tuple[float, float]:
    """One step's reading on x ~ N(0, diag(spectrum)), y = x.w* + sigma z at w* + error; H from ``held`` others."""
    dim = len(error)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = rng.standard_normal((count, dim)) * np.sqrt(spectrum)
        return torch.from_numpy(x), torch.from_numpy(sigma * rng.standard_normal(count))

    weights = torch.tensor(error, requires_grad=True)

    def loss(count: int) -> Tensor:
        x, y = draw(count)
        return 0.5 * ((x @ weights - y) ** 2).mean()

    gradients = [torch.autograd.grad(loss(size), [weights]) for size in sizes]
    signs = rng.choice([1, -1], len(sizes)).tolist()
    return hessian_moments(gradients, sizes=sizes, signs=signs, product=hessian_product(loss(held), [weights]))


@pytest.mark.parametrize(
    ("spectrum", "error", "sigma"),
    [
        (np.ones(10), np.full(10, 10**-0.5), 1.0),
        (np.array([4.0, 2.0, 1.0, 0.5]), np.array([0.5, -1.0, 0.3, 2.0]), 0.7),
    ],
)
def test_the_noise_scale_of_linear_regression_agrees_with_its_closed_form(spectrum, error, sigma) -> None:
    """Theory F1: G'HG = e'A^3 e and tr(H Sigma) = q tr(A^2) + e'A^3 e, so B_noise = 1 + q tr(A^2) / e'A^3 e."""
    rng = np.random.default_rng(18)
    sizes = [4, 8, 8, 4]
    found = np.array([regression_steps(rng, spectrum, error, sigma, sizes=sizes, held=16) for _ in range(1500)])
    q = float(spectrum @ error**2) + sigma**2
    along = float(spectrum**3 @ error**2)
    expected = along, q * float(spectrum @ spectrum) + along
    z = (found.mean(axis=0) - expected) / (found.std(axis=0, ddof=1) / np.sqrt(len(found)))
    print(f"\nmean {found.mean(axis=0)}, expected {expected}, z {z}", end="")
    assert np.abs(z).max() < 4.5  # by chance with 1e-5
    ratio = found.mean(axis=0)[1] / found.mean(axis=0)[0]
    assert ratio == pytest.approx(1 + q * float(spectrum @ spectrum) / along, rel=0.1)
    if np.all(spectrum == 1):
        assert expected[1] / expected[0] == pytest.approx(21.0)


@pytest.mark.parametrize(
    ("count", "sizes", "signs", "said"),
    [
        (1, [4], [1], "at least two micro-batches"),
        (2, [4], [1, 1], "2 gradients, 1 sizes and 2 signs"),
        (2, [4, 0], [1, 1], "sizes must be at least 1"),
        (2, [4, 4], [1, 2], "signs 1 or -1"),
    ],
)
def test_what_does_not_fit_is_refused(count, sizes, signs, said) -> None:
    with pytest.raises(ValueError, match=said):
        hessian_moments([[torch.ones(2)]] * count, sizes=sizes, signs=signs, product=dense(torch.eye(2)))
