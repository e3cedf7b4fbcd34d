"""How does a run's memory go on in another group: what newcomers are told, and who writes and speaks from there?

Rank zero has the folder and the controller's ear. Where it stays, it tells the controller of the new group; where it
left in order, it has let go of the folder before; where it is gone, the next rank zero takes over with what all know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn

from orchestrator.ports import Welcome
from orchestrator.runtime.calibration import Calibration
from orchestrator.runtime.controller_talk import ControllerTalk
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.progress import FinishedStep, Moment
from orchestrator.runtime.rng import restore_rng, save_rng
from orchestrator.runtime.saving import Saving
from orchestrator.runtime.worker import Worker
from orchestrator.types import WorkersChanged


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveMemory:
    """What a rank that is behind, or new, needs to know besides tensors."""

    noise: Mapping[str, Any]
    calibration: Mapping[str, Any]
    told: Moment
    recent: Sequence[FinishedStep]
    saved_step: int | None
    rng: str  # torch's generators


@final
class Succession:
    """Methods marked *collective* are called on all ranks of a group, in the same order."""

    def __init__(
        self,
        *,
        run: Path,
        worker: Worker,
        model: nn.Module,
        journal: Journal,
        calibration: Calibration,
        saving: Saving,
        talk: ControllerTalk,
    ) -> None:
        self._run = run
        self._worker = worker
        self._model = model
        self._journal = journal
        self._calibration = calibration
        self._saving = saving
        self._talk = talk

    @property
    def told(self) -> Moment:
        """Before which step: the first of which this rank does not know what all ranks measured."""
        return self._talk.told

    @property
    def writes(self) -> bool:
        """Whether this rank has the run's folder."""
        return self._journal.is_open

    def hand_over(self) -> None:
        """Collective in the group whose rank zero leaves: it lets go of the folder, and all know what it alone knew."""
        memory = self._let_go() if self._worker.rank == 0 else None
        self._journal.noise.remember(self._worker.collective.share(memory))

    def _let_go(self) -> Mapping[str, Any]:
        self._saving.finish()
        memory = self._journal.noise.memory()
        self._journal.close()
        return memory

    def memory(self, *, since: int) -> LiveMemory:
        """What this rank knows; of the steps those from ``since`` on."""
        return LiveMemory(
            noise=self._journal.noise.memory(),
            calibration=self._calibration.memory(),
            told=self._talk.told,
            recent=self._talk.recent(since=since),
            saved_step=self._saving.saved_step,
            rng=save_rng(),
        )

    def remember(self, memory: LiveMemory, *, joins: bool) -> None:
        """What ``memory`` of another rank gave; this one ``joins`` as a newcomer, or was behind."""
        self._journal.noise.remember(memory.noise)
        self._calibration.remember(memory.calibration)
        self._talk.catch_up(memory.recent, told=memory.told)
        self._saving.saved_step = memory.saved_step
        if joins:
            restore_rng(memory.rng)

    def regrouped(self, change: Regroup, in_part: Sequence[FinishedStep]) -> Welcome:
        """Collective. Meet the controller as the group of ``change``, with the steps that are known in part only."""
        met: Welcome | Exception | None = None
        self._saving.saved_step = None  # a rank may have been lost while it was saved, and each think otherwise of it
        # Those that were taken in before another rank was lost, and the group changed again, are known.
        in_part = [step for step in in_part if step.measured.sample.step >= self._talk.told.step]
        if self._worker.rank == 0:
            try:
                met = self._take_over(change, in_part) if change.takes_over else self._go_on(change, in_part)
            except Exception as error:  # shared, so that no rank is left waiting
                met = error
        else:
            self._talk.steps_in_part(in_part)
        met = self._worker.collective.share(met)
        if isinstance(met, Exception):
            raise met
        assert met is not None, "rank zero has a brain"
        self._journal.forget_decisions(self._journal.decisions_on_their_way)  # rank zero has written them down
        return met

    def _go_on(self, change: Regroup, in_part: Sequence[FinishedStep]) -> Welcome:
        self._journal.catch_up(change.known)
        for step in change.known:  # those that the controller has heard of change nothing
            self._worker.controller.post(step.measured)
        self._talk.steps_in_part(in_part)
        changed = WorkersChanged(world_size=self._worker.world_size, resize_cost_s=change.cost_s())
        welcome = self._worker.controller.replan(changed)
        self._say(change, welcome)
        return welcome

    def _take_over(self, change: Regroup, in_part: Sequence[FinishedStep]) -> Welcome:
        """Rank zero is gone, and this rank goes on in its place: with the folder, and towards the controller."""
        controller, workers = self._worker.controller, self._worker.world_size
        self._journal.open(self._run, takes_over=True)
        # The one before may have written what this one does not know to be written.
        self._journal.forget_decisions(self._journal.decisions_written)
        self._journal.catch_up(change.known)
        welcome = controller.take_over([step.measured for step in self._talk.recent(since=0)], world_size=workers)
        self._journal.started(
            welcome,
            self._model,
            checkpoint=None,
            step=self._talk.told.step,
            samples_seen=self._talk.told.samples_seen,
            from_memory=True,
        )
        self._talk.steps_in_part(in_part)
        self._talk.attend()
        if in_part:  # which the controller has heard of only now
            welcome = controller.replan(WorkersChanged(world_size=workers, resize_cost_s=None))
        self._say(change, welcome)
        return welcome

    def _say(self, change: Regroup, welcome: Welcome) -> None:
        at, workers = self._talk.told, self._worker.world_size
        self._journal.decisions(self._worker.controller.answer)
        self._journal.paid.regrouped(newcomers_s=change.newcomers_s)
        self._talk.welcomed(welcome)
        if change.lost is not None:
            self._journal.event("fault", reason=change.lost, step=at.step, samples_seen=at.samples_seen, survived=True)
        if change.before != workers:
            self._journal.event(
                "resize",
                reason=f"{change.before} to {workers} workers, without stopping",
                step=at.step,
                samples_seen=at.samples_seen,
                from_workers=change.before,
                to_workers=workers,
                cost_s=change.cost_s(),
                live=True,
            )
