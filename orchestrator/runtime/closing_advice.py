"""What does a run that only advised have to say at its end? Read from its folder, so that it holds after a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.core.advising import Stretch, advise
from orchestrator.core.controller import Rules, is_decision_point
from orchestrator.runtime import folder
from orchestrator.types import NoiseStats, Verdict


def closing_advice(run: Path, rules: Rules) -> tuple[str, Mapping[str, Any]]:
    """``(sentence, evidence)`` from the surviving lines of the run in the folder ``run``.

    The evidence is empty when there is no advice to give, and the sentence says why.
    """
    rows = folder.surviving(run / folder.METRICS)
    batches = {row["global_batch"] for row in rows[:-1]}  # the last step takes what is left
    if batches - {rules.base_batch}:
        kept = ", ".join(map(str, sorted(batches)))
        return f"no advice: it is founded on one batch throughout, and this run had {kept}", {}
    found = advise(stretches(rows, every_samples=rules.every_samples), rules)
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
    }


def stretches(rows: Sequence[Mapping[str, Any]], *, every_samples: int) -> list[Stretch]:
    """The lines of ``metrics.jsonl``, joined from one decision to the next; the last stretch may be short."""
    found: list[Stretch] = []
    joined: list[Mapping[str, Any]] = []
    for row in rows:
        joined.append(row)
        after = row["samples_seen"]
        if is_decision_point(before=after - row["global_batch"], after=after, every_samples=every_samples):
            found.append(_stretch(joined))
            joined = []
    return [*found, _stretch(joined)] if joined else found


def _stretch(rows: Sequence[Mapping[str, Any]]) -> Stretch:
    samples, last = sum(row["global_batch"] for row in rows), rows[-1]
    losses = [math.nan if row["loss"] is None else row["loss"] * row["global_batch"] for row in rows]
    return Stretch(
        samples=samples,
        mean_loss=sum(losses) / samples,
        lr=last["lr"],
        stats=NoiseStats(
            verdict=Verdict(last["verdict"]),
            noise_scale=last["noise_scale"],
            low=last["noise_low"],
            high=last["noise_high"],
        ),
    )
