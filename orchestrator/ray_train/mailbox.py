"""Rank zero's way to the controller, which lives in Ray Train's controller process.

Measurements do not travel by ``ray.train.report``: it waits for the controller's next poll, and would hold each step
for seconds. They wait in a bounded mailbox inside the worker; the controller's side calls ``exchange`` on the worker
actor, which runs beside the training thread, takes what is there and leaves answers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

from orchestrator.errors import SessionError
from orchestrator.ports import BrainRecord, Commands, Welcome
from orchestrator.ray_train.door import the_door
from orchestrator.types import Action, ApplyPlan, Event, GradMeasured

_CAPACITY = 4096  # events; far more than fit between two decisions, so only a dead controller fills it
_ANSWERS_KEPT = 1024
_PATIENCE_S = 300.0
_TOGETHER_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Rank zero is there, with what its checkpoint remembers."""

    record: BrainRecord
    world_size: int
    dataset_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """An event. ``number`` counts them, so that a saved state and the events after it fit together."""

    number: int
    event: Event
    replan: bool = False  # rank zero waits for a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenOver:
    """Another rank is rank zero now; what it knows of the newest steps, some of which were heard of before."""

    told: tuple[Event, ...]
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldFailed:
    """The workers could not save, and train on."""


Message = Begin | Posted | TakenOver | HoldFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcomed:
    """The answer to ``Begin``, and to a ``Posted`` event that asks for a plan."""

    welcome: Welcome
    state: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The decision taken at ``step``, and the encoded controller state after event ``number``."""

    step: int
    action: Action
    state: str
    number: int


Delivery = Welcomed | Answered | Commands


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """What was in the mailbox, and when it is worth coming again."""

    messages: tuple[Message, ...]
    due_in_s: float | None  # until the next decision is wanted; None when that is unknown
    broken: bool = False  # the group of workers that training runs in


@final
class Mailbox:
    """``orchestrator.ports.Brain`` across processes. The training thread and the actor's thread share it."""

    def __init__(self, *, every_samples: int) -> None:
        self._every_samples = every_samples
        self._changed = threading.Condition()
        self._outbox: deque[Message] = deque()
        self._answers: dict[int, Action] = {}
        self._welcomes: deque[Welcome] = deque()
        self._commands = Commands()
        self._number = 0
        self._state: str | None = None
        self._tail: deque[Posted] = deque()
        self._waiting = False
        self._latest: tuple[float, int] | None = None  # time [s] and samples seen at the newest step
        self._rate: float | None = None  # samples per second, lately
        self._rate_before: float | None = None  # the same before the newest group of steps
        self._group_from: tuple[float, int] | None = None  # time [s] and samples seen at the end of the group before

    # The training thread

    def begin(self, record: BrainRecord, *, world_size: int, dataset_size: int, resize_cost_s: float | None) -> Welcome:
        """``resize_cost_s`` is the controller's to measure here, since it outlives the workers; it is not sent."""
        self._state = record.state
        return self._ask(Begin(record=record, world_size=world_size, dataset_size=dataset_size))

    def post(self, event: Event) -> None:
        with self._changed:
            self._put(self._numbered(event))
            if isinstance(event, GradMeasured):
                self._pace(event)

    def answer(self, step: int) -> Action:
        with self._changed:
            self._wait(lambda: step in self._answers, f"the decision of step {step}")
            return self._answers[step]

    def take_over(self, told: Sequence[Event], *, world_size: int) -> Welcome:
        return self._ask(TakenOver(told=tuple(told), world_size=world_size))

    def replan(self, event: Event) -> Welcome:
        with self._changed:
            posted = self._numbered(event)
        welcome = self._ask(Posted(number=posted.number, event=event, replan=True))
        with self._changed:
            # A decision that came before, and is announced after, is cut as the new plan is.
            for step, action in self._answers.items():
                if welcome.pending is not None and isinstance(action, ApplyPlan):
                    self._answers[step] = replace(welcome.pending, reason=action.reason)
        return welcome

    def hold_failed(self) -> None:
        with self._changed:
            self._put(HoldFailed())

    def commands(self) -> Commands:
        with self._changed:
            commands, self._commands = self._commands, Commands()
            return commands

    def record(self) -> BrainRecord:
        with self._changed:
            return BrainRecord(state=self._state, tail=tuple(posted.event for posted in self._tail))

    # The actor's thread

    def exchange(self, deliveries: tuple[Delivery, ...]) -> Drained:
        """Leave ``deliveries``, take what is there."""
        with self._changed:
            for delivery in deliveries:
                self._receive(delivery)
            messages = tuple(self._outbox)
            self._outbox.clear()
            self._changed.notify_all()
            return Drained(messages=messages, due_in_s=self._due_in_s())

    def _receive(self, delivery: Delivery) -> None:
        if isinstance(delivery, Commands):
            held = self._commands
            self._commands = Commands(
                save=delivery.save or held.save,
                hold=delivery.hold or held.hold,
                regroup=delivery.regroup or held.regroup,
                stop=delivery.stop or held.stop,
                notes=held.notes + delivery.notes,
            )
            return
        if isinstance(delivery, Answered):
            self._answers[delivery.step] = delivery.action
            # A checkpoint asks for answers before they are due, so they stay; the oldest were all used long ago.
            while len(self._answers) > _ANSWERS_KEPT:
                del self._answers[next(iter(self._answers))]
        else:
            self._welcomes.append(delivery.welcome)
        self._state = delivery.state
        while self._tail and self._tail[0].number <= delivery.number:
            self._tail.popleft()

    # Under the lock

    def _numbered(self, event: Event) -> Posted:
        self._number += 1
        posted = Posted(number=self._number, event=event)
        self._tail.append(posted)
        return posted

    def _put(self, message: Message) -> None:
        self._wait(lambda: len(self._outbox) < _CAPACITY, "room in the mailbox")
        self._outbox.append(message)

    def _ask(self, message: Message) -> Welcome:
        with self._changed:
            self._put(message)
            self._wait(lambda: bool(self._welcomes), "a plan")
            return self._welcomes.popleft()

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        if ready():
            return
        self._waiting = True
        arrived = self._changed.wait_for(ready, timeout=_PATIENCE_S)
        self._waiting = False
        if not arrived:
            raise SessionError(
                f"the controller did not send {what} within {_PATIENCE_S:g} s; it is dead or cut off: resume the run"
            )

    def _pace(self, event: GradMeasured) -> None:
        """Short steps are posted several at once: the pace is that from one group's end to the next's."""
        now = time.monotonic()
        if self._latest is not None and now - self._latest[0] >= _TOGETHER_S:
            self._group_from, self._rate_before = self._latest, self._rate
        self._latest = now, event.sample.samples_seen
        if self._group_from is not None:
            rate = (self._latest[1] - self._group_from[1]) / (now - self._group_from[0])
            self._rate = rate if self._rate_before is None else 0.8 * self._rate_before + 0.2 * rate

    def _due_in_s(self) -> float | None:
        """Time until the next decision point at the present pace; nothing to wait for while somebody waits."""
        if self._waiting:
            return 0.0
        if self._rate is None or self._latest is None:
            return None
        then, seen = self._latest
        missing = self._every_samples - seen % self._every_samples
        return max(0.0, missing / self._rate - (time.monotonic() - then))


# One mailbox a worker process: the function below runs in the worker actor without the training thread's variables.
_opened: Mailbox | None = None


def open_mailbox(*, every_samples: int) -> Mailbox:
    global _opened
    _opened = Mailbox(every_samples=every_samples)
    return _opened


def exchange(deliveries: tuple[Delivery, ...]) -> Drained | None:
    """Run on rank zero's worker actor by the controller; ``None`` while training has not begun there."""
    if _opened is None:
        return None
    return replace(_opened.exchange(deliveries), broken=the_door().is_broken)
