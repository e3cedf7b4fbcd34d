"""How does an attempt of a run begin, from nothing or from a checkpoint, and how does it end?

The session trains; a run's history is what must outlive the process: its checkpoints, its journal, and what was said to
the controller. Each has a room of its own, and they are put together here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import final

from orchestrator.config import RunConfig
from orchestrator.core.controller import Rules
from orchestrator.core.ramp import InForce
from orchestrator.errors import StorageError
from orchestrator.ports import Welcome
from orchestrator.runtime import folder
from orchestrator.runtime.at_url import bring_run, share_run
from orchestrator.runtime.budget_watch import BudgetWatch
from orchestrator.runtime.calibration import Calibration
from orchestrator.runtime.checkpoint_meta import CheckpointMeta, TakenUp
from orchestrator.runtime.checkpoints import CheckpointStore, Fault
from orchestrator.runtime.control import ControlDesk
from orchestrator.runtime.controller_talk import ControllerTalk
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.preparation import prepare, run_folder
from orchestrator.runtime.progress import Moment, Resumed
from orchestrator.runtime.resume_checks import (
    NOT_OF_THIS_VERSION,
    check_shared,
    events_of_another_version,
    of_another_version,
)
from orchestrator.runtime.saving import Saving
from orchestrator.runtime.succession import Succession
from orchestrator.runtime.trained import Trained
from orchestrator.runtime.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class _Met:
    """What rank zero shares once it has met the controller."""

    welcome: Welcome
    stop: str | None  # why no step is taken


@final
class History:
    """Methods marked *collective* are called on all ranks; the others do something on rank zero only."""

    def __init__(
        self,
        config: RunConfig,
        *,
        worker: Worker,
        trained: Trained,
        rules: Rules,
        dataset_size: int,
        calibration: Calibration,
    ) -> None:
        run = run_folder(config)
        self._config = config
        self._worker = worker
        self._trained = trained
        self._dataset_size = dataset_size
        self._folder = run
        self._store = CheckpointStore(run / "checkpoints", keep=config.checkpoint.keep, collective=worker.collective)
        self.journal = Journal(config, worker=worker, rules=rules, dataset_size=dataset_size)
        self._desk = ControlDesk(run, journal=self.journal, rules=rules, workers_stay=worker.workers_stay)
        self._budget = BudgetWatch(config, run=run, worker=worker, journal=self.journal, rules=rules)
        self._meta = CheckpointMeta(
            config,
            worker=worker,
            trained=trained,
            journal=self.journal,
            calibration=calibration,
            dataset_size=dataset_size,
        )
        self.saving = Saving(
            config,
            worker=worker,
            store=self._store,
            trained=trained,
            meta=self._meta,
            journal=self.journal,
            desk=self._desk,
            budget=self._budget,
        )
        self.talk = ControllerTalk(
            config,
            run=run,
            worker=worker,
            journal=self.journal,
            desk=self._desk,
            budget=self._budget,
            saving=self.saving,
        )
        self.succession = Succession(
            run=run,
            worker=worker,
            model=trained.model,
            journal=self.journal,
            calibration=calibration,
            saving=self.saving,
            talk=self.talk,
        )

    def begin(self, *, resume: bool) -> Resumed:
        """Collective. Open the folder, load the newest whole checkpoint if there is one, and meet the controller."""
        problem: Exception | None = None
        if self._worker.rank == 0:
            try:
                if not self._worker.folder_ready:
                    prepare(self._config, resume=resume)
                bring_run(self._config)
                self.journal.open(self._folder)
            except Exception as error:  # shared below, so that no rank is left waiting
                problem = error
        problem = self._worker.collective.share(problem)
        if problem is not None:
            raise problem
        try:
            return self._resume_or_start()
        except BaseException:
            self.journal.close()
            raise

    def _resume_or_start(self) -> Resumed:
        share_run(self._config, self._worker.collective)
        check_shared(self._folder, self._worker.collective)
        trained = self._trained
        path, meta, faults = self._store.load_latest(trained.model, trained.optimizer, trained.ema)
        found = TakenUp()
        if path is not None:
            found = self._meta.take_up(meta, path)
            self.saving.saved_step = found.at.step
        self.talk.begin_at(found.at)
        # The plan is shared by rank zero, so that all begin alike whatever their own view of the fleet.
        met: _Met | Exception | None = None
        if self._worker.rank == 0:
            try:
                met = self._meet(found, faults)
            except Exception as error:  # shared, so that no rank is left waiting
                met = error
        met = self._worker.collective.share(met)
        if isinstance(met, Exception):
            raise met
        assert met is not None, "rank zero has a brain"
        return Resumed(
            step=found.at.step,
            samples_seen=found.at.samples_seen,
            now=met.welcome.now,
            pending=met.welcome.pending,
            in_force=found.in_force,
            stop=met.stop,
        )

    def _meet(self, found: TakenUp, faults: Sequence[Fault]) -> _Met:
        """Rank zero alone: meet the controller and write down the beginning."""
        for fault in faults:
            reason = f"{fault.path}: {fault.why}; the one before it is used"
            self.journal.event("checkpoint_passed_over", reason=reason, step=None, samples_seen=None)
        try:
            welcome = self._worker.controller.begin(
                found.record,
                world_size=self._worker.world_size,
                dataset_size=self._dataset_size,
                resize_cost_s=self._worker.resize_cost_s,
            )
        except NOT_OF_THIS_VERSION as error:
            if found.checkpoint is None:
                raise
            raise of_another_version(found.checkpoint, error) from error
        at = found.at
        self.journal.started(
            welcome, self._trained.model, checkpoint=found.checkpoint, step=at.step, samples_seen=at.samples_seen
        )
        try:
            self.talk.begin(welcome)
        except NOT_OF_THIS_VERSION as error:
            raise events_of_another_version(self._folder, error) from error
        if found.changes:
            reason = f"the config is another one from here on: {', '.join(map(str, found.changes))}"
            listed = [asdict(change) for change in found.changes]
            self.journal.event(
                "config_changed", reason=reason, step=at.step, samples_seen=at.samples_seen, changes=listed
            )
        return _Met(welcome=welcome, stop=self.talk.stop_reason)

    def end(self, at: Moment, *, in_force: InForce | None, finished: bool, reason: str | None) -> str:
        """Collective. Save the end state and say how the run ended; the checkpoint's path."""
        step, samples_seen = at.step, at.samples_seen
        path = self.saving.save(at, in_force=in_force, why="the end" if finished else "stopped")
        self.journal.advice(step=step, samples_seen=samples_seen)
        self._budget.end(at)
        if finished:
            self.journal.event("finished", reason=f"{samples_seen} samples seen", step=step, samples_seen=samples_seen)
        else:
            self._say_stopped(at, reason)
        self._desk.ended(path, at)
        missing = self._worker.collective.share(self.journal.sent() if self._worker.rank == 0 else None)
        if missing is not None:
            raise StorageError(missing)
        return path

    def _say_stopped(self, at: Moment, reason: str | None) -> None:
        """``reason`` is that of this rank, where it was the one that was asked to stop."""
        budget, trouble = self.talk.stop_reason, self.talk.storage_trouble
        ordered = budget is None and self._desk.wants_stop
        request = self._folder / folder.STOP_REQUEST
        asked = f"asked to by {request.name} in the run's folder" if request.exists() else "another rank was asked to"
        self.journal.event(
            "stopped",
            reason=budget or trouble or ("by order" if ordered else reason or asked),
            step=at.step,
            samples_seen=at.samples_seen,
            budget_worker_hours=None if budget is None else self._config.budget.limit_worker_hours,
            ordered=ordered,
        )
        if self.journal.is_open:
            request.unlink(missing_ok=True)

    def close(self) -> None:
        """Let what is being written be written, where training has failed meanwhile, and close the journal."""
        if self._worker.rank == 0:
            self.saving.finish(alone=True)
        self.journal.close()
