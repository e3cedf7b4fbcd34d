"""Rank zero's eye on the budget: what was used, told to the controller now and then, and written down at each tenth.

Worker-hours are counted as one outside would: from the start of the workers' processes, with what earlier attempts used
(see ``spending``). The controller answers with a stop in time to save and end within the budget. What is kept back for
that is what may still happen until the stop is heard: steps, and the evaluations and regular checkpoints that are due.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import final

from orchestrator.config import RunConfig
from orchestrator.core import budget
from orchestrator.core.controller import Rules
from orchestrator.ports import Brain
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.progress import Moment
from orchestrator.runtime.spending import (
    ENDING_S,
    S_PER_HOUR,
    attempts,
    end_s,
    longest_pause_s,
    longest_save_s,
    save_s,
    worker_hours_of,
)
from orchestrator.runtime.worker import Worker
from orchestrator.types import Spent

_TOLD_EVERY = 0.01  # of the budget
_WRITTEN_EVERY = 0.1  # of the budget
# From one look to the next, from there until all ranks hear of the stop, and one for a controller in another process.
_LOOKS_TO_STOP = 3
_RECENT = 8  # looks; the longest of them says how far apart they may be
# What is told lags up to two looks behind the steps, and a decided batch may be larger than those of late.
_LOOKS_AHEAD = 2 * _LOOKS_TO_STOP + 2


@final
class BudgetWatch:
    """Every method does nothing where there is no budget."""

    def __init__(self, config: RunConfig, *, run: Path, worker: Worker, journal: Journal, rules: Rules) -> None:
        self._section = config.budget
        self._limit = config.budget.limit_worker_hours
        self._run, self._worker, self._journal, self._rules = run, worker, journal, rules
        self._before_worker_hours = 0.0
        self._save_s: float | None = None
        self._gaps_s: deque[float] = deque(maxlen=_RECENT)  # from look to look, without the saving of checkpoints
        self._last_gap_s = 0.0
        self._advances: deque[int] = deque([rules.base_batch], maxlen=_RECENT)  # samples, from look to look
        self._longest_pause_s = 0.0  # from look to look, where an evaluation was due
        self._saved_s = 0.0  # since the last look
        self._is_saving = False  # while training goes on
        self._looked_samples = 0
        # What a step may be followed by, each at multiples of so many samples.
        self._pauses = (config.evaluation.every_samples, config.measure.curvature_every_samples)
        self._save_every_samples = config.checkpoint.every_samples
        self._told_worker_hours = 0.0
        self._tenths = 0
        self._first: tuple[float, int] | None = None  # worker-hours and samples seen as training began
        self._looked_s = worker.now()

    def begin(self, brain: Brain, at: Moment) -> str | None:
        """Why training does not begin: the budget is used up already."""
        if self._limit is None:
            return None
        before = attempts(self._run)[:-1]  # the newest is this one
        self._longest_pause_s = longest_pause_s(self._run)
        self._looked_samples = at.samples_seen
        self._before_worker_hours = worker_hours_of(before)
        self._save_s = longest_save_s(self._run)
        spent = self._spent()
        self._tenths = int(spent.worker_hours / self._limit / _WRITTEN_EVERY)
        self._first = spent.worker_hours, at.samples_seen
        self._looked_s = self._worker.now()
        self._tell(brain, spent)
        stop = budget.used_up(self._limit, spent)
        return None if stop is None else stop.reason

    def look(self, brain: Brain, at: Moment) -> None:
        """Tell the controller where it matters, and write down each tenth."""
        if self._limit is None:
            return
        self._measure(at)
        spent = self._spent()
        left = self._limit - spent.worker_hours
        near = left < 2 * spent.reserve_worker_hours
        if near or spent.worker_hours - self._told_worker_hours >= _TOLD_EVERY * self._limit:
            self._tell(brain, spent)
        tenths = int(spent.worker_hours / self._limit / _WRITTEN_EVERY)
        if tenths > self._tenths:
            self._tenths = tenths
            self._write(spent.worker_hours, at)

    def _measure(self, at: Moment) -> None:
        """How far apart the looks are, and how long an evaluation between two of them may take."""
        now_s, seen = self._worker.now(), self._looked_samples
        gap_s = max(0.0, now_s - self._looked_s - self._saved_s)
        self._last_gap_s = gap_s
        if self._due(self._pauses, seen) or self._ends_soon(seen):
            self._longest_pause_s = max(gap_s, self._longest_pause_s)
        else:
            self._gaps_s.append(gap_s)
        if at.samples_seen > seen:
            self._advances.append(at.samples_seen - seen)
        self._looked_s, self._looked_samples, self._saved_s = now_s, at.samples_seen, 0.0

    def saved(self, took_s: float) -> None:
        """A checkpoint took so long."""
        self._save_s = max(took_s, self._save_s or 0.0)
        self._saved_s += took_s

    def saving(self) -> None:
        """A checkpoint is being written while training goes on; an end would wait for it."""
        self._is_saving = True

    def saved_meanwhile(self, took_s: float | None) -> None:
        """It took so long; ``None`` where it failed."""
        self._is_saving = False
        if took_s is not None:
            self._save_s = max(took_s, self._save_s or 0.0)

    def end(self, at: Moment) -> None:
        """What was used, with what the end of the processes will take."""
        if self._limit is not None:
            ending = ENDING_S * self._worker.world_size / S_PER_HOUR
            self._write(self._spent().worker_hours + ending, at)

    def _spent(self) -> Spent:
        workers = self._worker.world_size
        seen = self._looked_samples
        pauses = self._due(self._pauses, seen) + self._ends_soon(seen)
        kept_s = (
            _LOOKS_TO_STOP * max(self._gaps_s, default=self._last_gap_s)
            + min(pauses, _LOOKS_TO_STOP) * self._longest_pause_s
            + min(self._due((self._save_every_samples,), seen) + self._is_saving, _LOOKS_TO_STOP) * save_s(self._save_s)
            + end_s(self._save_s)
        )
        return Spent(
            worker_hours=self._before_worker_hours + self._journal.paid.worker_s / S_PER_HOUR,
            reserve_worker_hours=kept_s * workers / S_PER_HOUR,
        )

    def _due(self, each_samples: Sequence[int | None], seen: int) -> int:
        """How many come until a stop that is asked for at the next look is heard, each at multiples of its samples."""
        until = seen + _LOOKS_AHEAD * max(self._advances)
        return sum(until // each - seen // each for each in each_samples if each is not None)

    def _ends_soon(self, seen: int) -> bool:
        """Whether the last step, which an evaluation follows, may be taken by then."""
        return seen + _LOOKS_AHEAD * max(self._advances) >= self._rules.total_samples

    def _tell(self, brain: Brain, spent: Spent) -> None:
        self._told_worker_hours = spent.worker_hours
        brain.post(spent)

    def _write(self, worker_hours: float, at: Moment) -> None:
        assert self._limit is not None
        left = max(0.0, self._limit - worker_hours)
        needed = self._needed(worker_hours, at)
        reason = f"{worker_hours:.4g} of {self._limit:.4g} worker-hours used"
        money = None
        if (price := self._section.price_per_worker_hour) is not None:
            money = worker_hours * price
            reason += f", worth {money:.4g}"
        samples = self._rules.total_samples - at.samples_seen
        if needed is not None and samples > 0:
            enough = "suffices" if needed <= left else "does not suffice"
            reason += f"; {samples:,} samples are left, about {needed:.3g} worker-hours: the budget {enough}"
        self._journal.event(
            "budget",
            reason=reason,
            step=at.step,
            samples_seen=at.samples_seen,
            used_worker_hours=worker_hours,
            left_worker_hours=left,
            needed_worker_hours=needed,
            used_money=money,
            longest_pause_s=self._longest_pause_s,
        )

    def _needed(self, worker_hours: float, at: Moment) -> float | None:
        """For the samples that are left, at the pace of this attempt so far."""
        if self._first is None or at.samples_seen == self._first[1]:
            return None
        each = (worker_hours - self._first[0]) / (at.samples_seen - self._first[1])
        return each * (self._rules.total_samples - at.samples_seen)
