"""How is a checkpoint written while the run goes on: before training's eyes or behind its back, and if storage fails?

Each is written down as an event, answered where it was ordered, and reported to whoever keeps count of them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import final

from orchestrator.config import RunConfig
from orchestrator.core.ramp import InForce
from orchestrator.errors import CheckpointError
from orchestrator.runtime.budget_watch import BudgetWatch
from orchestrator.runtime.checkpoint_meta import CheckpointMeta
from orchestrator.runtime.checkpoints import CheckpointStore
from orchestrator.runtime.control import ControlDesk
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.patient_file import Outage
from orchestrator.runtime.progress import Moment
from orchestrator.runtime.trained import Trained
from orchestrator.runtime.worker import Worker

logger = logging.getLogger(__name__)

_TRIES_APART = 0.1  # of the patience with the storage


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A checkpoint, and how long training stood still for it."""

    at: Moment
    why: str
    paused_s: float


@final
class Saving:
    """Methods marked *collective* are called on all ranks, in the same order."""

    def __init__(
        self,
        config: RunConfig,
        *,
        worker: Worker,
        store: CheckpointStore,
        trained: Trained,
        meta: CheckpointMeta,
        journal: Journal,
        desk: ControlDesk,
        budget: BudgetWatch,
    ) -> None:
        self._asynchronous = config.checkpoint.asynchronous
        self._patience_s = config.recovery.storage_patience_s
        self._worker = worker
        self._store = store
        self._trained = trained
        self._meta = meta
        self._journal = journal
        self._desk = desk
        self._budget = budget
        self._under_way: _Begun | None = None
        self._outage = Outage(worker.now)
        self.saved_step: int | None = None  # of the newest checkpoint, as this rank knows it

    def save(self, at: Moment, *, in_force: InForce | None, why: str) -> str:
        """Collective. Write a checkpoint of the state at that moment; raises ``CheckpointError`` on every rank.

        One that is under way is finished first.
        """
        self.finish()
        if self.saved_step == at.step:
            path = str(self._store.path_of(at.step))
            self._desk.saved(path, at)
            return path
        began_s = time.perf_counter()
        meta = self._meta.collect(at, in_force)
        model, optimizer, ema = self._trained.model, self._trained.optimizer, self._trained.ema
        try:
            path = str(self._store.save(model, optimizer, step=at.step, meta=meta, ema=ema))
        except CheckpointError as error:
            self._say_failed(error, at)
            self._desk.not_saved(str(error), at)
            raise
        self.saved_step = at.step
        took_s = time.perf_counter() - began_s
        self._budget.saved(took_s)
        self._say_saved(path, _Begun(at=at, why=why, paused_s=took_s), took_s=took_s)
        self._desk.saved(path, at)
        return path

    def begin(self, at: Moment, *, in_force: InForce | None, why: str) -> None:
        """Collective. Begin a checkpoint that is written while training goes on, once the one under way is finished.

        ``save`` is called instead where the config asks for that, or the model is sharded; it may raise.
        """
        model, optimizer, ema = self._trained.model, self._trained.optimizer, self._trained.ema
        if not (self._asynchronous and self._store.can_save_behind(model)):
            self._worker.report_checkpoint(self.save(at, in_force=in_force, why=why))
            return
        self.finish()
        began_s = time.perf_counter()
        meta = self._meta.collect(at, in_force)
        self._store.begin_save(model, optimizer, step=at.step, meta=meta, ema=ema)
        self._budget.saving()
        self._under_way = _Begun(at=at, why=why, paused_s=time.perf_counter() - began_s)

    @property
    def is_under_way(self) -> bool:
        """Whether a checkpoint is being written behind training's back; the same on all ranks."""
        return self._under_way is not None

    @property
    def written_step(self) -> int | None:
        """The step whose checkpoint is under way and can be finished without waiting; only rank zero knows."""
        return self._store.under_way if self._store.is_written else None

    def take_in(self, step: int | None) -> None:
        """Collective. Finish the checkpoint of ``step``, if that is the one under way; it is known to be written."""
        if step is not None and step == self._store.under_way:
            self.finish()

    def finish(self, *, alone: bool = False) -> None:
        """Collective, or ``alone`` on rank zero. Wait for the checkpoint that is under way, if one is, and report it.

        That it failed is said, and no reason to end.
        """
        begun, self._under_way = self._under_way, None
        if begun is None:
            return
        try:
            path, took_s = self._store.finish_save(alone=alone)
        except CheckpointError as error:
            self._budget.saved_meanwhile(None)
            logger.warning("%s", error)
            self._say_failed(error, begun.at)
            return
        self.saved_step = begun.at.step
        self._budget.saved_meanwhile(took_s)
        self._say_saved(str(path), begun, took_s=took_s)
        if not alone:
            self._worker.report_checkpoint(str(path))

    def give_up(self) -> None:
        """After a rank was lost: nobody waits for the others, and what cannot be finished is left."""
        if self._journal.is_open:
            self.finish(alone=True)
        else:
            self._under_way = None
            self._store.forget_save()

    def tries_again(self) -> bool:
        """Whether a checkpoint failed, and some time has passed; none comes due soon where they are far apart."""
        return self._outage.tries_again(_TRIES_APART * self._patience_s)

    @property
    def trouble(self) -> str | None:
        """Why the run should end: no checkpoint was written for longer than the config is patient."""
        if self._outage.lasted_s <= self._patience_s:
            return None
        return f"{self._outage.why}; no checkpoint was written for {self._outage.lasted_s:.0f} s"

    def _say_saved(self, path: str, begun: _Begun, *, took_s: float) -> None:
        self._outage.over()
        self._journal.event(
            "checkpoint",
            reason=begun.why,
            step=begun.at.step,
            samples_seen=begun.at.samples_seen,
            path=path,
            duration_s=took_s,
            paused_s=begun.paused_s,
        )

    def _say_failed(self, error: CheckpointError, at: Moment) -> None:
        self._outage.failed(str(error))
        self._journal.event("checkpoint_failed", reason=str(error), step=at.step, samples_seen=at.samples_seen)
