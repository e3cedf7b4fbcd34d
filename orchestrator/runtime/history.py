"""A run's memory: its checkpoints, its journal, and rank zero's talk with the controller.

The session trains; this keeps what must outlive the process. Methods marked *collective* are called on all ranks;
the others do something on rank zero only, where the files and the controller are.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from orchestrator.config import RunConfig
from orchestrator.config.differences import Difference
from orchestrator.core import codec
from orchestrator.core.controller import Rules
from orchestrator.core.ramp import InForce, Ramp
from orchestrator.errors import CheckpointError, StorageError
from orchestrator.ports import Brain, BrainRecord, View, Welcome
from orchestrator.runtime import folder
from orchestrator.runtime.announcement import Announcement
from orchestrator.runtime.at_url import bring_run, share_run
from orchestrator.runtime.brain import STATE_TYPES
from orchestrator.runtime.budget_watch import BudgetWatch
from orchestrator.runtime.calibration import Calibration
from orchestrator.runtime.checkpoints import CheckpointStore, Fault
from orchestrator.runtime.control import ControlDesk, standing_orders
from orchestrator.runtime.ema import EmaWeights, tied_names
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.patient_file import Outage
from orchestrator.runtime.preparation import prepare, run_folder
from orchestrator.runtime.progress import FinishedStep, Moment
from orchestrator.runtime.resume_checks import (
    NOT_OF_THIS_VERSION,
    changes_of_config,
    check_shared,
    events_of_another_version,
    of_another_version,
    refuse_another_run,
)
from orchestrator.runtime.rng import restore_rng, save_rng
from orchestrator.runtime.worker import Worker
from orchestrator.types import ApplyPlan, Branched, Event, Target, WorkersChanged

logger = logging.getLogger(__name__)

_RECENT = 1024  # steps; far more than a controller in another process has not heard of yet
_TRIES_APART = 0.1  # of the patience with the storage

_IN_FORCE_TYPES: Mapping[str, type] = {cls.__name__: cls for cls in (InForce, Ramp, Target)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where training begins or goes on."""

    step: int
    samples_seen: int
    now: ApplyPlan
    pending: ApplyPlan | None
    in_force: InForce | None  # with the last step of the checkpoint
    stop: str | None = None  # why no step is taken
    last_batch: int = 0  # of the step just taken, where the group changed between that step and the next


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saving:
    """A checkpoint that is written while training goes on."""

    at: Moment
    why: str
    paused_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Regroup:
    """A change of the group, as its rank zero needs to know of it."""

    before: int  # workers
    takes_over: bool  # rank zero is another process than before
    known: Sequence[FinishedStep]  # all ranks' part of them is known, and the folder may lack them
    newcomers_s: float  # how old the processes of its newcomers are, together
    lost: str | None  # what broke the group before, if something did
    began_s: float  # when training paused
    now: Callable[[], float]

    def cost_s(self) -> float:
        """What the change has taken of training so far."""
        return self.now() - self.began_s


