"""The moments of one step's micro-batches, against values by hand, brute force and the paper's formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from orchestrator.core.noise import moments, moments_from_sums


def of_vectors(sizes: list[int], gradients: list[np.ndarray]) -> tuple[float, float]:
    mean = sum(b * g for b, g in zip(sizes, gradients, strict=True)) / sum(sizes)
    found = moments(sizes, [float(g @ g) for g in gradients], float(mean @ mean))
    assert found is not None
    return found


def test_two_orthogonal_unit_gradients_have_no_signal_left() -> None:
    assert moments([1, 1], [1.0, 1.0], 0.5) == (0.0, 1.0)


def test_uneven_pair_has_the_values_worked_out_by_hand() -> None:
    grad_sq, trace_cov = of_vectors([3, 5], [np.array([2.0]), np.array([4.0])])
    assert trace_cov == pytest.approx(7.5)
    assert grad_sq == pytest.approx(9.625)


def test_equal_gradients_have_no_noise() -> None:
    g = np.array([1.0, -2.0])
    assert of_vectors([4, 4, 2], [g, g, g]) == pytest.approx((5.0, 0.0))


def test_halves_of_a_population_of_two_give_its_own_covariance() -> None:
    assert moments([1, 1], [1.0, 1.0], 0.0) == (-1.0, 2.0)


@pytest.mark.parametrize("sizes", [[1, 2, 3], [2, 2], [1, 4, 1], [5, 1]])
def test_moments_are_exactly_unbiased_over_every_outcome_of_a_coin(sizes: list[int]) -> None:
    """Per-example gradients G +- 1 and the mean of the readings over all 2^N equally likely draws."""
    mean_grad = 0.3
    readings = []
    for signs in itertools.product((-1.0, 1.0), repeat=sum(sizes)):
        cuts = np.split(np.array(signs) + mean_grad, np.cumsum(sizes)[:-1])
        readings.append(of_vectors(sizes, [np.array([cut.mean()]) for cut in cuts]))
    assert np.mean(readings, axis=0) == pytest.approx((mean_grad**2, 1.0), rel=1e-12)


def test_equal_sizes_agree_with_the_formula_of_the_paper() -> None:
    """McCandlish et al. 2018, appendix A.1, with B_small = b and B_big = n b."""
    b, n, small, big = 4, 5, 3.7, 1.9
    found = moments([b] * n, [small] * n, big)
    assert found == pytest.approx(((n * b * big - b * small) / (n * b - b), (small - big) / (1 / b - 1 / (n * b))))


sizes_and_vectors = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.floats(-100, 100), min_size=3, max_size=3)), min_size=2, max_size=9
)


@given(sizes_and_vectors, st.randoms(use_true_random=False))
def test_moments_do_not_depend_on_the_order_and_trace_cov_is_not_negative(pairs, shuffler) -> None:
    ordered = of_vectors([b for b, _ in pairs], [np.array(v) for _, v in pairs])
    shuffler.shuffle(pairs)
    shuffled = of_vectors([b for b, _ in pairs], [np.array(v) for _, v in pairs])
    scale = sum(b for b, _ in pairs) * max(float(np.square(v).sum()) for _, v in pairs)
    assert shuffled == pytest.approx(ordered, abs=1e-12 * scale + 1e-300)
    assert ordered[1] >= -1e-13 * scale


@pytest.mark.parametrize(("sizes", "sqs"), [([], []), ([8], [1.0])])
def test_fewer_than_two_micro_batches_give_no_moments(sizes, sqs) -> None:
    assert moments(sizes, sqs, 1.0) is None
    assert moments_from_sums(weighted_sq_sum=8.0, mean_grad_sq=1.0, batch=8, micro_batches=len(sizes)) is None


@pytest.mark.parametrize(("sizes", "sqs"), [([1, 2], [1.0]), ([4, 0], [1.0, 1.0])])
def test_moments_refuse_what_is_no_micro_batch_list(sizes, sqs) -> None:
    with pytest.raises(ValueError, match="one squared norm for each micro-batch"):
        moments(sizes, sqs, 1.0)
