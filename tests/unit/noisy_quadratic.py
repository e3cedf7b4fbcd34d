"""The noisy quadratic model: SGD whose mean, variance and loss are known at every step (Zhang et al. 2019,
arXiv:1907.04164).

Direction i has curvature h_i, and gradient noise of variance c_i a sample: w <- (1 - a h) w + a sqrt(c / B) xi.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.unit.planted import World


@dataclass(frozen=True, kw_only=True)
class NoisyQuadratic:
    """``curvature`` h, ``noise`` c and ``start`` w_0 have one entry a direction."""

    curvature: np.ndarray
    noise: np.ndarray
    start: np.ndarray

    def stationary_variance(self, lr: float, batch: int) -> np.ndarray:
        """a c / (B h (2 - a h)), by direction."""
        return lr * self.noise / (batch * self.curvature * (2 - lr * self.curvature))

    def mean(self, step: int, lr: float) -> np.ndarray:
        return self.start * (1 - lr * self.curvature) ** step

    def second_moment(self, step: int, lr: float, batch: int) -> np.ndarray:
        """E w_t^2 = (w_0^2 - v) (1 - a h)^(2 t) + v, with v the stationary variance."""
        v = self.stationary_variance(lr, batch)
        return (self.start**2 - v) * (1 - lr * self.curvature) ** (2 * step) + v

    def loss(self, step: int, lr: float, batch: int) -> float:
        return 0.5 * float(self.curvature @ self.second_moment(step, lr, batch))

    def steps_to(self, goal: float, lr: float, batch: int) -> float:
        """The fewest steps after which the mean loss is at most ``goal``; infinite if it never is."""
        if 0.5 * float(self.curvature @ self.stationary_variance(lr, batch)) >= goal:
            return math.inf
        high = 1
        while self.loss(high, lr, batch) > goal:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.loss(middle, lr, batch) > goal else (low, middle)
        return high

    def plateau_ratio(self, lr: float) -> float:
        """tr(Sigma) / E|G|^2 over the batch, in the stationary distribution."""
        return float(self.noise.sum() / (self.curvature**2 @ self.stationary_variance(lr, 1)))

    def simulate(self, steps: int, *, runs: int, seed: int, lr: float, batch: int) -> np.ndarray:
        """The weights after ``steps`` steps, of shape (runs, directions)."""
        rng = np.random.default_rng(seed)
        weights = np.tile(self.start, (runs, 1))
        for _ in range(steps):
            gradient = self.curvature * weights + np.sqrt(self.noise / batch) * rng.standard_normal(weights.shape)
            weights -= lr * gradient
        return weights

    def world(self, *, seed: int, lr: float, batch: int) -> World:
        """On its plateau at ``lr`` and ``batch``; asked for one step at a time, with the rate that the rule gives.

        Each micro-batch of 8 samples is drawn, and read as a run reads its own.
        """
        rng = np.random.default_rng(seed)
        weights = np.sqrt(self.stationary_variance(lr, batch)) * rng.standard_normal(len(self.start))

        def step(seen: int, batch: int, factor: float) -> dict[str, Any]:
            nonlocal weights
            pieces = max(2, -(-batch // 8))
            loss = 1.0 + 0.5 * float(self.curvature @ weights**2) + float(rng.standard_normal()) / math.sqrt(batch)
            signal = self.curvature * weights
            noise = rng.standard_normal((pieces, len(weights))) * np.sqrt(self.noise * pieces / batch)
            gradient, spread = signal + noise.mean(axis=0), noise - noise.mean(axis=0)
            trace_cov = float(np.square(spread).sum()) * batch / pieces / (pieces - 1)
            grad_sq = float(gradient @ gradient) - trace_cov / batch
            weights = weights - lr * factor * gradient
            return {
                "grad_sq": grad_sq, "trace_cov": trace_cov, "micro_batches": pieces, "loss": loss, "lr": lr * factor,
            }  # fmt: skip

        return step


def harmonic(directions: int, *, start: float = 1.0) -> NoisyQuadratic:
    """Zhang et al.'s family: h_i = c_i = 1 / i."""
    spectrum = 1.0 / np.arange(1, directions + 1)
    return NoisyQuadratic(curvature=spectrum, noise=spectrum, start=np.full(directions, start))


def best_steps(model: NoisyQuadratic, goal: float, batch: int, rates: np.ndarray) -> float:
    """Steps to ``goal`` at the best constant rate of ``rates``."""
    return min(model.steps_to(goal, lr, batch) for lr in rates.tolist())
