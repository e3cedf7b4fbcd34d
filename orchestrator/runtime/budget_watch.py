"""Rank zero's eye on the budget: what was used, told to the controller now and then, and written down at each tenth.

Worker-hours are counted as one outside would: from the start of the workers' processes, with what earlier attempts used
(see ``spending``). The controller answers with a stop in time to save and end within the budget.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import final

from orchestrator.config import RunConfig
from orchestrator.core import budget
from orchestrator.core.controller import Rules
from orchestrator.ports import Brain
from orchestrator.runtime import folder
from orchestrator.runtime.journal import Journal, Moment
from orchestrator.runtime.process_start import process_start
from orchestrator.runtime.spending import ENDING_S, S_PER_HOUR, attempts, end_s, longest_save_s, worker_hours_of
from orchestrator.runtime.worker import Worker
from orchestrator.types import Spent

_TOLD_EVERY = 0.01  # of the budget
_WRITTEN_EVERY = 0.1  # of the budget
# From one look to the next, from there until all ranks hear of the stop, and one for a controller in another process.
_LOOKS_TO_STOP = 3
_RECENT = 8  # looks; the longest of them says how far apart they may be


@final
class BudgetWatch:
    """Every method does nothing where there is no budget."""

    def __init__(self, config: RunConfig, *, run: Path, worker: Worker, journal: Journal, rules: Rules) -> None:
        self._section = config.budget
        self._limit = config.budget.limit_worker_hours
        self._run, self._worker, self._journal, self._rules = run, worker, journal, rules
        self._before_worker_hours = 0.0
        self._save_s: float | None = None
        self._gaps_s: deque[float] = deque(maxlen=_RECENT)
        self._told_worker_hours = 0.0
        self._tenths = 0
        self._first: tuple[float, int] | None = None  # worker-hours and samples seen as training began
        now = worker.wall_time()
        self.paid_since = process_start()
        if worker.rank == 0 and worker.runtime == "ray":
            self.paid_since = min(now, max(self.paid_since, self._given_to_us()))
        self._began_s = worker.now() - (now - self.paid_since)
        self._looked_s = worker.now()

    def _given_to_us(self) -> float:
        """Ray may give the run a process that it kept ready: before the run, or its last attempt, it was not paid."""
        config = self._run / folder.CONFIG  # written as the run was started
        written = config.stat().st_mtime if config.exists() else 0.0
        return max([written, *(row["time"] for row in folder.rows(self._run / folder.EVENTS))])

    def begin(self, brain: Brain, at: Moment) -> str | None:
        """Why training does not begin: the budget is used up already."""
        if self._limit is None:
            return None
        before = attempts(self._run)[:-1]  # the newest is this one
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
        now_s = self._worker.now()
        self._gaps_s.append(now_s - self._looked_s)
        self._looked_s = now_s
        spent = self._spent()
        left = self._limit - spent.worker_hours
        near = left < 2 * spent.reserve_worker_hours
        if near or spent.worker_hours - self._told_worker_hours >= _TOLD_EVERY * self._limit:
            self._tell(brain, spent)
        tenths = int(spent.worker_hours / self._limit / _WRITTEN_EVERY)
        if tenths > self._tenths:
            self._tenths = tenths
            self._write(spent.worker_hours, at)

    def saved(self, took_s: float) -> None:
        """A checkpoint took so long."""
        self._save_s = max(took_s, self._save_s or 0.0)

    def end(self, at: Moment) -> None:
        """What was used, with what the end of the processes will take."""
        if self._limit is not None:
            ending = ENDING_S * self._worker.world_size / S_PER_HOUR
            self._write(self._spent().worker_hours + ending, at)

    def _spent(self) -> Spent:
        workers = self._worker.world_size
        used_s = (self._worker.now() - self._began_s) * workers
        kept_s = _LOOKS_TO_STOP * max(self._gaps_s, default=0.0) + end_s(self._save_s)
        return Spent(
            worker_hours=self._before_worker_hours + used_s / S_PER_HOUR,
            reserve_worker_hours=kept_s * workers / S_PER_HOUR,
        )

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
        )

    def _needed(self, worker_hours: float, at: Moment) -> float | None:
        """For the samples that are left, at the pace of this attempt so far."""
        if self._first is None or at.samples_seen == self._first[1]:
            return None
        each = (worker_hours - self._first[0]) / (at.samples_seen - self._first[1])
        return each * (self._rules.total_samples - at.samples_seen)
