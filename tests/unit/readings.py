"""Readings of made-up steps, and the estimator's state after them."""

from __future__ import annotations

import numpy as np

from orchestrator.core import noise
from orchestrator.core.noise import NoiseSettings, NoiseState
from orchestrator.types import GradSample

LONG = NoiseSettings(half_life_samples=1e15)


def sample(seen: int, batch: int, trace_cov: float | None, grad_sq: float | None, micro_batches: int = 4) -> GradSample:
    return GradSample(
        step=seen, samples_seen=seen, batch=batch, micro_batches=micro_batches, loss=1.0, lr=0.1,
        grad_sq=grad_sq, trace_cov=trace_cov,
    )  # fmt: skip


def feed(readings: list[tuple[float, float]], config: NoiseSettings = LONG, batch: int = 8) -> NoiseState:
    """Absorb (trace_cov, grad_sq) readings of equal steps."""
    state = noise.init(config)
    for i, (trace_cov, grad_sq) in enumerate(readings, start=1):
        state = noise.absorb(state, sample(i * batch, batch, trace_cov, grad_sq), config)
    return state


def gaussian_readings(
    seed: int, steps: int, *, trace_cov: float, grad_sq: float, sd: float = 0.5
) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    return [
        (trace_cov * (1 + 0.2 * a), grad_sq + sd * b) for a, b in rng.standard_normal((steps, 2)).tolist()
    ]  # fmt: skip
