"""What reading every sample's gradient costs: step time over the same step unmeasured, one process, paired blocks.

Run with -s to see the figures. Both sides are one model and one meter in one process, on one core, in alternating
blocks, so that only the reading differs.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch.nn import functional

from orchestrator.measure.per_example import PerExampleMeter
from orchestrator.tasks.gpt import GPT, GPTShape

BLOCKS, STEPS, MICRO, BOUND = 24, 2, 16, 1.25


@pytest.mark.benchmark
def test_reading_every_samples_gradient_costs_at_most_a_quarter_of_a_transformers_step() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = np.array(ratios())
    finally:
        torch.set_num_threads(threads)
    draws = np.random.default_rng(0).choice(found, size=(4000, len(found)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    print(
        f"\nwidth 256, context 64, four layers, micro-batch {MICRO}: median paired ratio {np.median(found):.3f}, "
        f"95 % bootstrap interval [{low:.3f}, {high:.3f}] over {len(found)} blocks, bound {BOUND}"
    )
    assert low <= BOUND


def ratios() -> list[float]:
    torch.manual_seed(0)
    model = GPT(GPTShape(vocabulary=96, context=64, width=256, depth=4, heads=4, dropout=0.0))
    tokens = torch.randint(96, (MICRO, 65))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    meter = PerExampleMeter(model, model.parameters())

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
