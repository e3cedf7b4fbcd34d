"""How often the ranks tell each other what they measured is the clock's affair; what is decided is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.runtime import folder
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from tests.support import EAGER, blobs, config, cross_entropy, mlp, run_fleet

pytestmark = pytest.mark.dist


class Clock:
    """Reads later by ``each_s`` at every look; the session looks twice a step."""

    def __init__(self, each_s: float) -> None:
        self._each_s, self._now_s = each_s, 0.0

    def __call__(self) -> float:
        self._now_s += self._each_s
        return self._now_s


class Counting:
    """A collective that counts what is begun."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.begun = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start_sum(self, values: Any) -> Callable[[], list[float]]:
        self.begun += 1
        result: Callable[[], list[float]] = self._inner.start_sum(values)
        return result


def train(rank: int, path: str, step_s: float, lag_steps: int, mode: str) -> tuple[int, int, list[list[float]]]:
    settings = config(
        path,
        train={"samples": 2048},
        batch={"initial": 8, "micro_batch": 4, "max": 64},
        controller={**EAGER, "mode": mode, "lag_steps": lag_steps},
        evaluation={"every_samples": None},
    )
    local = local_worker(settings)
    counting: Any = Counting(local.collective)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.004, momentum=0.5)
    worker = replace(local, collective=counting, now=Clock(step_s))
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), worker=worker) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    return session.step_number, counting.begun, [p.detach().flatten().tolist() for p in model.parameters()]


def lines(path: Path) -> list[dict[str, Any]]:
    clocked = ("step_time_s", "samples_per_s")
    return [{k: v for k, v in row.items() if k not in clocked} for row in folder.surviving(path / "run/metrics.jsonl")]


def decisions(path: Path) -> list[dict[str, Any]]:
    rows = folder.rows(path / "run" / folder.EVENTS)
    return [{k: v for k, v in row.items() if k != "time"} for row in rows if row["kind"] == "decision"]


@pytest.mark.parametrize("lag_steps", [1, 2, 5])
def test_short_steps_are_exchanged_together_and_nothing_else_changes(tmp_path: Path, lag_steps: int) -> None:
    found = {}
    for name, step_s in (("long", 10.0), ("short", 1e-3)):
        found[name] = run_fleet(train, 2, str(tmp_path / name), step_s, lag_steps, "act")
        found[name + " lines"], found[name + " decisions"] = lines(tmp_path / name), decisions(tmp_path / name)
    (steps, each, weights), (_, together, same_weights) = found["long"][0], found["short"][0]
    print(f"{steps} steps: {each} exchanges when steps are long, {together} when they are short")
    assert each == steps, "a long step is exchanged at its end"
    assert together < 0.6 * steps
    assert weights == same_weights
    assert found["long lines"] == found["short lines"]
    assert found["long decisions"] == found["short decisions"]
    changes = [row for row in found["short decisions"] if "effective_step" in row]
    assert len(changes) >= 2
    # A change takes effect lag_steps after the step that follows its decision, and not before.
    batch = {row["step"]: row["global_batch"] for row in found["short lines"]}
    for row in changes:
        assert row["effective_step"] == row["step"] + 1 + lag_steps
        assert batch[row["effective_step"]] == row["target_batch"] > batch[row["effective_step"] - 1]


def test_advice_costs_no_exchange_of_its_own_and_is_all_written_down(tmp_path: Path) -> None:
    runs = {name: run_fleet(train, 2, str(tmp_path / name), 1e-3, 4, name)[0] for name in ("act", "advise")}
    told = decisions(tmp_path / "advise")
    assert [row["samples_seen"] for row in told] == list(range(128, 2048, 128))
    assert any("advise only" in row["reason"] for row in told)
    steps, begun, _ = runs["advise"]
    assert begun <= len(told) + steps // 16 + 1
