"""Products of a model's Hessian with its gradients: what a loss gives when it is differentiated twice.

The gradients and the Hessian come from different samples: a Hessian that has seen the gradients it weighs makes their
products too large or too small together with it. Nothing is added to ``.grad``, and no hook of a parameter but the
user's own may be attached meanwhile: ``torch.autograd.grad`` calls those as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from orchestrator.core.curvature import MICRO_BATCHES, CurvatureReading, reading_from

Loss = Callable[[], Tensor]


class NotTwiceDifferentiableError(Exception):
    """An operation of the loss has no second derivative; the message is the operation's own."""


def read(
    gradient_losses: Iterable[Loss],
    hessian_loss: Loss,
    parameters: Sequence[nn.Parameter],
    *,
    signs: Sequence[int],
    micro_batch: int,
) -> CurvatureReading:
    """One reading from ``MICRO_BATCHES`` losses for gradients and one, of other samples, for the Hessian.

    Each loss is the mean over ``micro_batch`` samples, computed when it is called. Two products with the Hessian
    suffice: one for the mean of the gradients g_j, and one for their deviations, each with its random sign and summed
    (``core.curvature.reading_from``). Each product is one more backward pass through the gradient's own graph
    (Pearlmutter 1994, doi:10.1162/neco.1994.6.1.147). Raises ``NotTwiceDifferentiableError``. One host synchronisation.
    """
    total: list[Tensor] = [torch.zeros_like(p) for p in parameters]
    signed: list[Tensor] = [torch.zeros_like(p) for p in parameters]
    squares: list[Tensor] = []
    for sign, loss in zip(signs, gradient_losses, strict=True):
        found = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
        dense = [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]
        squares.append(_dot(dense, dense))
        torch._foreach_add_(total, dense)
        torch._foreach_add_(signed, dense, alpha=sign)
    n = MICRO_BATCHES
    mean = [gradient / n for gradient in total]
    scale = (micro_batch / (n - 1)) ** 0.5
    spread = [scale * (s - sum(signs) * m) for s, m in zip(signed, mean, strict=True)]
    product_of_spread, product_of_mean = _hessian_times(hessian_loss(), parameters, [spread, mean])
    numbers = [
        _dot(spread, product_of_spread), _dot(mean, product_of_mean), torch.stack(squares).sum(), _dot(mean, mean)
    ]  # fmt: skip
    spread_product, mean_product, sq_sum, mean_grad_sq = torch.stack(numbers).tolist()
    return reading_from(
        spread_product=spread_product,
        mean_product=mean_product,
        sq_sum=sq_sum,
        mean_grad_sq=mean_grad_sq,
        micro_batch=micro_batch,
    )


def _hessian_times(loss: Tensor, parameters: Sequence[nn.Parameter], vectors: list[list[Tensor]]) -> list[list[Tensor]]:
    """The Hessian of ``loss`` times each of ``vectors``, by a second backward pass for each."""
    try:
        # With a seed that takes a gradient, a function that can be differentiated once is also seen at the loss itself.
        seed = torch.ones_like(loss, requires_grad=True)
        gradients = torch.autograd.grad(loss, parameters, seed, create_graph=True, allow_unused=True)
        _raise_on_the_way(gradients)
        rows = [i for i, gradient in enumerate(gradients) if gradient is not None]  # the others are zero
        return [
            list(
                torch.autograd.grad(
                    [gradients[i] for i in rows],
                    parameters,
                    grad_outputs=[vector[i] for i in rows],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
            for vector in vectors
        ]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NotTwiceDifferentiableError(str(error)) from error


def _raise_on_the_way(gradients: Iterable[Tensor | None]) -> None:
    """Raise the error of a function marked ``once_differentiable`` that ``gradients`` went through.

    The node that would raise has no edge to the parameters, so ``torch.autograd.grad`` leaves it out and gives a
    product that lacks the function's part.
    """
    ahead = [gradient.grad_fn for gradient in gradients if gradient is not None]
    met = set()
    while ahead:
        node = ahead.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if node.name() == "torch::autograd::Error":
            node(torch.zeros(()))  # type: ignore[operator]  # it can be called, and raises
        ahead += [following for following, _ in node.next_functions]


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Of two lists of tensors alike in shape, summed in float64; 0-D."""
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)]).sum()
