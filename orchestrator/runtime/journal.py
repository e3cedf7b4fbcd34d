"""What is written into a run's folder while it trains: a line a step, the events, the evaluations, the curves.

Rank zero writes; on the other ranks every call is silent. Decisions are written with what was known when they were
taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from torch import nn

from orchestrator.config import RunConfig
from orchestrator.core.controller import Rules
from orchestrator.core.groups import GroupSums
from orchestrator.errors import StorageError
from orchestrator.measure.estimators import find_estimator
from orchestrator.ports import Welcome
from orchestrator.runtime import folder
from orchestrator.runtime.closing_advice import closing_advice
from orchestrator.runtime.known_noise import KnownNoise
from orchestrator.runtime.lines import (
    Spans,
    batch_norm_warning,
    decision_evidence,
    ledger_lines,
    metrics_line,
    plan_evidence,
    planned_spans,
    start_evidence,
)
from orchestrator.runtime.outlets import Outlets
from orchestrator.runtime.outlook import Outcome, Outlook
from orchestrator.runtime.paid_time import PaidTime
from orchestrator.runtime.progress import FinishedStep
from orchestrator.runtime.trackers import Note
from orchestrator.runtime.worker import Worker
from orchestrator.types import Action, ApplyPlan, NoiseStats

logger = logging.getLogger(__name__)

# What an attempt that ends, however it does, has said by then; what it has used is counted by these.
_SIGNS_OF_LIFE = ("started", "resumed", "checkpoint", "budget", "finished", "stopped", "fault")


@final
class Journal:
    """``open`` comes first on rank zero, and is not called elsewhere."""

    def __init__(self, config: RunConfig, *, worker: Worker, rules: Rules, dataset_size: int) -> None:
        self._config = config
        self._worker = worker
        self._rules = rules
        self._dataset_size = dataset_size
        self.noise = KnownNoise(rules.noise)
        self._outlook = Outlook()
        self._outlets: Outlets | None = None
        self.paid = PaidTime(worker)
        # What rank zero saw at the steps whose decisions are on their way.
        self._decided_from: dict[int, tuple[int, NoiseStats]] = {}

    @property
    def is_open(self) -> bool:
        return self._outlets is not None

    def open(self, path: Path, *, takes_over: bool = False) -> None:
        """Begin a new attempt in the folder at ``path``; ``takes_over`` from a process that wrote until now."""
        self._outlets = Outlets(self._config, path, trackers=self._worker.trackers(), now=self._worker.now)
        self.paid = PaidTime(self._worker, anew=takes_over)
        if not takes_over:
            self.paid.limit(path)

    def steps(self, finished: Sequence[FinishedStep]) -> None:
        """A line for each step. All ranks take it in, for any of them may have to go on with the folder."""
        if self._outlets is None and self._worker.membership is None:
            return
        lines = list(map(self._line, finished))
        self._append(folder.METRICS, *lines)

    def ledger(self, finished: Sequence[FinishedStep], taken: Sequence[Sequence[Spans]]) -> None:
        """Which positions each step consumed; ``taken`` holds, by rank, the spans of each step."""
        self._append(folder.LEDGER, *ledger_lines(finished, taken))

    def catch_up(self, finished: Sequence[FinishedStep]) -> None:
        """Write the lines that the one who wrote before did not come to write, of steps that were taken in already."""
        if not finished:
            return
        if self._config.ledger:
            self.planned_ledger(self._not_written(finished, folder.LEDGER))
        late = self._not_written(finished, folder.METRICS)
        self._append(folder.METRICS, *(self._metrics(step, self.noise.stats(decides=False)) for step in late))

    def planned_ledger(self, finished: Sequence[FinishedStep]) -> None:
        """The ledger of steps that a rank which is gone took part in, from their plans."""
        self.ledger(finished, planned_spans(finished))

    def _not_written(self, finished: Sequence[FinishedStep], name: str) -> list[FinishedStep]:
        assert self._outlets is not None, "open() comes first"
        last = folder.last_row(self._outlets.folder / name)
        return [step for step in finished if last is None or step.measured.sample.step > last["step"]]

    def _line(self, finished: FinishedStep) -> Mapping[str, Any]:
        measured, sample = finished.measured, finished.measured.sample
        self.noise.absorb(sample)
        if self._outlets is not None and measured.step_time_s is not None:
            outcome = self._outlook.saw(measured.step_time_s, finished.plan)
            if outcome is not None:
                self._say_outcome(outcome, step=sample.step, samples_seen=sample.samples_seen)
        stats = self.noise.stats(decides=finished.decides)
        if finished.decides:
            self._decided_from[sample.step] = (sample.samples_seen, stats)
        return self._metrics(finished, stats)

    def _metrics(self, finished: FinishedStep, stats: NoiseStats) -> Mapping[str, Any]:
        return metrics_line(finished, stats, dataset_size=self._dataset_size)

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
        reason, evidence = plan_evidence(applied, predicted_step_time_s=self._outlook.expect(applied.plan))
        self.event("plan", reason=reason, step=step, samples_seen=samples_seen, **evidence)

    def group_steps(self, steps: Sequence[tuple[GroupSums, bool]], names: Sequence[str]) -> None:
        """Take in steps by group, and write a line for each that ``decides``: its second part. As ``steps``."""
        if self._outlets is None and self._worker.membership is None:
            return
        for sums, decides in steps:
            self.noise.absorb_groups(sums, names)
            if decides:
                line = {"step": sums.step, "samples_seen": sums.samples_seen, "groups": self.noise.by_group()}
                self._append(folder.GROUPS, line)

    def evaluation(self, metrics: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        self._append(folder.EVALS, {"step": step, "samples_seen": samples_seen, **metrics})

    @property
    def decisions_on_their_way(self) -> list[int]:
        """The steps at which they were taken."""
        return sorted(self._decided_from)

    @property
    def decisions_written(self) -> list[int]:
        """The steps of those that the folder's last lines tell of, whoever wrote them; rank zero's."""
        assert self._outlets is not None, "open() comes first"
        rows = folder.recent_rows(self._outlets.folder / folder.EVENTS)
        return [row["step"] for row in rows if row["kind"] == "decision"]

    def forget_decisions(self, steps: Sequence[int]) -> None:
        """Those that rank zero writes down, or has written."""
        for step in steps:
            self._decided_from.pop(step, None)

    def decision(self, step: int, action: Action) -> None:
        """Write down the decision of ``step``, unless a checkpoint did so before it was due."""
        if step not in self._decided_from:
            return
        at, stats = self._decided_from.pop(step)
        evidence = decision_evidence(action, stats)
        self.event("decision", reason=action.reason, step=step, samples_seen=at, **evidence)

    def decisions(self, answer: Callable[[int], Action]) -> None:
        """Write down all that are on their way, with what ``answer`` says of each."""
        for step in self.decisions_on_their_way:
            self.decision(step, answer(step))

    def advice(self, *, step: int, samples_seen: int) -> None:
        """Say at the end of a run that only advises what its policy would have done, from the lines written so far."""
        if self._outlets is None or self._rules.act or self._config.controller.policy == "fixed":
            return
        reason, evidence = closing_advice(
            self._outlets.folder, self._rules, find_estimator(self._config.measure.estimator)
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
        assert self._outlets is not None, "open() comes first"
        self._outlets.follow()
        evidence = start_evidence(
            self._config, welcome.now.plan, rules=self._rules, worker=self._worker, dataset_size=self._dataset_size
        )
        self.event(
            "started" if checkpoint is None and not from_memory else "resumed",
            reason=welcome.now.reason,
            step=step,
            samples_seen=samples_seen,
            checkpoint=None if checkpoint is None else str(checkpoint),
            **evidence,
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
        return None if self._outlets is None else self._outlets.trouble(patience_s)

    def sent(self) -> str | None:
        """Wait until all of the run is at its URL, where it has one; why it is not, or ``None``."""
        return None if self._outlets is None else self._outlets.sent()

    def close(self) -> None:
        """Raises ``StorageError`` where lines could not be written to the end."""
        if self._outlets is None:
            return
        self._outlets.end_following()
        try:
            self._write_down(self._outlets.trackers_notes())
        except StorageError:
            logger.exception("what the trackers said at their end could not be written down")
        self._outlets.close()
        self._outlets = None

    def _warn_of_batch_norm(self, model: nn.Module, *, step: int, samples_seen: int) -> None:
        reason = batch_norm_warning(model, reproducible=self._config.train.reproducible)
        if reason is not None:
            logger.warning("%s", reason)
            self.event("warning", reason=reason, step=step, samples_seen=samples_seen)

    def _append(self, name: str, *rows: Mapping[str, Any]) -> None:
        if self._outlets is not None and rows:
            self._outlets.append(name, *rows)
            self._write_down(self._outlets.notes())

    def _write_down(self, notes: Iterable[Note]) -> None:
        for note in notes:
            self.note(note, step=None, samples_seen=None)
