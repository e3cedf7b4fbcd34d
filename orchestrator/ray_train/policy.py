"""The scaling policy: asks Ray for the workers that training wants, and resizes only when nothing can be lost.

These are Ray Train internals (the 2.60 line), used in this package alone; ``seam`` lists those that live resizes rely
on. A live resize is the worker group's affair, which is told here how many workers are wanted. A restart is a
handshake: the workers are told to hold; each saves and reports; only when every rank has reported the checkpoint of
that hold is the worker group changed. Until the workers asked for are there, training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.train.v2._internal.execution.controller.state import RestartingState
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.config import ScalingConfig

from orchestrator.config import RunConfig
from orchestrator.errors import SessionError
from orchestrator.ports import Commands
from orchestrator.ray_train.host import BrainHost
from orchestrator.ray_train.metrics import FleetMetrics
from orchestrator.ray_train.resources import Request, Reserved, reserved_now

if TYPE_CHECKING:
    from orchestrator.ray_train.live_group import LiveWorkerGroup

_CALL_TIMEOUT_S = 30.0
_HOLD_PATIENCE_S = 600.0


class AdaptiveScalingPolicy(ElasticScalingPolicy):
    """Between ``min`` and ``max`` workers, as many as the controller asks for and the cluster has."""

    def __init__(
        self,
        scaling_config: ScalingConfig,
        config: RunConfig,
        *,
        answer_delay_s: float = 0.0,
        falls_back: str | None = None,
    ) -> None:
        """``falls_back`` says why workers cannot come and go while the others train, for the run's events."""
        super().__init__(scaling_config)
        self._config = config
        self._answer_delay_s = answer_delay_s
        self._wanted = config.workers.initial
        self._request = Request(
            send=self._send_resource_request,
            repeat=self._maybe_send_resource_request,
            cancel=self._cancel_resource_request,
        )
        self._host: BrainHost | None = None
        self._group_start: float | None = None
        self._hold_to: int | None = None
        self._hold_began_s = 0.0
        self._held_ranks: set[int] = set()
        self._resize_began_s: float | None = None
        self._notes: list[Mapping[str, Any]] = []
        if falls_back is not None:
            self._notes.append({"kind": "resize_falls_back", "reason": f"a resize starts all anew: {falls_back}"})
        self._metrics = FleetMetrics(config)
        self._few_since_s: float | None = None  # fewer than the fewest could be started
        self._short: tuple[int, int, float] | None = None  # (there, wanted, since when [s]) while fewer are there
        self._group: LiveWorkerGroup | None = None  # where workers come and go while the others train
        self._zero: Any = None  # rank zero's actor
        self._heir: tuple[Any, BrainHost] | None = None  # the actor of the next rank zero, where the present one leaves

    def attach(self, group: LiveWorkerGroup) -> None:
        """Its workers can change without stopping."""
        self._group = group
        group.follow(fewest=self._config.workers.min, hang_timeout_s=self._config.recovery.hang_timeout_s)

    def _get_num_workers_for_resource_request(self) -> int:
        return self._wanted

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._leave_group()
        self._group = None
        self._metrics.workers(wanted=self._wanted, present=0)
        self._request.send(self._wanted)
        possible = self._possible_workers()
        if possible < self.scaling_config.min_workers:
            self._wait_for_the_fewest(possible)
            return NoopDecision()
        self._few_since_s = None
        return self._get_resize_decision(possible)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        host = self._meet_group(worker_group_state)
        if host.error is not None:
            raise host.error
        self._metrics.workers(wanted=self._wanted, present=worker_group_state.num_workers)
        for status in worker_group_status.worker_statuses.values():
            if status.preemption_info is not None:
                host.preempted(str(status.preemption_info))
                break
        if self._group is not None:
            return self._change_live(self._group, host)
        if self._hold_to is not None:
            return self._finish_hold(host, worker_group_state.num_workers, worker_group_status)
        now = worker_group_state.num_workers
        self._follow_wish(host, now)
        if not host.begun:
            return NoopDecision()
        self._wait_for_more(host, now)
        if now == self._wanted:
            return NoopDecision()
        then = self._possible_workers()
        if then < self.scaling_config.min_workers or then == now or (then < now and self._wanted > now):
            return NoopDecision()
        self._hold_to, self._held_ranks, self._hold_began_s = then, set(), time.monotonic()
        host.hold_failed = False
        host.command(Commands(hold=f"resize from {now} to {then} workers"))
        return NoopDecision()

    def _change_live(self, group: LiveWorkerGroup, host: BrainHost) -> ScalingDecision:
        """Workers come and go beside the control loop, which therefore decides nothing itself."""
        group.look()
        if group.notes:
            host.command(Commands(notes=tuple(group.notes)))
            group.notes = []
        self._metrics.faults(group.lost)
        group.lost = 0
        now = len(group) - group.preempted
        self._follow_wish(host, now)
        if not host.begun or group.is_changing:
            return NoopDecision()
        self._wait_for_more(host, now)
        if group.recruits and self._wanted <= now:
            group.dismiss("no more workers are wanted than there are")
        if self._wanted < now or group.preempted:
            self._offer(group, host, min(now, self._wanted))
        elif ready := group.newcomers:
            self._offer(group, host, min(self._wanted, now + ready))
        elif self._wanted > now and not group.recruits and (possible := self._possible_workers()) > now:
            group.recruit(possible - now)
        return NoopDecision()

    def _offer(self, group: LiveWorkerGroup, host: BrainHost, number: int) -> None:
        """Ask rank zero for a group of so many; where it leaves itself, listen to its heir before it takes over."""
        view = group.view_with(number)
        host.command(Commands(regroup=view))
        zero = group.member(view.members[0])
        if zero.actor != self._zero:
            self._heir = zero.actor, self._host_of(zero, goes_on=host)

    def _host_of(self, zero: Any, *, goes_on: BrainHost | None) -> BrainHost:
        notes, self._notes = tuple(self._notes), []
        return BrainHost(
            self._config,
            _caller(zero),
            take_resize_cost_s=self._take_resize_cost_s,
            notes=notes,
            delay_s=self._answer_delay_s,
            goes_on=goes_on,
            gone=self._alarm,
        )

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Remember why a group had to be started again; rank zero of the next one writes it down."""
        if isinstance(current_state, RestartingState):
            reason = str(current_state.training_failed_error).strip().splitlines()
            self._notes.append({"kind": "fault", "reason": " ".join(reason[:3])[:500]})
            self._resize_began_s = None
            self._metrics.faults()

    def _finish_hold(self, host: BrainHost, now: int, worker_group_status: Any) -> ScalingDecision:
        for rank, status in worker_group_status.worker_statuses.items():
            if status.training_report is not None and "hold" in status.training_report.metrics:
                self._held_ranks.add(rank)
        if len(self._held_ranks) == now:
            # Every rank has reported the same saved checkpoint; the report handler saw them in this very poll.
            assert self._hold_to is not None, "a hold knows the size it is for"
            decision = self._get_resize_decision(self._hold_to)
            reason = f"{now} to {self._hold_to} workers"
            self._notes.append({"kind": "resize", "reason": reason, "from_workers": now, "to_workers": self._hold_to})
            self._resize_began_s, self._hold_to = self._hold_began_s, None
            self._leave_group()
            return decision
        patience_over = time.monotonic() - self._hold_began_s > _HOLD_PATIENCE_S
        if host.hold_failed or (patience_over and not self._held_ranks):
            self._hold_to = None
        return NoopDecision()

    def _wait_for_the_fewest(self, possible: int) -> None:
        now_s = time.monotonic()
        self._few_since_s = now_s if self._few_since_s is None else self._few_since_s
        waited_s, workers = now_s - self._few_since_s, self._config.workers
        if waited_s < workers.patience_s:
            return
        each = f"{workers.cpus_per_worker:g} CPUs" + f" and {workers.gpus_per_worker:g} GPUs" * bool(
            workers.gpus_per_worker
        )
        raise SessionError(
            f"the cluster had room for {possible} workers of {each} after {waited_s:.0f} s, and training needs "
            f"workers.min, {workers.min}: make room or add nodes and resume, or lower workers.min or what a worker "
            "needs, or wait longer with workers.patience_s"
        )

    def _wait_for_more(self, host: BrainHost, now: int) -> None:
        """Give up workers that do not come: the controller then asks for no more than there are."""
        if now >= self._wanted:
            self._short = None
            return
        if self._short is None or self._short[:2] != (now, self._wanted):
            self._short = now, self._wanted, time.monotonic()
        waited_s = time.monotonic() - self._short[2]
        if waited_s >= self._config.workers.patience_s:
            host.missing(asked=self._wanted, present=now, waited_s=waited_s)
            self._short = None

    def _follow_wish(self, host: BrainHost, now: int) -> None:
        wanted = self._clamp(host.wanted_workers)
        if wanted is not None:
            self._wanted = wanted
        self._request.keep(wanted=self._wanted, present=now, most=self.scaling_config.max_workers)

    def _possible_workers(self) -> int:
        reserved = self._get_reserved_resources()
        return 0 if reserved is None else min(self._wanted, self._count_possible_workers(reserved))

    def _get_reserved_resources(self) -> Reserved | None:
        return reserved_now(self._autoscaling_coordinator, str(self._requester_id))

    def _clamp(self, wanted: int | None) -> int | None:
        if wanted is None:
            return None
        return max(self.scaling_config.min_workers, min(self.scaling_config.max_workers, wanted))

    def _meet_group(self, state: Any) -> BrainHost:
        zero = state.workers[0].actor
        if self._host is None or self._group_start != state.start_time or self._zero != zero:
            goes_on = self._host if self._group_start == state.start_time else None
            heir, self._heir = self._heir, None
            self._leave_group()
            self._group_start, self._zero = state.start_time, zero
            if heir is not None and heir[0] == zero:
                self._host = heir[1]
            else:
                if heir is not None:
                    self._notes += heir[1].close()
                self._host = self._host_of(state.workers[0], goes_on=goes_on)
        return self._host

    def _alarm(self) -> None:
        if self._group is not None:
            self._group.alarm.set()

    def _leave_group(self) -> None:
        if self._host is not None:
            self._notes += self._host.close()
            self._host = None
        if self._heir is not None:
            self._notes += self._heir[1].close()
            self._heir = None
        self._hold_to = None

    def _take_resize_cost_s(self) -> float | None:
        """Time from the word to hold until the new group is ready to train; ``None`` if no resize led here."""
        began, self._resize_began_s = self._resize_began_s, None
        if began is None:
            return None
        return time.monotonic() - began


def _caller(worker: Any) -> Callable[..., Any]:
    def call(function: Callable[..., Any], *args: Any) -> Any:
        return ray.get(worker.execute_async(function, *args), timeout=_CALL_TIMEOUT_S)

    return call
