"""What does a run that only advised have to say at its end? Read from its folder, so that it holds after a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator.core import codec, controller, noise
from orchestrator.core.advising import Advice, Stretch, advise, follow_plan
from orchestrator.core.controller import ControllerState, Rules, is_decision_point
from orchestrator.measure.meter import Estimator
from orchestrator.runtime import folder
from orchestrator.runtime.brain import STATE_TYPES
from orchestrator.runtime.replay import events_of, measured


def closing_advice(run: Path, rules: Rules, estimator: Estimator) -> tuple[str, Mapping[str, Any]]:
    """``(sentence, evidence)`` from the surviving lines of the run in the folder ``run``.

    The evidence is empty when there is no advice to give, and the sentence says why.
    """
    rows = folder.surviving(run / folder.METRICS)
    batches = {row["global_batch"] for row in rows[:-1]}  # the last step takes what is left
    if batches - {rules.base_batch}:
        kept = ", ".join(map(str, sorted(batches)))
        return f"no advice: it is founded on one batch throughout, and this run had {kept}", {}
    found: Advice | None
    if rules.planned:
        found = follow_plan(rules, samples=sum(row["global_batch"] for row in rows))
    else:
        rounds = events_of(run, "branches")
        found = advise(stretches(rows, rounds, rules=rules, estimator=estimator), rules)
    if found is None:
        return "no advice: the noise scale never had an interval with two ends in this run", {}
    return found.sentence(), {
        "schedule": found.schedule,
        "steps": found.steps,
        "samples": found.samples,
        "fixed_steps": found.fixed_steps,
        "fixed_samples": found.fixed_samples,
        "steps_saved": found.fixed_steps - found.steps,
        "samples_saved": found.fixed_samples - found.samples,
        "unmeasured_samples": found.unmeasured_samples,
        "config": as_config(found, rules),
    }


def as_config(found: Advice, rules: Rules) -> Mapping[str, Any] | None:
    """The sections of a config with which a run does what was advised; ``None`` where that is what it did."""
    if not found.schedule:
        return None
    if rules.planned:
        return {"controller": {"mode": "act"}}
    controller = {
        "mode": "act",
        "policy": "schedule",
        "ramp": [list(entry) for entry in found.schedule],
        "every_samples": rules.every_samples,
        "lag_steps": rules.lag_steps,
        # The learning rate's rule goes on to see the noise scale.
        "half_life_samples": rules.noise.half_life_samples,
        "confidence": rules.noise.confidence,
    }
    sizes = [rules.base_batch, *(batch for _, batch in found.schedule)]
    falls = any(a > b for a, b in pairwise(sizes))
    return {"controller": controller | ({"shrink": True} if falls else {}), "train": {"samples": found.samples}}


def stretches(
    rows: Sequence[Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]], *, rules: Rules, estimator: Estimator
) -> list[Stretch]:
    """The lines of ``metrics.jsonl``, joined from one decision to the next; the last stretch may be short.

    The controller goes through them again, for more is known of the noise than the lines say. ``rounds`` are the events
    of branches, in order.
    """
    found: list[Stretch] = []
    joined: list[Mapping[str, Any]] = []
    state, waiting = controller.init(rules, world_size=1), list(rounds)
    for row in rows:
        while waiting and waiting[0]["step"] <= row["step"]:
            state, _ = controller.advance(state, codec.decode(waiting.pop(0)["cause"], STATE_TYPES), rules)
        sample = measured(row, estimator).sample
        state = replace(state, noise=noise.absorb(state.noise, sample, rules.noise))
        joined.append(row)
        if is_decision_point(
            before=sample.samples_seen - sample.batch, after=sample.samples_seen, every_samples=rules.every_samples
        ):
            found.append(_stretch(joined, state, rules))
            joined = []
    return [*found, _stretch(joined, state, rules)] if joined else found


def _stretch(rows: Sequence[Mapping[str, Any]], state: ControllerState, rules: Rules) -> Stretch:
    samples = sum(row["global_batch"] for row in rows)
    losses = [math.nan if row["loss"] is None else row["loss"] * row["global_batch"] for row in rows]
    return Stretch(
        samples=samples,
        mean_loss=sum(losses) / samples,
        lr=rows[-1]["lr"],
        stats=noise.stats(state.noise, rules.noise),
        kappa=state.kappa,
    )
