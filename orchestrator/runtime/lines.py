"""What does a line of a run's files say? The contents of ``metrics.jsonl``, of the ledger, and of the larger events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from torch import nn

from orchestrator.config import RunConfig
from orchestrator.core.controller import Rules
from orchestrator.runtime.progress import FinishedStep
from orchestrator.runtime.worker import Worker
from orchestrator.types import Action, ApplyPlan, BatchPlan, Keep, NoiseStats, decided_batch

Spans = Sequence[tuple[int, int]]  # (first position, size) of each micro-batch


def metrics_line(finished: FinishedStep, stats: NoiseStats, *, dataset_size: int) -> Mapping[str, Any]:
    """Of ``metrics.jsonl``; ``stats`` is what is known of the noise after the step."""
    measured, plan, sample = finished.measured, finished.plan, finished.measured.sample
    line = {
        "step": sample.step,
        "samples_seen": sample.samples_seen,
        "epoch": sample.samples_seen / dataset_size,
        "loss": sample.loss,
        "lr": finished.lr,
        "global_batch": sample.batch,
        "micro_batch": plan.micro_batch,
        "accum_steps": plan.accum_steps,
        "world_size": plan.world_size,
        "grad_sq": sample.grad_sq,
        "trace_cov": sample.trace_cov,
        "noise_scale": stats.noise_scale,
        "noise_low": stats.low,
        "noise_high": stats.high,
        "verdict": stats.verdict.value,
        "step_time_s": measured.step_time_s,
        "samples_per_s": sample.batch / measured.step_time_s if measured.step_time_s else None,
    }
    if finished.lr != sample.lr:
        line["rule_lr"] = sample.lr  # only where the momentum follows the batch; a replay goes by it
    return line


def ledger_lines(finished: Sequence[FinishedStep], taken: Sequence[Sequence[Spans]]) -> list[Mapping[str, Any]]:
    """Which positions each step consumed; ``taken`` holds, by rank, the spans of each step."""
    samples = (step.measured.sample for step in finished)
    return [
        {"step": sample.step, "samples_seen": sample.samples_seen, "ranks": [spans[i] for spans in taken]}
        for i, sample in enumerate(samples)
    ]


def planned_spans(finished: Sequence[FinishedStep]) -> list[list[Spans]]:
    """What the plan gave to each rank, by rank the spans of each step.

    Of a step that was taken it was used, for else the mean gradient had not come to be.
    """
    ranks = range(max((step.plan.world_size for step in finished), default=0))
    return [[_planned(step, rank) for step in finished] for rank in ranks]


def _planned(step: FinishedStep, rank: int) -> Spans:
    if rank >= step.plan.world_size:
        return []
    first = step.measured.sample.samples_seen - step.plan.batch
    return [(first + offset, size) for offset, size in step.plan.spans(rank)]


def decision_evidence(action: Action, stats: NoiseStats) -> dict[str, Any]:
    """What was decided, and the statistics that were known then."""
    assert isinstance(action, (ApplyPlan, Keep)), f"{action} answers no decision"
    evidence: dict[str, Any] = {
        "target_batch": decided_batch(action),
        "noise_scale": stats.noise_scale,
        "noise_low": stats.low,
        "noise_high": stats.high,
        "verdict": stats.verdict.value,
    }
    if isinstance(action, ApplyPlan):
        evidence |= {"effective_step": action.effective_step, "lr_factor": action.lr_factor}
    elif action.wish is not None:
        evidence["wished_batch"] = action.wish
    return evidence


def start_evidence(
    config: RunConfig, plan: BatchPlan, *, rules: Rules, worker: Worker, dataset_size: int
) -> dict[str, Any]:
    """What an attempt begins with, or goes on with."""
    return {
        "runtime": worker.runtime,
        "workers_stay": worker.workers_stay,
        "device": str(worker.device),
        "world_size": plan.world_size,
        "global_batch": plan.batch,
        "micro_batch": plan.micro_batch,
        "seed": config.run.seed,
        "dataset_size": dataset_size,
        "total_samples": rules.total_samples,
        "resize_cost_s": worker.resize_cost_s,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
    }


def plan_evidence(applied: ApplyPlan, *, predicted_step_time_s: float | None) -> tuple[str, dict[str, Any]]:
    """What is trained by from here on: a sentence, and the numbers."""
    plan = applied.plan
    reason = f"batch {plan.batch} = {plan.num_micro_batches} micro-batches on {plan.world_size} workers from here on"
    return reason, {
        "generation": plan.generation,
        "global_batch": plan.batch,
        "micro_batch": plan.micro_batch,
        "accum_steps": plan.accum_steps,
        "world_size": plan.world_size,
        "lr_factor": applied.lr_factor,
        "predicted_step_time_s": predicted_step_time_s,
    }


def batch_norm_warning(model: nn.Module, *, reproducible: bool) -> str | None:
    """Why its BatchNorm layers matter to the noise; ``None`` for a model without any."""
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return None
    also = "" if reproducible else ", and results on the layout"
    return (
        f"{len(layers)} BatchNorm layers ({layers[0]}, ...) normalise by the micro-batch: the gradient and its "
        f"noise depend on batch.micro_batch{also}; keep it fixed, or use GroupNorm or LayerNorm"
    )
