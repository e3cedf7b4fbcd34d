"""What reading samples' gradients costs: step time over the same step unmeasured, one process, paired blocks.

Run with -s to see the figures. Both sides are one model and one meter in one process, on one core, in alternating
blocks, so that only the reading differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from orchestrator.measure.meter import Meter
from orchestrator.measure.norm_layers import NormLayersMeter
from orchestrator.measure.per_example import PerExampleMeter
from orchestrator.tasks.gpt import GPT, GPTShape

BLOCKS, STEPS, MICRO = 24, 2, 16


def per_example(model: GPT) -> Meter:
    return PerExampleMeter(model, model.parameters())


def norm_layers(model: GPT) -> Meter:
    """After the calibration."""
    meter = NormLayersMeter(model, model.parameters())
    meter.go_on_with("part")
    return meter


@pytest.mark.benchmark
@pytest.mark.parametrize(("build", "bound"), [(per_example, 1.25), (norm_layers, 1.10)])
def test_reading_samples_gradients_costs_at_most_so_much_of_a_transformers_step(
    build: Callable[[GPT], Meter], bound: float
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = np.array(ratios(build))
    finally:
        torch.set_num_threads(threads)
    draws = np.random.default_rng(0).choice(found, size=(4000, len(found)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    print(
        f"\n{build.__name__}, width 256, context 64, four layers, micro-batch {MICRO}: median paired ratio "
        f"{np.median(found):.3f}, 95 % bootstrap interval [{low:.3f}, {high:.3f}] of {len(found)} blocks, bound {bound}"
    )
    assert low <= bound


def ratios(build: Callable[[GPT], Meter]) -> list[float]:
    torch.manual_seed(0)
    model = GPT(GPTShape(vocabulary=96, context=64, width=256, depth=4, heads=4, dropout=0.0))
    tokens = torch.randint(96, (MICRO, 65))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    meter = build(model)

    def step(measure: bool) -> None:
        if measure:
            meter.begin_step(measure=True)
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if measure:
            meter.end_micro_batch(size=MICRO, loss=loss.detach(), loss_scale=1.0)
            meter.read()
            meter.close()
        optimizer.step()
        optimizer.zero_grad()

    for measure in (True, False, True, False):
        step(measure)
    found = []
    for block in range(BLOCKS):
        took = {}
        for measure in (True, False) if block % 2 else (False, True):
            began = time.perf_counter()
            for _ in range(STEPS):
                step(measure)
            took[measure] = time.perf_counter() - began
        found.append(took[True] / took[False])
    return found
