"""Recomputes from a run's folder what the controller decided; the decisions follow from the record alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import load_config
from orchestrator.core import codec, controller
from orchestrator.errors import RunFolderError
from orchestrator.measure.estimators import find_estimator
from orchestrator.measure.meter import Estimator
from orchestrator.runtime import folder
from orchestrator.runtime.brain import STATE_TYPES
from orchestrator.runtime.rules import rules_from
from orchestrator.types import ApplyPlan, BatchPlan, GradMeasured, GradSample, Keep, WorkersChanged, decided_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One decision: when, what, and why."""

    samples_seen: int
    target_batch: int
    reason: str


def recorded(run: Path) -> list[Decided]:
    """The decisions that the run wrote down, those of discarded steps left out."""
    return [
        Decided(samples_seen=row["samples_seen"], target_batch=row["target_batch"], reason=row["reason"])
        for row in events_of(run, "decision")
    ]


def events_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of these kinds in the order of their steps, those of discarded steps left out."""
    found: list[dict[str, Any]] = []
    for row in folder.rows(run / folder.EVENTS):
        if row["kind"] in ("started", "resumed"):  # an attempt that found no checkpoint starts again
            found = [old for old in found if old["step"] < row["step"]]
        elif row["kind"] in kinds:
            found.append(row)
    return found


def recomputed(run: Path) -> list[Decided]:
    """The decisions that ``advance`` takes on the run's surviving measurements. Raises ``RunFolderError``."""
    started = next((row for row in folder.rows(run / folder.EVENTS) if row["kind"] == "started"), None)
    if started is None:
        raise RunFolderError(f"{run / folder.EVENTS} does not say how the run started; it is not a whole run")
    config = load_config(run / folder.CONFIG)
    attempts = _attempts(run)
    rules = rules_from(config, dataset_size=started["dataset_size"])
    estimator = find_estimator(config.measure.estimator)
    state = controller.init(rules, world_size=started["world_size"])
    causes = [row for row in events_of(run, "plan_rejected", "branches", "control") if row.get("cause") is not None]
    decided = []
    for row in folder.surviving(run / folder.METRICS):
        while attempts and attempts[0][0] <= row["step"]:
            stay = attempts.pop(0)[1]
            rules = rules_from(config, dataset_size=started["dataset_size"], workers_stay=stay)
        if row["world_size"] != state.world_size:
            state, _ = controller.advance(state, WorkersChanged(world_size=row["world_size"]), rules)
        while causes and causes[0]["step"] <= row["step"]:
            state, _ = controller.advance(state, codec.decode(causes.pop(0)["cause"], STATE_TYPES), rules)
        state, action = controller.advance(state, measured(row, estimator), rules)
        if isinstance(action, (ApplyPlan, Keep)) and (target := decided_batch(action)) is not None:
            decided.append(Decided(samples_seen=row["samples_seen"], target_batch=target, reason=action.reason))
    return decided


def _attempts(run: Path) -> list[tuple[int, bool]]:
    """``(first step, whether its workers stay)`` of the attempts that the run's steps are of, in order.

    Each may have had a runtime of its own. Those that did not write it down were decided as if workers came and went.
    """
    found: list[tuple[int, bool]] = []
    for row in folder.rows(run / folder.EVENTS):
        if row["kind"] in ("started", "resumed"):
            found = [attempt for attempt in found if attempt[0] < row["step"]]
            found.append((row["step"], row.get("workers_stay", False)))
    return found


def measured(row: Mapping[str, Any], estimator: Estimator) -> GradMeasured:
    """What the controller was told of the step that a line of ``metrics.jsonl`` is about."""
    plan = BatchPlan(
        generation=0, world_size=row["world_size"], batch=row["global_batch"], micro_batch=row["micro_batch"]
    )
    sample = GradSample(
        step=row["step"],
        samples_seen=row["samples_seen"],
        batch=row["global_batch"],
        micro_batches=estimator.parts(plan),
        loss=math.nan if row["loss"] is None else row["loss"],  # of a step that a lost rank had a part in
        lr=row.get("rule_lr", row["lr"]),
        grad_sq=row["grad_sq"],
        trace_cov=row["trace_cov"],
    )
    return GradMeasured(sample=sample, step_time_s=row["step_time_s"])
