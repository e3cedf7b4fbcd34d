"""What is counted and what is shown of a run's lines, with Ray's metrics replaced by ones that can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ray_train import metrics
from orchestrator.ray_train.metrics import RunMetrics
from orchestrator.runtime.folder import RunWriter
from tests.support import config

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
ROW: dict[str, Any] = {
    "samples_seen": 640, "noise_scale": 48.0, "noise_low": 20.0, "noise_high": None, "global_batch": 64,
    "micro_batch": 8, "accum_steps": 8, "lr": 0.1, "loss": float("nan"), "samples_per_s": None, "verdict": "too noisy",
}  # fmt: skip


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Series:
    values: Series = {}

    class Fake:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description
            self.name, self.keys = name, tag_keys

        def set_default_tags(self, tags: dict[str, str]) -> Fake:
            self.tags = tags
            return self

        def _at(self, tags: dict[str, str] | None) -> Any:
            tags = {**self.tags, **(tags or {})}
            assert set(tags) == set(self.keys)
            return self.name, tuple(sorted((k, v) for k, v in tags.items() if k != "run"))

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            values[self._at(tags)] = value

        def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
            values[self._at(tags)] = values.get(self._at(tags), 0.0) + value

    monkeypatch.setattr(metrics, "Gauge", Fake)
    monkeypatch.setattr(metrics, "Counter", Fake)
    monkeypatch.setattr(metrics, "_EVERY_S", 0.01)
    return values


@pytest.fixture
def followed(shown: Series, tmp_path: Path) -> Iterator[RunMetrics]:
    found = RunMetrics(config(tmp_path))
    yield found
    found.close()


def published(followed: RunMetrics, shown: Series, *rows: dict[str, Any], events: Any = ()) -> dict[str, float]:
    for event in events:
        followed.event(event)
    for row in rows:
        followed.step(row)
    followed.close()
    followed._publish()
    return {name + "".join(f" {v}" for _, v in tags): value for (name, tags), value in shown.items()}


def test_what_is_not_known_or_not_finite_is_absent(followed: RunMetrics, shown: Series) -> None:
    found = published(followed, shown, ROW)
    absent = {"noise_scale_high_samples", "loss", "throughput_samples_per_second", "samples_planned"}
    assert not {f"groundswell_{name}" for name in absent} & set(found)
    assert found["groundswell_global_batch_samples"] == 64
    assert found["groundswell_statistical_efficiency_ratio"] == (48 + 32) / (48 + 64)
    one_hot = {name: value for name, value in found.items() if "verdict" in name}
    assert one_hot == {
        "groundswell_verdict too noisy": 1,
        "groundswell_verdict measured": 0,
        "groundswell_verdict too few micro-batches": 0,
    }


def test_decisions_are_counted_by_what_becomes_of_the_target(followed: RunMetrics, shown: Series) -> None:
    def decision(target: int, **more: Any) -> dict[str, Any]:
        return {"kind": "decision", "target_batch": target, **more}

    started = {"kind": "started", "total_samples": 900, "global_batch": 32, "checkpoint": None}
    later = [decision(64, effective_step=9), decision(32), decision(64), decision(48, effective_step=20)]
    found = published(followed, shown, events=[started, decision(32), *later])
    outcomes = {name.split()[1]: value for name, value in found.items() if "decisions" in name}
    assert outcomes == {"grow": 1, "keep": 3, "shrink": 1}
    assert found["groundswell_samples_planned"] == 900


def test_a_resumed_run_knows_how_old_its_checkpoint_is(followed: RunMetrics, shown: Series, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    writer = RunWriter(tmp_path / "run")
    for time, path in ((10.0, "a"), (20.0, "b"), (30.0, "c")):
        writer.append("events.jsonl", {"time": time, "kind": "checkpoint", "path": path})
    writer.close()
    resumed = {"kind": "resumed", "total_samples": 900, "global_batch": 32, "checkpoint": "b"}
    assert published(followed, shown, events=[resumed])["groundswell_checkpoint_timestamp_seconds"] == 20.0


def test_a_budget_and_a_new_checkpoint_are_shown(followed: RunMetrics, shown: Series) -> None:
    budget = {"kind": "budget", "used_worker_hours": 1.5, "left_worker_hours": 0.5}
    found = published(followed, shown, events=[budget, {"kind": "checkpoint", "time": 12.0}])
    assert found == {
        "groundswell_budget_used_worker_hours": 1.5,
        "groundswell_budget_left_worker_hours": 0.5,
        "groundswell_checkpoint_timestamp_seconds": 12.0,
    }
