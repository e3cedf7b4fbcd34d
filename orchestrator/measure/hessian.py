"""How much of the gradient and of its noise lies along directions of curvature: G'HG and tr(H Sigma), H the Hessian.

Their ratio is the noise scale B_noise = tr(H Sigma) / (G'HG) of McCandlish et al. 2018, arXiv:1812.06162, equations 2.6
to 2.8, of which B_simple is the case H = identity. The gradients come from the micro-batches of a step, the Hessian
from a loss over *other* samples: from the same ones it would be correlated with the noise that it weighs, and both
moments would be biased.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# H times a vector that has one tensor for each parameter.
HessianProduct = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> HessianProduct:
    """The Hessian of ``loss`` with respect to ``parameters`` as a function of the vector that it multiplies.

    By double backward (Pearlmutter 1994, doi:10.1162/neco.1994.6.1.147): each product costs about one more backward
    pass, and none touches ``.grad``. The graph of ``loss`` is held until the function is let go. A parameter that the
    loss, or its gradient, does not depend on gives zeros.
    """
    with torch.enable_grad():
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    reached = [g for g in gradient if g.requires_grad]  # the others are constant, and have no derivative

    def product(vector: Sequence[Tensor]) -> Sequence[Tensor]:
        weights = [v.detach() for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
        if not reached:
            return [torch.zeros_like(p) for p in parameters]
        return torch.autograd.grad(
            reached, parameters, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    return product


def hessian_moments(
    gradients: Sequence[Sequence[Tensor]], *, sizes: Sequence[int], signs: Sequence[int], product: HessianProduct
) -> tuple[float, float]:
    """Unbiased ``(G'HG, tr(H Sigma))`` of one step, in two products; either may be negative.

    ``gradients[i]`` is the mean gradient over the ``sizes[i]`` samples of micro-batch i, one tensor for each parameter.
    With g their weighted mean over all N samples and random ``signs`` s_i of +1 and -1, independent of the gradients,
    u = sum of s_i sqrt(b_i / (n - 1)) (g_i - g) has E[u u'] = Sigma, so that u'Hu is tr(H Sigma) on average, and
    g'Hg - u'Hu / N is G'HG. The signs save n - 1 products and cost variance; their average over all 2^n choices is the
    weighted sample variance of ``orchestrator.core.noise.moments`` with v'Hv in the place of the squared norm. Average
    both over steps, then divide: McCandlish et al. 2018, arXiv:1812.06162, equation 2.8.

    Raises ``ValueError`` below two micro-batches, or where lengths, sizes or signs do not fit.
    """
    count = len(gradients)
    if count < 2 or not count == len(sizes) == len(signs):
        raise ValueError(
            f"Hessian-weighted moments need at least two micro-batches, each with its size and sign, got {count} "
            f"gradients, {len(sizes)} sizes and {len(signs)} signs"
        )
    if any(size < 1 for size in sizes) or any(sign not in (1, -1) for sign in signs):
        raise ValueError(f"sizes must be at least 1 and signs 1 or -1, got sizes {list(sizes)}, signs {list(signs)}")
    batch = sum(sizes)
    mean = _combine(gradients, [size / batch for size in sizes])
    roots = [sign * (size / (count - 1)) ** 0.5 for size, sign in zip(sizes, signs, strict=True)]
    spread = _combine([*gradients, mean], [*roots, -sum(roots)])
    trace = _along(spread, product)
    return _along(mean, product) - trace / batch, trace


def _combine(vectors: Sequence[Sequence[Tensor]], factors: Sequence[float]) -> list[Tensor]:
    """The sum of the vectors, each times its factor."""
    found = [torch.zeros_like(part) for part in vectors[0]]
    for vector, factor in zip(vectors, factors, strict=True):
        for total, part in zip(found, vector, strict=True):
            total.add_(part.detach(), alpha=factor)
    return found


def _along(vector: Sequence[Tensor], product: HessianProduct) -> float:
    """v'Hv, summed in float64."""
    parts = zip(vector, product(vector), strict=True)
    return float(sum(torch.sum(v.double() * turned.double()) for v, turned in parts))