@final
class History:
    def __init__(
        self,
        config: RunConfig,
        *,
        worker: Worker,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rules: Rules,
        dataset_size: int,
        calibration: Calibration,
        scaler: torch.amp.GradScaler | None = None,
        ema: EmaWeights | None = None,
    ) -> None:
        self._config = config
        self._calibration = calibration
        self._ema = None if ema is None else ema.tensors
        self._scaler = scaler
        self._worker = worker
        self._model = model
        self._optimizer = optimizer
        self._folder = run_folder(config)
        self._stop_request = str(self._folder / folder.STOP_REQUEST)  # looked for at every exchange
        self._store = CheckpointStore(
            self._folder / "checkpoints", keep=config.checkpoint.keep, collective=worker.collective
        )
        self._saved_step: int | None = None
        self._saving: _Saving | None = None
        self._outage = Outage(worker.now)  # of checkpoints
        self._storage_trouble: str | None = None  # that the run ends for
        self._dataset_size = dataset_size
        self.journal = Journal(config, worker=worker, rules=rules, dataset_size=dataset_size)
        self._desk = ControlDesk(self._folder, journal=self.journal, rules=rules, workers_stay=worker.workers_stay)
        self._budget = BudgetWatch(config, run=self._folder, worker=worker, journal=self.journal, rules=rules)
        self._stop_reason: str | None = None  # the controller's
        self.view: View | None = None  # of the group that the controller asked for last; rank zero's
        self._told = Moment(step=0, samples_seen=0)  # what the controller has heard of
        self._announced: ApplyPlan | None = None
        self._recent: deque[FinishedStep] = deque(maxlen=_RECENT)  # known to all ranks, where the group may change

    def begin(self, *, resume: bool) -> Resumed:
        """Collective. Open the folder, load the newest whole checkpoint if there is one, and meet the controller."""
        zero = self._worker.rank == 0
        problem: Exception | None = None
        if zero:
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
        path, meta, faults = self._store.load_latest(self._model, self._optimizer, self._ema)
        record, step, samples_seen, in_force = BrainRecord(), 0, 0, None
        changes: Sequence[Difference] = ()
        if path is not None:
            changes = changes_of_config(meta, path, self._config)
            try:
                refuse_another_run(meta, path, seed=self._config.run.seed, dataset_size=self._dataset_size)
                step, samples_seen, self._saved_step = meta["step"], meta["samples_seen"], meta["step"]
                record = BrainRecord(state=meta["controller"], tail=codec.decode(meta["controller_tail"], STATE_TYPES))
                in_force = codec.decode(meta["in_force"], _IN_FORCE_TYPES)
                self.journal.noise.remember(meta)
                self._calibration.remember(meta)
                restore_rng(meta["rng"])
                if self._scaler is not None and meta["scaler"] is not None:
                    self._scaler.load_state_dict(meta["scaler"])
            except NOT_OF_THIS_VERSION as error:
                raise of_another_version(path, error) from error
        # The plan is shared by rank zero, so that all begin alike whatever their own view of the fleet.
        begun: tuple[Welcome, str | None] | Exception | None = None
        if self._worker.rank == 0:
            try:
                begun = self._meet(record, path, faults, Moment(step=step, samples_seen=samples_seen))
                self._say_changes(changes, Moment(step=step, samples_seen=samples_seen))
            except Exception as error:  # shared, so that no rank is left waiting
                begun = error
        begun = self._worker.collective.share(begun)
        if isinstance(begun, Exception):
            raise begun
        assert begun is not None, "rank zero has a brain"
        welcome, stop = begun
        return Resumed(
            step=step,
            samples_seen=samples_seen,
            now=welcome.now,
            pending=welcome.pending,
            in_force=in_force,
            stop=stop,
        )

    def _meet(
        self, record: BrainRecord, checkpoint: Path | None, faults: Sequence[Fault], at: Moment
    ) -> tuple[Welcome, str | None]:
        """Rank zero alone: meet the controller and write down the beginning; the plan, and why no step is taken."""
        for fault in faults:
            reason = f"{fault.path}: {fault.why}; the one before it is used"
            self.journal.event("checkpoint_passed_over", reason=reason, step=None, samples_seen=None)
        try:
            welcome = self._brain.begin(
                record,
                world_size=self._worker.world_size,
                dataset_size=self._dataset_size,
                resize_cost_s=self._worker.resize_cost_s,
            )
        except NOT_OF_THIS_VERSION as error:
            if checkpoint is None:
                raise
            raise of_another_version(checkpoint, error) from error
        self.journal.started(
            welcome,
            self._model,
            checkpoint=checkpoint,
            step=at.step,
            samples_seen=at.samples_seen,
        )
        self._told, self._announced = at, welcome.pending
        try:
            standing = standing_orders(self._folder)
            if standing is not None:
                self._desk.begin(standing, self._brain, at)
            self._stop_reason = self._budget.begin(self._brain, at)
        except NOT_OF_THIS_VERSION as error:
            raise events_of_another_version(self._folder, error) from error
        return welcome, self._stop_reason

    def _say_changes(self, changes: Sequence[Difference], at: Moment) -> None:
        if not changes:
            return
        reason = f"the config is another one from here on: {', '.join(map(str, changes))}"
        listed = [asdict(change) for change in changes]
        self.journal.event("config_changed", reason=reason, step=at.step, samples_seen=at.samples_seen, changes=listed)

    def speak(self, said: Announcement, *, decided_at: Sequence[int], rest_steps: int) -> Announcement:
        """Rank zero's announcement: the decisions that are due, and what was asked meanwhile.

        Waits for a decision whose answer is late.
        """
        self._budget.look(self._brain, self._told)
        commands = self._brain.commands()
        self._stop_reason = commands.stop or self._stop_reason
        for note in commands.notes:
            self.journal.note(note, step=None, samples_seen=None)
        self._desk.take(self._brain, self._told, coming=self._coming)
        plan = None
        for step in decided_at:
            action = self._brain.answer(step)
            self.journal.decision(step, action)
            plan = action if isinstance(action, ApplyPlan) else plan
        self._announced = plan or self._announced
        requested = os.path.exists(self._stop_request) or self._desk.wants_stop or self._gives_up_on_storage()
        return replace(
            said,
            plan=plan,
            stop=said.stop or self._stop_reason is not None or requested,  # said again, should a rank be lost by then
            hold=commands.hold is not None,
            regroup=self._regroup_asked(commands.regroup),
            save=self._desk.asks_to_save() or commands.save is not None or self._tries_to_save_again(),
            saved_step=self._store.under_way if self._store.is_written else None,
            rest_steps=rest_steps,
        )

    def _tries_to_save_again(self) -> bool:
        """Whether a checkpoint failed, and some time has passed; none comes due soon where they are far apart."""
        return self._outage.tries_again(_TRIES_APART * self._config.recovery.storage_patience_s)

    def _gives_up_on_storage(self) -> bool:
        """Whether the folder could not be written for longer than the config is patient."""
        patience_s = self._config.recovery.storage_patience_s
        trouble = self.journal.storage_trouble(patience_s)
        if trouble is None and self._outage.lasted_s > patience_s:
            trouble = f"{self._outage.why}; no checkpoint was written for {self._outage.lasted_s:.0f} s"
        self._storage_trouble = trouble or self._storage_trouble
        return trouble is not None

    def _regroup_asked(self, view: View | None) -> bool:
        self.view = view or self.view
        return view is not None

    def _coming(self) -> ApplyPlan | None:
        """The decision on its way. Waits for it to be taken, where that is due."""
        for step in self.journal.decisions_on_their_way:
            action = self._brain.answer(step)
            if isinstance(action, ApplyPlan):
                return action
        before = self._announced
        return before if before is not None and before.effective_step > self._told.step else None

    def steps(self, finished: Sequence[FinishedStep]) -> None:
        """Collective when the ledger is kept. Take in finished steps, in order."""
        if self._config.ledger:
            self.journal.ledger(finished, self._worker.collective.gather([list(step.spans) for step in finished]))
        self._take_in(finished)

    def steps_in_part(self, finished: Sequence[FinishedStep]) -> None:
        """Take in steps that a rank took part in which is gone, with what it measured of them."""
        if self._config.ledger:
            self.journal.planned_ledger(finished)
        self._take_in(finished)

    def _take_in(self, finished: Sequence[FinishedStep]) -> None:
        for step in finished:
            if self._worker.rank == 0:
                self._brain.post(step.measured)
            sample = step.measured.sample
            self._told = Moment(step=sample.step + 1, samples_seen=sample.samples_seen)
        if self._worker.membership is not None:
            self._recent.extend(finished)
        self.journal.steps(finished)

    def without_the_others(self, finished: Sequence[FinishedStep]) -> None:
        """Steps of which only rank zero's part is known; a ledger cannot vouch for them, and leaves them out."""
        if not self._config.ledger:
            self.journal.steps(finished)

    def replan(self, event: Event, *, step: int, samples_seen: int) -> Welcome:
        """Collective. Hand over an event that changes the plan at once."""
        welcome: Welcome = self._worker.collective.share(self._brain.replan(event) if self._worker.rank == 0 else None)
        plan = welcome.now.plan
        self.journal.event(
            "plan_rejected",
            reason=welcome.now.reason,
            step=step,
            samples_seen=samples_seen,
            micro_batch=plan.micro_batch,
            cause=codec.encode(event),
        )
        return welcome

    def branched(self, found: Branched, *, samples_seen: int) -> None:
        """Hand over what a round of branches found."""
        if self._worker.rank != 0:
            return
        self._brain.post(found)
        losses = [[multiple * found.batch, loss] for multiple, loss in found.losses]
        said = ", ".join(f"{'none' if loss is None else format(loss, '.4g')} at {batch}" for batch, loss in losses)
        self.journal.event(
            "branches",
            reason=f"branches of the same samples end with loss {said}",
            step=found.step,
            samples_seen=samples_seen,
            losses=losses,
            cause=codec.encode(found),
        )

    def save(self, *, step: int, samples_seen: int, in_force: InForce | None, why: str) -> str:
        """Collective. Write a checkpoint of the state before ``step``; raises ``CheckpointError`` on every rank.

        One that is under way is finished first.
        """
        self.finish_save()
        now = Moment(step=step, samples_seen=samples_seen)
        if self._saved_step == step:
            path = str(self._store.path_of(step))
            self._desk.saved(path, now)
            return path
        began = time.perf_counter()
        meta = self._meta(now, in_force)
        try:
            path = str(self._store.save(self._model, self._optimizer, step=step, meta=meta, ema=self._ema))
        except CheckpointError as error:
            self._say_not_saved(error, now)
            self._desk.not_saved(str(error), now)
            raise
        self._saved_step = step
        took = time.perf_counter() - began
        self._budget.saved(took)
        self._say_saved(path, _Saving(at=now, why=why, paused_s=took), took_s=took)
        self._desk.saved(path, now)
        return path

    def begin_save(self, *, step: int, samples_seen: int, in_force: InForce | None, why: str) -> None:
        """Collective. Begin a checkpoint that is written while training goes on, once the one under way is finished.

        ``save`` is called instead where the config asks for that, or the model is sharded; it may raise.
        """
        if not (self._config.checkpoint.asynchronous and self._store.can_save_behind(self._model)):
            path = self.save(step=step, samples_seen=samples_seen, in_force=in_force, why=why)
            self._worker.report_checkpoint(path)
            return
        self.finish_save()
        began, now = time.perf_counter(), Moment(step=step, samples_seen=samples_seen)
        meta = self._meta(now, in_force)
        self._store.begin_save(self._model, self._optimizer, step=step, meta=meta, ema=self._ema)
        self._budget.saving()
        self._saving = _Saving(at=now, why=why, paused_s=time.perf_counter() - began)

    def take_in_save(self, step: int | None) -> None:
        """Collective. Finish the checkpoint of ``step``, if that is the one under way; it is known to be written."""
        if step is not None and step == self._store.under_way:
            self.finish_save()

    def finish_save(self, *, alone: bool = False) -> None:
        """Collective, or ``alone`` on rank zero. Wait for the checkpoint that is under way, if one is, and report it.

        That it failed is said, and no reason to end.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            path, took_s = self._store.finish_save(alone=alone)
        except CheckpointError as error:
            self._budget.saved_meanwhile(None)
            logger.warning("%s", error)
            self._say_not_saved(error, saving.at)
            return
        self._saved_step = saving.at.step
        self._budget.saved_meanwhile(took_s)
        self._say_saved(str(path), saving, took_s=took_s)
        if not alone:
            self._worker.report_checkpoint(str(path))

    def close(self) -> None:
        """Let what is being written be written, where training has failed meanwhile, and close the journal."""
        if self._worker.rank == 0:
            self.finish_save(alone=True)
        self.journal.close()

    def _meta(self, at: Moment, in_force: InForce | None) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors; rank zero's, and empty elsewhere."""
        if self._worker.rank != 0:
            return {}
        # Decisions that are not due yet are part of what the checkpoint knows, so they are written down with it.
        for decided_at in self.journal.decisions_on_their_way:
            self.journal.decision(decided_at, self._brain.answer(decided_at))
        record = self._brain.record()
        return {
            "step": at.step,
            "samples_seen": at.samples_seen,
            "seed": self._config.run.seed,
            "dataset_size": self._dataset_size,
            "config": self._config.model_dump(mode="json"),
            "world_size": self._worker.world_size,
            "controller": record.state,
            "controller_tail": codec.encode(record.tail),
            "in_force": codec.encode(in_force),
            **self.journal.noise.memory(),
            **self._calibration.memory(),
            "tied": tied_names(self._model),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "rng": save_rng(),
        }

    def _say_saved(self, path: str, saving: _Saving, *, took_s: float) -> None:
        self._outage.over()
        self.journal.event(
            "checkpoint",
            reason=saving.why,
            step=saving.at.step,
            samples_seen=saving.at.samples_seen,
            path=path,
            duration_s=took_s,
            paused_s=saving.paused_s,
        )

    def _say_not_saved(self, error: CheckpointError, at: Moment) -> None:
        self._outage.failed(str(error))
        self.journal.event("checkpoint_failed", reason=str(error), step=at.step, samples_seen=at.samples_seen)

    # Where the group changes while training goes on

    @property
    def told(self) -> Moment:
        """Before which step: the first of which this rank does not know what all ranks measured."""
        return self._told

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written behind training's back; the same on all ranks."""
        return self._saving is not None

    def give_up_saving(self) -> None:
        """After a rank was lost: nobody waits for the others, and what cannot be finished is left."""
        if self.journal.is_open:
            self.finish_save(alone=True)
        else:
            self._saving = None
            self._store.forget_save()

    def hand_over(self) -> dict[str, Any]:
        """Rank zero's: let go of the folder, for another one goes on with it; what that one should know."""
        self.finish_save()
        memory = self.journal.noise.memory()
        self.journal.close()
        return memory

    def live_memory(self, *, since: int) -> dict[str, Any]:
        """What a rank that is behind, or new, needs to know besides tensors; of the steps those from ``since`` on."""
        return {
            "journal": self.journal.noise.memory(),
            "calibration": self._calibration.memory(),
            "told": self._told,
            "recent": [step for step in self._recent if step.measured.sample.step >= since],
            "saved_step": self._saved_step,
            "rng": save_rng(),
        }

    def remember_live(self, memory: Mapping[str, Any], *, joins: bool) -> None:
        """What ``live_memory`` of another rank gave."""
        self.journal.noise.remember(memory["journal"])
        self._calibration.remember(memory["calibration"])
        self._recent.extend(step for step in memory["recent"] if step.measured.sample.step >= self._told.step)
        self._told, self._saved_step = memory["told"], memory["saved_step"]
        if joins:
            restore_rng(memory["rng"])

    def regrouped(self, change: Regroup, in_part: Sequence[FinishedStep]) -> Welcome:
        """Collective. Meet the controller as the group of ``change``, with the steps that are known in part only."""
        met: Welcome | Exception | None = None
        self._saved_step = None  # a rank may have been lost while it was saved, and each think otherwise of it
        # Those that were taken in before another rank was lost, and the group changed again, are known.
        in_part = [step for step in in_part if step.measured.sample.step >= self._told.step]
        if self._worker.rank == 0:
            try:
                met = self._take_over(change, in_part) if change.takes_over else self._go_on(change, in_part)
            except Exception as error:  # shared, so that no rank is left waiting
                met = error
        else:
            self._take_in(in_part)
        met = self._worker.collective.share(met)
        if isinstance(met, Exception):
            raise met
        assert met is not None, "rank zero has a brain"
        self.journal.forget_decisions(self.journal.decisions_on_their_way)  # rank zero has written them down
        return met

    def _go_on(self, change: Regroup, in_part: Sequence[FinishedStep]) -> Welcome:
        self.journal.catch_up(change.known)
        for step in change.known:  # those that the controller has heard of change nothing
            self._brain.post(step.measured)
        self.steps_in_part(in_part)
        changed = WorkersChanged(world_size=self._worker.world_size, resize_cost_s=change.cost_s())
        welcome = self._brain.replan(changed)
        self._say_regrouped(change, welcome)
        return welcome

    def _take_over(self, change: Regroup, in_part: Sequence[FinishedStep]) -> Welcome:
        """Rank zero is gone, and this rank goes on in its place: with the folder, and towards the controller."""
        self.journal.open(self._folder, takes_over=True)
        self.journal.catch_up(change.known)
        welcome = self._brain.take_over([step.measured for step in self._recent], world_size=self._worker.world_size)
        self.journal.started(
            welcome,
            self._model,
            checkpoint=None,
            step=self._told.step,
            samples_seen=self._told.samples_seen,
            from_memory=True,
        )
        self.steps_in_part(in_part)
        standing = standing_orders(self._folder)
        if standing is not None:
            self._desk.begin(standing, self._brain, self._told)
        self._stop_reason = self._budget.begin(self._brain, self._told) or self._stop_reason
        if in_part:  # which the controller has heard of only now
            changed = WorkersChanged(world_size=self._worker.world_size, resize_cost_s=None)
            welcome = self._brain.replan(changed)
        self._say_regrouped(change, welcome)
        return welcome

    def _say_regrouped(self, change: Regroup, welcome: Welcome) -> None:
        for decided_at in self.journal.decisions_on_their_way:
            self.journal.decision(decided_at, self._brain.answer(decided_at))
        self.journal.paid.regrouped(newcomers_s=change.newcomers_s)
        self._announced = welcome.pending
        if change.lost is not None:
            self.journal.event(
                "fault", reason=change.lost, step=self._told.step, samples_seen=self._told.samples_seen, survived=True
            )
        if change.before != self._worker.world_size:
            self.journal.event(
                "resize",
                reason=f"{change.before} to {self._worker.world_size} workers, without stopping",
                step=self._told.step,
                samples_seen=self._told.samples_seen,
                from_workers=change.before,
                to_workers=self._worker.world_size,
                cost_s=change.cost_s(),
                live=True,
            )

    def hold_failed(self) -> None:
        """The checkpoint of a resize could not be written: training goes on as it is."""
        if self.journal.is_open:
            self._brain.hold_failed()

    def end(
        self, *, step: int, samples_seen: int, in_force: InForce | None, finished: bool, reason: str | None
    ) -> str | None:
        """Collective. Save the end state and say how the run ended."""
        why = "the end" if finished else "stopped"
        path = self.save(step=step, samples_seen=samples_seen, in_force=in_force, why=why)
        self.journal.advice(step=step, samples_seen=samples_seen)
        self._budget.end(Moment(step=step, samples_seen=samples_seen))
        if finished:
            self.journal.event("finished", reason=f"{samples_seen} samples seen", step=step, samples_seen=samples_seen)
        else:
            ordered = self._stop_reason is None and self._desk.wants_stop
            self.journal.event(
                "stopped",
                reason=self._stop_reason or self._storage_trouble or ("by order" if ordered else reason or "asked to"),
                step=step,
                samples_seen=samples_seen,
                budget_worker_hours=None if self._stop_reason is None else self._config.budget.limit_worker_hours,
                ordered=ordered,
            )
            if self.journal.is_open:
                (self._folder / folder.STOP_REQUEST).unlink(missing_ok=True)
        self._desk.ended(path, Moment(step=step, samples_seen=samples_seen))
        missing = self._worker.collective.share(self.journal.sent() if self._worker.rank == 0 else None)
        if missing is not None:
            raise StorageError(missing)
        return path

    @property
    def _brain(self) -> Brain:
        assert self._worker.brain is not None, "only rank zero talks to the controller"
        return self._worker.brain
