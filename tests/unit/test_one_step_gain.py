"""From a frozen checkpoint, the best loss decrease of one step follows dL_max / (1 + B_noise / B).

McCandlish et al. 2018, arXiv:1812.06162, section 2.2: dL_max = |G|^4 / (2 G'HG) and B_noise = tr(H Sigma) / (G'HG).
Nothing is fitted: both come from measurements at the checkpoint, the decreases from steps that are really tried. For
each batch one step length serves all draws, the best one for their average. Stated before it was run: every batch
agrees within 10 %, or within three standard errors of its average decrease. Run with -s to see the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from orchestrator.core import curvature
from orchestrator.core.curvature import MICRO_BATCHES
from orchestrator.measure.curvature import read

BATCHES = (4, 8, 16, 32, 64, 128, 256, 512)
TOLERANCE, STANDARD_ERRORS = 0.1, 3.0


def check(decreases: dict[int, np.ndarray], *, most: float, noise_scale: float) -> None:
    """``decreases[B]`` holds each draw's loss decrease at the step length that is best on average."""
    wrong = []
    print(f"\nB_noise {noise_scale:.1f}, dL_max {most:.5f}", end="")
    for batch, found in decreases.items():
        expected, mean = most / (1 + noise_scale / batch), found.mean()
        error = found.std(ddof=1) / np.sqrt(len(found))
        print(f"\n  B {batch}: {mean:.6f} +- {error:.6f}, expected {expected:.6f}, ratio {mean / expected:.3f}", end="")
        if abs(mean - expected) > max(TOLERANCE * expected, STANDARD_ERRORS * error):
            wrong.append(batch)
    assert not wrong


def test_linear_regression_follows_its_closed_form() -> None:
    """Theory F1: G = A e, H = A, and Sigma = q A + A e e'A with q = e'A e + sigma^2."""
    rng, spectrum, sigma = np.random.default_rng(3), np.array([3.0, 2.0, 1.0, 0.5, 0.25, 0.1]), 0.8
    error = np.array([0.1, -0.2, 0.3, 0.5, -1.5, 2.0])
    q = float(spectrum @ error**2) + sigma**2
    grad_sq, curved = float(spectrum**2 @ error**2), float(spectrum**3 @ error**2)
    decreases = {}
    for batch in BATCHES:
        draws = 400_000 // batch
        x = rng.standard_normal((draws, batch, len(error))) * np.sqrt(spectrum)
        residual = x @ error - sigma * rng.standard_normal((draws, batch))
        steps = np.einsum("rbd,rb->rd", x, residual) / batch
        # L(w) - L(w - t g) = t g'A e - t^2 g'A g / 2 exactly, with the best t for the average over the draws.
        slope, bend = steps @ (spectrum * error), np.square(steps) @ spectrum
        best = slope.mean() / bend.mean()
        decreases[batch] = best * slope - 0.5 * best**2 * bend
    noise_scale = 1 + q * float(spectrum @ spectrum) / curved
    most = grad_sq**2 / (2 * curved)
    check(decreases, most=most, noise_scale=noise_scale)
    with pytest.raises(AssertionError):  # B_simple would not do
        check(decreases, most=most, noise_scale=1 + q * float(spectrum.sum()) / grad_sq)


class Frozen:
    """A small network on 512 scans of digits after ``steps`` steps of SGD; those scans are all the data there is."""

    def __init__(self, *, steps: int, seed: int = 0) -> None:
        inputs, labels = load_digits(return_X_y=True)
        self.inputs, self.labels = torch.tensor(inputs[:512] / 16), torch.tensor(labels[:512])
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
        self.generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(self.draw(64)).backward()
            optimizer.step()
        self.names, parameters = zip(*self.model.named_parameters(), strict=True)
        self.shapes = [p.shape for p in parameters]
        self.weights = torch.cat([p.detach().flatten() for p in parameters])

        def of_one(weights: Tensor, scan: Tensor, label: Tensor) -> Tensor:
            return self.loss_at(weights, scan[None], label[None])

        self.per_sample = vmap(grad(of_one), in_dims=(None, 0, 0))(self.weights, self.inputs, self.labels)

    def draw(self, *shape: int) -> Tensor:
        """Indices drawn with replacement, so that samples are independent."""
        return torch.randint(len(self.inputs), shape, generator=self.generator)

    def loss(self, indices: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.inputs[indices]), self.labels[indices])

    def loss_at(self, weights: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        parts = weights.split([shape.numel() for shape in self.shapes])
        named = {n: part.view(shape) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)}
        return nn.functional.cross_entropy(functional_call(self.model, named, (inputs,)), labels)

    def full_loss(self) -> Callable[[Tensor], Tensor]:
        return lambda weights: self.loss_at(weights, self.inputs, self.labels)

    def measured(self, readings: int, *, size: int = 64) -> tuple[float, float]:
        """``(dL_max, B_noise)`` from the averages over ``readings``, the Hessians from other draws."""
        signs = torch.randint(2, (readings, MICRO_BATCHES), generator=self.generator) * 2 - 1
        parameters, found = list(self.model.parameters()), []
        for row in signs.tolist():
            losses = [partial(self.loss, drawn) for drawn in self.draw(MICRO_BATCHES + 1, size)]
            found.append(read(losses[:-1], losses[-1], parameters, signs=row, micro_batch=size))
        whole = curvature.stats(found, confidence=0.95)
        assert whole.noise_scale is not None
        assert whole.epsilon_max is not None
        assert whole.grad_sq is not None
        return whole.epsilon_max * whole.grad_sq / 2, whole.noise_scale


def test_a_trained_network_follows_what_is_measured_at_its_checkpoint() -> None:
    frozen = Frozen(steps=60)
    most, noise_scale = frozen.measured(1200)
    loss, mean = frozen.full_loss(), frozen.per_sample.mean(dim=0)
    hessian = torch.autograd.functional.hessian(loss, frozen.weights)
    spread = frozen.per_sample - mean
    exact_curved, exact_noise = float(mean @ hessian @ mean), float((spread @ hessian * spread).sum(dim=1).mean())
    assert noise_scale == pytest.approx(exact_noise / exact_curved, rel=0.1)
    assert most == pytest.approx(float(mean @ mean) ** 2 / (2 * exact_curved), rel=0.1)

    now, losses, longest = float(loss(frozen.weights)), vmap(loss, chunk_size=64), 2 * most / float(mean @ mean)
    decreases = {}
    for batch in BATCHES:
        draws = 800 if batch < 64 else 300
        steps = frozen.per_sample[frozen.draw(draws, batch).flatten()].view(draws, batch, -1).mean(dim=1)
        lengths = longest / (1 + noise_scale / batch) * torch.tensor([0.6, 0.8, 1.0, 1.25, 1.6])
        tried = torch.stack([now - losses(frozen.weights - t * steps) for t in lengths])
        decreases[batch] = tried[tried.mean(dim=1).argmax()].numpy()
    check(decreases, most=most, noise_scale=noise_scale)
    for wrong in (0.5, 2.0):  # and would have been seen not to follow another one
        with pytest.raises(AssertionError):
            check(decreases, most=most, noise_scale=wrong * noise_scale)
