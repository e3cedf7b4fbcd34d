"""A run's memory: its folder, its checkpoints, and rank zero's talk with the controller.

The session trains; this keeps what must outlive the process. Methods marked *collective* are called on all ranks;
the others do something on rank zero only, where the files and the controller are.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from orchestrator.config import RunConfig, to_yaml
from orchestrator.core import codec, noise
from orchestrator.core.controller import Rules
from orchestrator.errors import CheckpointError, StorageError
from orchestrator.ports import Brain, BrainRecord, Welcome
from orchestrator.runtime import folder
from orchestrator.runtime.announcement import Announcement
from orchestrator.runtime.brain import STATE_TYPES
from orchestrator.runtime.checkpoints import CheckpointStore
from orchestrator.runtime.folder import RunWriter
from orchestrator.runtime.outlook import Outcome, Outlook
from orchestrator.runtime.rng import restore_rng, save_rng
from orchestrator.runtime.scalars import ScalarBoard
from orchestrator.runtime.worker import Worker
from orchestrator.types import (
    Action,
    ApplyPlan,
    BatchPlan,
    Event,
    GradMeasured,
    Keep,
    NoiseStats,
    decided_batch,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where training begins or goes on."""

    step: int
    samples_seen: int
    now: ApplyPlan
    pending: ApplyPlan | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStep:
    """A step as all ranks together made it; ``spans`` is what this rank took of it: (first position, size)."""

    measured: GradMeasured
    plan: BatchPlan
    spans: Sequence[tuple[int, int]]
    decides: bool


