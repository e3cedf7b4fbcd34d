"""All ranks agree on the largest micro-batch that fits on each of them, and none is left waiting by another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.runtime import ledger, trials
from orchestrator.session import Session
from tests.dist.test_bad_input_ranks import PROMPT_S, events, normalised, prompt, rows_of
from tests.support import blobs, config, cross_entropy, mlp, run_fleet
from tests.unit.test_find_micro_batch import Planted

pytestmark = pytest.mark.dist

BATCH, STEPS = 48, 3
Answer = tuple[list[list[float]], list[float]]  # weights and buffers at the end, and what the caller's generator draws next


def train(
    rank: int,
    path: str,
    fits: dict[int, int],
    find: bool,
    micro_batch: int,
    make: Callable[[], nn.Module] = normalised,
    fails: bool = False,
) -> Answer:
    """Rank ``r`` has room for ``fits[r]`` samples; with ``fails`` the last rank's first trial raises."""
    trials.MEMORIES["cpu"] = Planted
    model = make()
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = config(
        path,
        train={"samples": STEPS * BATCH},
        batch={"initial": BATCH, "micro_batch": micro_batch, "max": BATCH, "find_micro_batch": find},
        ledger=True,
    )

    def loss_of(model: nn.Module, samples: Any) -> Tensor:
        if fails and rank == max(fits):
            raise ValueError("planted")
        if len(samples[0]) > fits[rank]:
            raise torch.OutOfMemoryError("planted: out of memory")
        return cross_entropy(model, samples)

    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        session.find_micro_batch(loss_of)
        for step in session:
            for samples in step:
                session.backward(lambda samples=samples: loss_of(session.model, samples))
            session.step()
    return [t.flatten().tolist() for t in model.state_dict().values()], torch.rand(3).tolist()


@pytest.mark.parametrize("fits", [{0: 7, 1: 100}, {0: 9, 1: 11, 2: 6}], ids=str)
def test_the_least_that_fits_on_any_rank_is_found_by_all(tmp_path: Path, fits: dict[int, int]) -> None:
    least = min(fits.values())
    found = run_fleet(train, len(fits), str(tmp_path / "found"), fits, True, 24)
    plain = run_fleet(train, len(fits), str(tmp_path / "plain"), fits, False, least)
    assert found == plain
    keys = ("step", "loss", "grad_sq", "trace_cov", "global_batch", "micro_batch")
    assert rows_of(tmp_path / "found", *keys) == rows_of(tmp_path / "plain", *keys)
    assert [e["micro_batch"] for e in events(tmp_path / "found", "micro_batch_found")] == [least]
    assert [e["micro_batch"] for e in events(tmp_path / "found", "plan_rejected")] == [least]
    report = ledger.verify(tmp_path / "found" / "run")
    assert (report.violation, report.samples) == (None, STEPS * BATCH)


@pytest.mark.parametrize(
    ("fits", "fails", "told"),
    [
        ({0: 100, 1: 0}, False, {"SessionError: a micro-batch of one sample does not fit"}),
        ({0: 100, 1: 100}, True, {"SessionError: another rank could not compute", "ValueError: planted"}),
    ],
    ids=["nothing fits on one rank", "one rank fails"],
)
def test_no_rank_is_left_waiting(tmp_path: Path, fits: dict[int, int], fails: bool, told: set[str]) -> None:
    for took_s, kind, message in run_fleet(prompt, len(fits), train, str(tmp_path), fits, True, 24, mlp, fails):
        assert took_s < PROMPT_S
        assert any(f"{kind}: {message}".startswith(each) for each in told)
    assert rows_of(tmp_path, "step") == []
