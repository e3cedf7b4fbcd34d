"""What is written into a run's folder while it trains: a line a step, the events, the evaluations, the curves.

Rank zero writes; on the other ranks every call is silent. Decisions are written with what was known when they were
taken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final

from torch import nn

from orchestrator.config import RunConfig
from orchestrator.core import codec, groups, noise
from orchestrator.core.controller import Rules
from orchestrator.core.groups import GroupSums
from orchestrator.core.noise import NoiseState
from orchestrator.errors import StorageError
from orchestrator.measure.estimators import find_estimator
from orchestrator.ports import Welcome
from orchestrator.runtime import folder, tracking
from orchestrator.runtime.at_url import mirror_of
from orchestrator.runtime.brain import STATE_TYPES
from orchestrator.runtime.closing_advice import closing_advice
from orchestrator.runtime.folder import RunWriter
from orchestrator.runtime.mirror import Mirror
from orchestrator.runtime.outlook import Outcome, Outlook
from orchestrator.runtime.paid_time import PaidTime
from orchestrator.runtime.scalars import ScalarBoard
from orchestrator.runtime.trackers import Trackers, dropped
from orchestrator.runtime.worker import Worker
from orchestrator.types import Action, ApplyPlan, BatchPlan, GradMeasured, Keep, NoiseStats, decided_batch

logger = logging.getLogger(__name__)

# What an attempt that ends, however it does, has said by then; what it has used is counted by these.
_SIGNS_OF_LIFE = ("started", "resumed", "checkpoint", "budget", "finished", "stopped", "fault")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStep:
    """A step as all ranks together made it; ``spans`` is what this rank took of it: (first position, size).

    ``lr`` is what the optimizer stepped with; the controller is told that of schedule and rule, which differs where the
    momentum follows the batch, and is what noise goes with.
    """

    measured: GradMeasured
    lr: float
    plan: BatchPlan
    spans: Sequence[tuple[int, int]]
    decides: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Before which step, at how many samples: the first step that the controller has not heard of."""

    step: int
    samples_seen: int