def run_folder(config: RunConfig) -> Path:
    return Path(config.run.dir) / config.run.name


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
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._config = config
        self._scaler = scaler
        self._worker = worker
        self._model = model
        self._optimizer = optimizer
        self._rules = rules
        self._folder = run_folder(config)
        self._stop_request = str(self._folder / folder.STOP_REQUEST)  # looked for at every exchange
        self._store = CheckpointStore(
            self._folder / "checkpoints", keep=config.checkpoint.keep, collective=worker.collective
        )
        self._noise = noise.init(rules.noise)
        self._stats: NoiseStats | None = None
        self._outlook = Outlook()
        self._writer: RunWriter | None = None
        self._board: ScalarBoard | None = None
        self._saved_step: int | None = None
        self._dataset_size = 0
        # What rank zero saw at the steps whose decisions are on their way.
        self._decided_from: dict[int, tuple[int, NoiseStats]] = {}

    def begin(self, *, resume: bool, dataset_size: int) -> Resumed:
        """Collective. Open the folder, load the newest whole checkpoint if there is one, and meet the controller."""
        self._dataset_size = dataset_size
        zero = self._worker.rank == 0
        problem: Exception | None = None
        if zero:
            try:
                if not self._worker.folder_ready:
                    prepare(self._config, resume=resume)
                self._writer = RunWriter(self._folder, attempt=folder.next_attempt(self._folder))
            except Exception as error:  # shared below, so that no rank is left waiting
                problem = error
        problem = self._worker.collective.share(problem)
        if problem is not None:
            raise problem
        path, meta, faults = self._store.load_latest(self._model, self._optimizer)
        for fault in faults:
            reason = f"{fault.path}: {fault.why}; the one before it is used"
            self.event("checkpoint_passed_over", reason=reason, step=None, samples_seen=None)
        record, step, samples_seen = BrainRecord(), 0, 0
        if path is not None:
            try:
                self._refuse_another_run(meta, path)
                step, samples_seen, self._saved_step = meta["step"], meta["samples_seen"], meta["step"]
                record = BrainRecord(state=meta["controller"], tail=codec.decode(meta["controller_tail"], STATE_TYPES))
                self._noise = codec.decode(meta["noise"], STATE_TYPES)
                self._stats = codec.decode(meta["noise_stats"], STATE_TYPES)
                restore_rng(meta["rng"])
                if self._scaler is not None and meta["scaler"] is not None:
                    self._scaler.load_state_dict(meta["scaler"])
            except (KeyError, TypeError, ValueError) as error:
                raise _of_another_version(path, error) from error
        # The plan is shared by rank zero, so that all begin alike whatever their own view of the fleet.
        welcome: Welcome | Exception | None = None
        if zero:
            try:
                welcome = self._brain.begin(
                    record,
                    world_size=self._worker.world_size,
                    dataset_size=dataset_size,
                    resize_cost_s=self._worker.resize_cost_s,
                )
            except (KeyError, TypeError, ValueError) as error:  # shared, so that no rank is left waiting
                welcome = error if path is None else _of_another_version(path, error)
        welcome = self._worker.collective.share(welcome)
        if isinstance(welcome, Exception):
            raise welcome
        assert welcome is not None, "rank zero has a brain"
        if zero:
            self._announce_start(welcome, path, step=step, samples_seen=samples_seen)
        return Resumed(step=step, samples_seen=samples_seen, now=welcome.now, pending=welcome.pending)

    def speak(self, said: Announcement, *, decided_at: Sequence[int], rest_steps: int) -> Announcement:
        """Rank zero's announcement: the decisions that are due, and what was asked meanwhile.

        Waits for a decision whose answer is late.
        """
        commands = self._brain.commands()
        for note in commands.notes:
            self._note(note, step=None, samples_seen=None)
        plan = None
        for step in decided_at:
            action = self._brain.answer(step)
            self._decision(step, action)
            plan = action if isinstance(action, ApplyPlan) else plan
        requested = os.path.exists(self._stop_request)
        return replace(
            said,
            plan=plan,
            stop=said.stop or commands.stop is not None or requested,
            hold=commands.hold is not None,
            save=commands.save is not None,
            rest_steps=rest_steps,
        )

    def steps(self, finished: Sequence[FinishedStep]) -> None:
        """Collective when the ledger is kept. Take in finished steps, in order."""
        if self._config.ledger:
            taken = self._worker.collective.gather([list(step.spans) for step in finished])
            lines = [
                {"step": sample.step, "samples_seen": sample.samples_seen, "ranks": [spans[i] for spans in taken]}
                for i, sample in enumerate(step.measured.sample for step in finished)
            ]
            self._append(folder.LEDGER, *lines)
        if self._writer is not None:
            self._append(folder.METRICS, *map(self._take_in, finished))

    def _take_in(self, finished: FinishedStep) -> Mapping[str, Any]:
        """Hand a step to the controller; its line."""
        measured, plan, sample = finished.measured, finished.plan, finished.measured.sample
        self._brain.post(measured)
        self._noise = noise.absorb(self._noise, sample, self._rules.noise)
        if measured.step_time_s is not None and (outcome := self._outlook.saw(measured.step_time_s, plan)):
            self._say_outcome(outcome, step=sample.step, samples_seen=sample.samples_seen)
        stats = self._fresh_stats(decides=finished.decides)
        if finished.decides:
            self._decided_from[sample.step] = (sample.samples_seen, stats)
        row = {
            "step": sample.step,
            "samples_seen": sample.samples_seen,
            "epoch": sample.samples_seen / self._dataset_size,
            "loss": sample.loss,
            "lr": sample.lr,
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
        if self._board is not None:
            self._board.add(row, now=self._worker.now())
        return row

    def _fresh_stats(self, *, decides: bool) -> NoiseStats:
        """The noise statistics for this step's line: made anew at every decision, and repeated in between.

        They take longer than the rest of a short step's bookkeeping, and move slowly.
        """
        if decides or self._stats is None:
            self._stats = noise.stats(self._noise, self._rules.noise)
        return self._stats

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

    def evaluation(self, metrics: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        self._append(folder.EVALS, {"step": step, "samples_seen": samples_seen, **metrics})
        if self._board is not None:
            self._board.add_evaluation(metrics, samples_seen=samples_seen)

    def replan(self, event: Event, *, step: int, samples_seen: int) -> Welcome:
        """Collective. Hand over an event that changes the plan at once."""
        welcome: Welcome = self._worker.collective.share(self._brain.replan(event) if self._worker.rank == 0 else None)
        plan = welcome.now.plan
        self.event(
            "plan_rejected",
            reason=welcome.now.reason,
            step=step,
            samples_seen=samples_seen,
            micro_batch=plan.micro_batch,
            cause=codec.encode(event),
        )
        return welcome

    def save(self, *, step: int, samples_seen: int, why: str) -> str:
        """Collective. Write a checkpoint of the state before ``step``; raises ``CheckpointError`` on every rank."""
        if self._saved_step == step:
            return str(self._store.path_of(step))
        began = time.perf_counter()
        meta: dict[str, Any] = {}
        if self._worker.rank == 0:
            # Decisions that are not due yet are part of what the checkpoint knows, so they are written down with it.
            for decided_at in sorted(self._decided_from):
                self._decision(decided_at, self._brain.answer(decided_at))
            record = self._brain.record()
            meta = {
                "step": step,
                "samples_seen": samples_seen,
                "seed": self._config.run.seed,
                "dataset_size": self._dataset_size,
                "world_size": self._worker.world_size,
                "controller": record.state,
                "controller_tail": codec.encode(record.tail),
                "noise": codec.encode(self._noise),
                "noise_stats": codec.encode(self._stats),
                "scaler": None if self._scaler is None else self._scaler.state_dict(),
                "rng": save_rng(),
            }
        try:
            path = self._store.save(self._model, self._optimizer, step=step, meta=meta)
        except CheckpointError as error:
            self.event("checkpoint_failed", reason=str(error), step=step, samples_seen=samples_seen)
            raise
        self._saved_step = step
        took = time.perf_counter() - began
        self.event("checkpoint", reason=why, step=step, samples_seen=samples_seen, path=str(path), duration_s=took)
        return str(path)

    def hold_failed(self) -> None:
        """The checkpoint of a resize could not be written: training goes on as it is."""
        if self._writer is not None:
            self._brain.hold_failed()

    def end(self, *, step: int, samples_seen: int, finished: bool, reason: str | None) -> str | None:
        """Collective. Save the end state and say how the run ended."""
        path = self.save(step=step, samples_seen=samples_seen, why="the end" if finished else "stopped")
        if finished:
            self.event("finished", reason=f"{samples_seen} samples seen", step=step, samples_seen=samples_seen)
        else:
            self.event("stopped", reason=reason or "asked to", step=step, samples_seen=samples_seen)
            if self._writer is not None:
                (self._folder / folder.STOP_REQUEST).unlink(missing_ok=True)
        return path

    def fault(self, error: BaseException, *, step: int, samples_seen: int) -> None:
        try:
            self.event("fault", reason=f"{type(error).__name__}: {error}", step=step, samples_seen=samples_seen)
        except StorageError:
            logger.exception("the fault could not be written down either")

    def event(self, kind: str, *, reason: str, step: int | None, samples_seen: int | None, **evidence: Any) -> None:
        row = {"time": self._worker.wall_time(), "kind": kind, "step": step, "samples_seen": samples_seen}
        self._append(folder.EVENTS, row | {"reason": reason} | evidence)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._writer is not None:
            self._writer.close()

    @property
    def _brain(self) -> Brain:
        assert self._worker.brain is not None, "only rank zero talks to the controller"
        return self._worker.brain

    def _append(self, name: str, *rows: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.append(name, *rows)

    def _decision(self, step: int, action: Action) -> None:
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

    def _announce_start(self, welcome: Welcome, path: Path | None, *, step: int, samples_seen: int) -> None:
        self._board = ScalarBoard(self._folder / "tensorboard")
        plan = welcome.now.plan
        self.event(
            "started" if path is None else "resumed",
            reason=welcome.now.reason,
            step=step,
            samples_seen=samples_seen,
            checkpoint=None if path is None else str(path),
            runtime=self._worker.runtime,
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
            self._note(note, step=step, samples_seen=samples_seen)
        self._warn_of_batch_norm(step=step, samples_seen=samples_seen)

    def _note(self, note: Mapping[str, Any], *, step: int | None, samples_seen: int | None) -> None:
        rest = {key: value for key, value in note.items() if key not in ("kind", "reason")}
        self.event(str(note["kind"]), reason=str(note["reason"]), step=step, samples_seen=samples_seen, **rest)

    def _warn_of_batch_norm(self, *, step: int, samples_seen: int) -> None:
        layers = [name for name, m in self._model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not layers:
            return
        reason = (
            f"{len(layers)} BatchNorm layers ({layers[0]}, ...) normalise by the micro-batch: the gradient and its "
            "noise depend on batch.micro_batch, and results on the layout; keep it fixed, or use GroupNorm or LayerNorm"
        )
        logger.warning("%s", reason)
        self.event("warning", reason=reason, step=step, samples_seen=samples_seen)

    def _refuse_another_run(self, meta: Mapping[str, Any], path: Path) -> None:
        for key, now in (("seed", self._config.run.seed), ("dataset_size", self._dataset_size)):
            if meta[key] != now:
                raise CheckpointError(
                    f"checkpoint {path} was written with {key} {meta[key]}, and it is {now} now: the sample stream "
                    "would be another one; resume with the same data and seed, or begin a new run"
                )


def prepare(config: RunConfig, *, resume: bool) -> Path:
    """Make a new run's folder with its resolved config, or check the one to resume. Raises ``RunFolderError``."""
    path = run_folder(config)
    folder.create(path, resume=resume)
    try:
        (path / folder.STOP_REQUEST).unlink(missing_ok=True)
        (path / folder.CONFIG).write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write {path / folder.CONFIG}: {error}; make room or mend the storage, or choose another folder "
            "with --run-dir"
        ) from error
    return path


def _of_another_version(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the metadata of checkpoint {path} is of another version of Groundswell ({type(error).__name__}: {error}); "
        "resume with the version that wrote it, or begin a new run"
    )


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "numpy")}
