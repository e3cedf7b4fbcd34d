"""A worker's way to hear who trains together: the controller tells it on the actor's thread, training listens.

``orchestrator.ports.Membership`` under Ray Train. One door a worker process, there before training begins in it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import ray

from orchestrator.ports import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the controller sees of a worker."""

    generation: int  # of the group that it trains in; -1 before the first
    received: int  # the newest group whose state it has; it may train in it soon
    reports: int  # made by each worker when that group was formed
    ready: bool  # to join
    broken: int  # the generation of the newest group that it found broken; -1: none
    why: str  # that was
    left: bool
    beats: int  # signs of life of training so far
    quiet_s: float  # since the last
    waits: bool  # for the others

    def hangs(self, *, longest_s: float) -> bool:
        """Whether training stands still there, other than while it begins or waits for others."""
        return self.beats > 0 and not self.waits and self.quiet_s > longest_s


@final
class Door:
    def __init__(self) -> None:
        self.member: str = ray.get_runtime_context().get_actor_id() or ""
        self._changed = threading.Condition()
        self._view: View | None = None
        self._generation = -1
        self._received = -1
        self._reports = 0
        self._ready = False
        self._broken, self._why = -1, ""
        self._left = False
        self._beats, self._beat_s = 0, time.monotonic()
        self._waits = False

    # The training thread

    @property
    def joins(self) -> bool:
        return self._generation < 0 and (self._view is None or self._view.generation > 0)

    def latest(self) -> View | None:
        return self._view

    def wait(self, *, newer_than: int, timeout_s: float) -> View | None:
        with self._changed:
            told = self._changed.wait_for(
                lambda: self._view is not None and self._view.generation > newer_than, timeout=timeout_s
            )
            return self._view if told else None

    def ready(self) -> None:
        self._ready = True
        self.beat(waits=True)  # for the others to take it in

    def broken(self, why: str) -> None:
        self._why, self._broken = why, self._generation
        self.beat(waits=True)  # for the controller, and then for those who are left

    def received(self, view: View, carried: Mapping[str, Any]) -> None:
        from ray.train.v2._internal.execution.context import get_train_context

        context = get_train_context()
        with context.report_order_condition:
            # Counted on from here also by one who is left alone with it, before that group is formed.
            if self._generation < 0 or view.lost is not None:
                context.report_call_index = context.current_report_index = carried["reports"]
                context.collective_seq = carried["collectives"]
        with self._changed:
            self._received, self._reports = view.generation, carried["reports"]

    def formed(self, view: View, carried: Mapping[str, Any]) -> None:
        # Imported where groups change, and only there: a run whose Ray has them elsewhere never comes here.
        from ray.train.torch.config import _set_torch_distributed_env_vars
        from ray.train.v2._internal.execution.context import DistributedContext, get_train_context

        rank = view.rank_of(self.member)
        assert rank is not None, "only members form a group"
        place = view.places[rank]
        context = get_train_context()
        context.distributed_context = DistributedContext(
            world_rank=rank,
            world_size=len(view.members),
            local_rank=place.local_rank,
            local_world_size=place.local_world_size,
            node_rank=place.node_rank,
        )
        _set_torch_distributed_env_vars()  # from the context, for those who read them there
        self.received(view, carried)
        with self._changed:
            self._generation = view.generation
        if self._beats:  # else training has yet to begin
            self.beat(waits=False)

    def carry(self) -> dict[str, Any]:
        from ray.train.v2._internal.execution.context import get_train_context

        context = get_train_context()
        return {"reports": context.report_call_index, "collectives": context.collective_seq}

    @property
    def is_broken(self) -> bool:
        """Whether the group at hand was found broken, and none took its place yet."""
        return 0 <= self._generation <= self._broken

    def left(self) -> None:
        self._left = True

    def beat(self, *, waits: bool) -> None:
        self._beats, self._beat_s, self._waits = self._beats + 1, time.monotonic(), waits

    # The actor's thread

    def tell(self, view: View) -> None:
        with self._changed:
            if self._view is None or view.generation > self._view.generation:
                self._view = view
            self._changed.notify_all()

    def standing(self) -> Standing:
        with self._changed:
            return Standing(
                generation=self._generation,
                received=self._received,
                reports=self._reports,
                ready=self._ready,
                broken=self._broken,
                why=self._why,
                left=self._left,
                beats=self._beats,
                quiet_s=time.monotonic() - self._beat_s,
                waits=self._waits,
            )


_lock = threading.Lock()
_door: Door | None = None


def the_door() -> Door:
    """This process's."""
    global _door
    with _lock:
        if _door is None:
            _door = Door()
        return _door


def tell(view: View) -> None:
    """Run on a worker actor by the controller."""
    the_door().tell(view)


def standing() -> Standing:
    """Run on a worker actor by the controller."""
    return the_door().standing()
