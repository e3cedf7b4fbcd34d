"""The controller's side of the wire: a thread in Ray Train's controller process that drains rank zero's mailbox.

One host serves one worker group, and the controller state it needs comes from that group's checkpoint, so a crash
takes nothing with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

from orchestrator.config import RunConfig
from orchestrator.ports import Commands, Welcome
from orchestrator.ray_train.mailbox import (
    Answered,
    Begin,
    Delivery,
    Drained,
    HoldFailed,
    Message,
    Posted,
    TakenOver,
    Welcomed,
    exchange,
)
from orchestrator.runtime.brain import LocalBrain, encode_state
from orchestrator.types import Event, Preempted, WorkersMissing, assert_never

logger = logging.getLogger(__name__)

_SHORTEST_S = 0.003
_LONGEST_S = 0.2
_BEFORE_START_S = 0.05

Call = Callable[[Callable[[tuple[Delivery, ...]], Drained | None], tuple[Delivery, ...]], Drained | None]


@final
class BrainHost:
    """Runs until ``close``. ``call`` runs a function on rank zero's worker and raises when that worker is gone."""

    def __init__(
        self,
        config: RunConfig,
        call: Call,
        *,
        take_resize_cost_s: Callable[[], float | None],
        notes: tuple[Mapping[str, Any], ...],
        delay_s: float = 0.0,
        goes_on: BrainHost | None = None,
        gone: Callable[[], None] = lambda: None,
    ) -> None:
        """``goes_on`` is the host of the rank zero before, which has the controller; ``gone`` is called when the worker
        does not answer."""
        self.brain: LocalBrain = LocalBrain(config) if goes_on is None else goes_on.brain
        self._thinking: threading.Lock = (
            threading.Lock() if goes_on is None else goes_on._thinking
        )  # one host at a time
        self._gone = gone
        self._call = call
        self._take_resize_cost_s = take_resize_cost_s
        self._notes = notes
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._queued: list[Delivery] = []
        self._injected: list[Event] = []
        self._closed = threading.Event()
        self._number = 0
        self.begun = False
        self.hold_failed = False
        self.wanted_workers: int | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="groundswell-brain", daemon=True)
        self._thread.start()

    def command(self, commands: Commands) -> None:
        with self._lock:
            self._queued.append(commands)

    def preempted(self, why: str) -> None:
        with self._lock:
            self._injected.append(Preempted(why=why))

    def missing(self, *, asked: int, present: int, waited_s: float) -> None:
        """The workers that were asked for did not come."""
        reason = f"{asked} workers asked for, and {present} there after {waited_s:.0f} s: training goes on with these"
        note = {"kind": "workers_missing", "reason": reason, "asked": asked, "present": present, "waited_s": waited_s}
        with self._lock:
            self._injected.append(WorkersMissing(present=present))
            self._queued.append(Commands(notes=(note,)))

    def close(self) -> tuple[Mapping[str, Any], ...]:
        """Serve no longer; the notes that did not reach the worker."""
        self._closed.set()
        with self._lock:
            waiting = [delivery for delivery in self._queued if isinstance(delivery, Commands)]
            return sum((commands.notes for commands in waiting), start=())

    def _run(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                deliveries, self._queued = tuple(self._queued), []
                injected, self._injected = self._injected, []
            if self.begun and injected:
                with self._thinking:
                    for event in injected:
                        self.brain.post(event)
                    self._want()
            try:
                drained = self._call(exchange, deliveries)
            except Exception as error:  # the worker is gone; Ray Train's own poll finds out and says why
                logger.info("rank zero does not answer: %s", error)
                with self._lock:
                    self._queued[:0] = deliveries
                self._gone()
                return
            if drained is None:
                time.sleep(_BEFORE_START_S)
                continue
            if drained.broken:
                self._gone()
            try:
                with self._thinking:
                    for message in drained.messages:
                        self._take(message)
                    self._pass_on()
            except Exception as error:  # the scaling policy raises it in the controller's own loop
                self.error = error
                return
            if not self._queued:
                due = _BEFORE_START_S if drained.due_in_s is None else drained.due_in_s
                self._closed.wait(min(max(due, _SHORTEST_S), _LONGEST_S))

    def _take(self, message: Message) -> None:
        match message:
            case Begin():
                cost_s = self._take_resize_cost_s()
                welcome = self.brain.begin(
                    message.record,
                    world_size=message.world_size,
                    dataset_size=message.dataset_size,
                    resize_cost_s=cost_s,
                )
                notes = tuple({**note, "cost_s": cost_s} if note["kind"] == "resize" else note for note in self._notes)
                self._welcome(replace(welcome, notes=notes))
                self.begun = True
                self._want()
            case Posted():
                self._number = message.number
                if message.replan:
                    self._welcome(self.brain.replan(message.event))
                else:
                    self._post(message.event)
            case TakenOver():
                notes, self._notes = self._notes, ()
                welcome = self.brain.take_over(message.told, world_size=message.world_size)
                self._welcome(replace(welcome, notes=notes))
                for step, action in self.brain.answers.items():
                    state = encode_state(self.brain.state)
                    self._queue(Answered(step=step, action=action, state=state, number=self._number))
                self.begun = True
                self._want()
            case HoldFailed():
                self.hold_failed = True
            case _:
                assert_never(message)

    def _post(self, event: Event) -> None:
        self.brain.post(event)
        step = self.brain.state.step
        if self.brain.has_answer(step):
            if self._delay_s:
                time.sleep(self._delay_s)
            state = encode_state(self.brain.state)
            self._queue(Answered(step=step, action=self.brain.answer(step), state=state, number=self._number))
        self._want()

    def _welcome(self, welcome: Welcome) -> None:
        self._queue(Welcomed(welcome=welcome, state=encode_state(self.brain.state), number=self._number))

    def _pass_on(self) -> None:
        """Hand on what the brain asks for besides decisions."""
        if not self.begun:
            return
        commands = self.brain.commands()
        if commands != Commands():
            self._queue(commands)

    def _want(self) -> None:
        self.wanted_workers = self.brain.state.requested_workers

    def _queue(self, delivery: Delivery) -> None:
        with self._lock:
            self._queued.append(delivery)