@final
class Journal:
    """``open`` comes first on rank zero, and is not called elsewhere."""

    def __init__(self, config: RunConfig, *, worker: Worker, rules: Rules, dataset_size: int) -> None:
        self._config = config
        self._worker = worker
        self._rules = rules
        self._dataset_size = dataset_size
        self._noise = noise.init(rules.noise)
        self._stats: NoiseStats | None = None
        self._groups: dict[str, NoiseState] = {}
        self._outlook = Outlook()
        self._writer: RunWriter | None = None
        self._mirror: Mirror | None = None  # where the run is kept at a URL
        self._trackers = Trackers()
        self.paid = PaidTime(worker)
        # What rank zero saw at the steps whose decisions are on their way.
        self._decided_from: dict[int, tuple[int, NoiseStats]] = {}

    @property
    def is_open(self) -> bool:
        return self._writer is not None

    def open(self, path: Path, *, takes_over: bool = False) -> None:
        """Begin a new attempt in the folder at ``path``; ``takes_over`` from a process that wrote until now."""
        self._writer = RunWriter(path, now=self._worker.now)
        self._trackers = Trackers(self._worker.trackers())
        try:
            self._mirror = mirror_of(self._config, path, say=self._trackers.say)
        except BaseException:
            self._writer.close()
            raise
        self.paid = PaidTime(self._worker, anew=takes_over)
        if not takes_over:
            self.paid.limit(path)

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the lines after it go on as if there had been no break."""
        return {
            "noise": codec.encode(self._noise),
            "noise_stats": codec.encode(self._stats),
            "groups": codec.encode(tuple(self._groups.items())),
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for what ``memory`` did not give."""
        self._noise = codec.decode(memory["noise"], STATE_TYPES)
        self._stats = codec.decode(memory["noise_stats"], STATE_TYPES)
        self._groups = dict(codec.decode(memory.get("groups", []), STATE_TYPES))  # none before they were there

    def steps(self, finished: Sequence[FinishedStep]) -> None:
        """A line for each step. All ranks take it in, for any of them may have to go on with the folder."""
        if self._writer is None and self._worker.membership is None:
            return
        lines = list(map(self._line, finished))
        self._append(folder.METRICS, *lines)

    def ledger(self, finished: Sequence[FinishedStep], taken: Sequence[Any]) -> None:
        """Which positions each step consumed; ``taken`` holds, by rank, the spans of each step."""
        self._append(
            folder.LEDGER,
            *(
                {"step": sample.step, "samples_seen": sample.samples_seen, "ranks": [spans[i] for spans in taken]}
                for i, sample in enumerate(step.measured.sample for step in finished)
            ),
        )

    def catch_up(self, finished: Sequence[FinishedStep]) -> None:
        """Write the lines that the one who wrote before did not come to write, of steps that were taken in already."""
        if not finished:
            return
        if self._config.ledger:
            self.planned_ledger(self._not_written(finished, folder.LEDGER))
        late = self._not_written(finished, folder.METRICS)
        self._append(folder.METRICS, *(self._row(step, self._fresh_stats(decides=False)) for step in late))

    def planned_ledger(self, finished: Sequence[FinishedStep]) -> None:
        """The ledger of steps that a rank which is gone took part in: what the plan gave to each was used, for else
        the mean gradient had not come to be."""
        ranks = range(max((step.plan.world_size for step in finished), default=0))
        taken = [
            [
                [(step.measured.sample.samples_seen - step.plan.batch + offset, size) for offset, size in spans]
                for step in finished
                if (spans := step.plan.spans(rank) if rank < step.plan.world_size else ()) is not None
            ]
            for rank in ranks
        ]
        self.ledger(finished, taken)

    def _not_written(self, finished: Sequence[FinishedStep], name: str) -> list[FinishedStep]:
        assert self._writer is not None, "open() comes first"
        last = folder.last_row(self._writer.folder / name)
        return [step for step in finished if last is None or step.measured.sample.step > last["step"]]

    def _line(self, finished: FinishedStep) -> Mapping[str, Any]:
        measured, plan, sample = finished.measured, finished.plan, finished.measured.sample
        self._noise = noise.absorb(self._noise, sample, self._rules.noise)
        if self._writer is not None and measured.step_time_s is not None:
            outcome = self._outlook.saw(measured.step_time_s, plan)
            if outcome is not None:
                self._say_outcome(outcome, step=sample.step, samples_seen=sample.samples_seen)
        stats = self._fresh_stats(decides=finished.decides)
        if finished.decides:
            self._decided_from[sample.step] = (sample.samples_seen, stats)
        return self._row(finished, stats)

    def _row(self, finished: FinishedStep, stats: NoiseStats) -> Mapping[str, Any]:
        measured, plan, sample = finished.measured, finished.plan, finished.measured.sample
        row = {
            "step": sample.step,
            "samples_seen": sample.samples_seen,
            "epoch": sample.samples_seen / self._dataset_size,
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
            row["rule_lr"] = sample.lr  # only where the momentum follows the batch; a replay goes by it
        return row

    def _fresh_stats(self, *, decides: bool) -> NoiseStats:
        """The noise statistics for this step's line: made anew at every decision, and repeated in between.

        They take longer than the rest of a short step's bookkeeping, and move slowly.
        """
        if decides or self._stats is None:
            self._stats = noise.stats(self._noise, self._rules.noise)
        return self._stats

    @property
    def noise_scale(self) -> float | None:
        """As known after the last line, where its interval has two ends; rank zero's."""
        stats = noise.stats(self._noise, self._rules.noise)
        return stats.noise_scale if stats.bounded else None

    def _say_outcome(self, outcome: Outcome, *, step: int, samples_seen: int) -> None:
        took, predicted = outcome.realised_step_time_s, outcome.predicted_step_time_s
        self.event(
            "outcome",
            reason=f"a step takes {took:.4g} s, and {predicted:.4g} s was predicted",
            step=step,
            samples_seen=samples_seen,
            **asdict(outcome),
        )

    def adopted(self, applied: ApplyPlan, *, step: int, samples_seen: int) -> None:
        plan = applied.plan
        reason = (
            f"batch {plan.batch} = {plan.num_micro_batches} micro-batches on {plan.world_size} workers from here on"
        )
        self.event(
            "plan",
            reason=reason,
            step=step,
            samples_seen=samples_seen,
            generation=plan.generation,
            global_batch=plan.batch,
            micro_batch=plan.micro_batch,
            accum_steps=plan.accum_steps,
            world_size=plan.world_size,
            lr_factor=applied.lr_factor,
            predicted_step_time_s=self._outlook.expect(plan),
        )

    def group_steps(self, steps: Sequence[tuple[GroupSums, bool]], names: Sequence[str]) -> None:
        """Take in steps by group, and write a line for each that ``decides``: its second part. As ``steps``."""
        if self._writer is None and self._worker.membership is None:
            return
        for sums, decides in steps:
            self._groups = groups.absorb(self._groups, sums, self._rules.noise, names=names)
            if not decides:
                continue
            found = {name: noise.stats(state, self._rules.noise) for name, state in self._groups.items()}
            entries = {name: groups.entry(stats) for name, stats in found.items()}
            self._append(folder.GROUPS, {"step": sums.step, "samples_seen": sums.samples_seen, "groups": entries})

    def evaluation(self, metrics: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        self._append(folder.EVALS, {"step": step, "samples_seen": samples_seen, **metrics})

    @property
    def decisions_on_their_way(self) -> list[int]:
        """The steps at which they were taken."""
        return sorted(self._decided_from)

    def forget_decisions(self, steps: Sequence[int]) -> None:
        """Those that rank zero writes down now."""
        for step in steps:
            self._decided_from.pop(step, None)

    def decision(self, step: int, action: Action) -> None:
        """Write down the decision of ``step``, unless a checkpoint did so before it was due."""
        if step not in self._decided_from:
            return
        at, stats = self._decided_from.pop(step)
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
        self.event("decision", reason=action.reason, step=step, samples_seen=at, **evidence)

    def advice(self, *, step: int, samples_seen: int) -> None:
        """Say at the end of a run that only advises what its policy would have done, from the lines written so far."""
        if self._writer is None or self._rules.act or self._config.controller.policy == "fixed":
            return
        reason, evidence = closing_advice(
            self._writer.folder, self._rules, find_estimator(self._config.measure.estimator)
        )
        self.event("advice", reason=reason, step=step, samples_seen=samples_seen, **evidence)

    def started(
        self,
        welcome: Welcome,
        model: nn.Module,
        *,
        checkpoint: Path | None,
        step: int,
        samples_seen: int,
        from_memory: bool = False,
    ) -> None:
        """``from_memory``: no checkpoint was needed, for others had what a process took with it that is gone."""
        assert self._writer is not None, "open() comes first"
        self._follow(self._writer.folder)
        plan = welcome.now.plan
        self.event(
            "started" if checkpoint is None and not from_memory else "resumed",
            reason=welcome.now.reason,
            step=step,
            samples_seen=samples_seen,
            checkpoint=None if checkpoint is None else str(checkpoint),
            runtime=self._worker.runtime,
            workers_stay=self._worker.workers_stay,
            device=str(self._worker.device),
            world_size=plan.world_size,
            global_batch=plan.batch,
            micro_batch=plan.micro_batch,
            seed=self._config.run.seed,
            dataset_size=self._dataset_size,
            total_samples=self._rules.total_samples,
            resize_cost_s=self._worker.resize_cost_s,
            versions=versions(),
        )
        for note in welcome.notes:
            self.note(note, step=step, samples_seen=samples_seen)
        if checkpoint is not None or not from_memory:
            self._warn_of_batch_norm(model, step=step, samples_seen=samples_seen)

    def note(self, note: Mapping[str, Any], *, step: int | None, samples_seen: int | None) -> None:
        """An event of the cluster."""
        rest = {key: value for key, value in note.items() if key not in ("kind", "reason")}
        self.event(str(note["kind"]), reason=str(note["reason"]), step=step, samples_seen=samples_seen, **rest)

    def fault(self, error: BaseException, *, step: int, samples_seen: int) -> None:
        try:
            self.event("fault", reason=f"{type(error).__name__}: {error}", step=step, samples_seen=samples_seen)
        except StorageError:
            logger.exception("the fault could not be written down either")

    def event(self, kind: str, *, reason: str, step: int | None, samples_seen: int | None, **evidence: Any) -> None:
        row = {"time": self._worker.wall_time(), "kind": kind, "step": step, "samples_seen": samples_seen}
        if kind in _SIGNS_OF_LIFE:
            row["paid_s"] = self.paid.now_s
        self._append(folder.EVENTS, row | {"reason": reason} | evidence)

    def storage_trouble(self, patience_s: float) -> str | None:
        """Why no more lines should be kept: they have waited for too long, or are too many."""
        writer = self._writer
        if writer is None or not (writer.outage.lasted_s > patience_s or writer.is_full):
            return None
        return f"{writer.outage.why}, for {writer.outage.lasted_s:.0f} s, and {writer.waiting} lines wait"

    def sent(self) -> str | None:
        """Wait until all of the run is at its URL, where it has one; why it is not, or ``None``."""
        return None if self._mirror is None else self._mirror.wait()

    def close(self) -> None:
        """Raises ``StorageError`` where lines could not be written to the end."""
        self._trackers.close()
        try:
            self._write_notes()
        except StorageError:
            logger.exception("what the trackers said at their end could not be written down")
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _warn_of_batch_norm(self, model: nn.Module, *, step: int, samples_seen: int) -> None:
        layers = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not layers:
            return
        also = "" if self._config.train.reproducible else ", and results on the layout"
        reason = (
            f"{len(layers)} BatchNorm layers ({layers[0]}, ...) normalise by the micro-batch: the gradient and its "
            f"noise depend on batch.micro_batch{also}; keep it fixed, or use GroupNorm or LayerNorm"
        )
        logger.warning("%s", reason)
        self.event("warning", reason=reason, step=step, samples_seen=samples_seen)

    def _follow(self, path: Path) -> None:
        try:
            self._trackers.add(ScalarBoard(path / "tensorboard", now=self._worker.now))
        except OSError as error:
            self._trackers.say(dropped(ScalarBoard.name, error))
        tracking.follow(self._trackers, self._config, path, now=self._worker.now)

    def _append(self, name: str, *rows: Mapping[str, Any]) -> None:
        if self._writer is not None and rows:
            self._writer.append(name, *rows)
            self._trackers.take(name, rows)
            self._write_notes()
            for reason in self._writer.notes():
                self.event("warning", reason=reason, step=None, samples_seen=None)

    def _write_notes(self) -> None:
        for note in self._trackers.notes():
            self.note(note, step=None, samples_seen=None)


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "numpy")}
