"""The controller at work in this process: it keeps the state, feeds events to ``advance`` and hands answers out.

Rank zero owns one under torchrun and on a single process; under Ray the scaling policy owns it, in Ray Train's
controller process, and rank zero reaches it through the mailbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from orchestrator.config import RunConfig
from orchestrator.core import codec, controller, guard, noise, staffing, throughput
from orchestrator.core.controller import ControllerState, Rules
from orchestrator.ports import BrainRecord, Commands, Welcome
from orchestrator.runtime.rules import rules_from
from orchestrator.types import (
    Action,
    ApplyPlan,
    Branched,
    Event,
    GradMeasured,
    GradSample,
    Keep,
    NoiseStats,
    Ordered,
    Orders,
    PlanRejected,
    RequestWorkers,
    SaveCheckpoint,
    Spent,
    Stop,
    Target,
    Verdict,
    WorkersChanged,
    WorkersMissing,
    assert_never,
)

STATE_TYPES: Mapping[str, type] = {
    cls.__name__: cls
    for cls in (
        ControllerState,
        controller.PendingTarget,
        Target,
        throughput.StepTimes,
        throughput.Timings,
        throughput.TimedLayout,
        noise.NoiseState,
        guard.GuardState,
        GradMeasured,
        GradSample,
        NoiseStats,
        Verdict,
        PlanRejected,
        WorkersChanged,
        Branched,
        Ordered,
        Orders,
        Spent,
        WorkersMissing,
        staffing.Missing,
    )
}


def encode_state(state: ControllerState) -> str:
    return json.dumps(codec.encode(state))


def decode_state(text: str) -> ControllerState:
    state = codec.decode(json.loads(text), STATE_TYPES)
    if not isinstance(state, ControllerState):
        raise ValueError(f"expected a saved ControllerState, found {type(state).__name__}")
    return state


@final
class LocalBrain:
    """``orchestrator.ports.Brain`` by calling ``advance`` at once; ``workers_stay`` as in ``rules_from``."""

    def __init__(self, config: RunConfig, *, workers_stay: bool = False) -> None:
        self._config = config
        self._workers_stay = workers_stay
        self._state: ControllerState | None = None
        self._rules: Rules | None = None
        self._answers: dict[int, Action] = {}
        self._notes: list[Mapping[str, Any]] = []
        self._save: str | None = None
        self._stop: str | None = None

    def begin(self, record: BrainRecord, *, world_size: int, dataset_size: int, resize_cost_s: float | None) -> Welcome:
        self._rules = rules_from(self._config, dataset_size=dataset_size, workers_stay=self._workers_stay)
        if record.state is None:
            self._state = controller.init(self._rules, world_size=world_size)
            reason = "the run begins"
        else:
            # The workers were started anew since others were given up, and the cluster may be another one.
            self._state = replace(decode_state(record.state), missing=None)
            reason = "the run goes on"
        for event in record.tail:
            self.post(event)
        if self.state.world_size != world_size or resize_cost_s is not None:
            self._take(WorkersChanged(world_size=world_size, resize_cost_s=resize_cost_s))
        return Welcome(
            now=controller.current_plan(self.state, self.rules, reason=reason),
            pending=controller.pending_plan(self.state, self.rules),
        )

    @property
    def state(self) -> ControllerState:
        assert self._state is not None, "begin() comes first"
        return self._state

    @property
    def rules(self) -> Rules:
        assert self._rules is not None, "begin() comes first"
        return self._rules

    def post(self, event: Event) -> None:
        action = self._take(event)
        step = self.state.step
        match action:
            case ApplyPlan():
                self._answers[step] = action
            case Keep():
                if action.target_batch is not None:
                    self._answers[step] = action
                if action.workers is not None:
                    self._ask(action.workers)
            case RequestWorkers():
                self._ask(action)
            case SaveCheckpoint():
                self._save = action.reason
            case Stop():
                # The session counts the samples itself, and ends with the last of them.
                if self.state.samples_seen < self.rules.total_samples:
                    self._stop = action.reason
            case _:
                assert_never(action)
        for old in [s for s in self._answers if s < step - self.rules.lag_steps - 1]:
            del self._answers[old]

    def answer(self, step: int) -> Action:
        return self._answers[step]

    def has_answer(self, step: int) -> bool:
        return step in self._answers

    def replan(self, event: Event) -> Welcome:
        action = self._take(event)
        assert isinstance(action, ApplyPlan), f"{event} must be answered with a plan"
        pending = controller.pending_plan(self.state, self.rules)
        for step, answer in self._answers.items():
            if pending is not None and isinstance(answer, ApplyPlan):
                self._answers[step] = replace(pending, reason=answer.reason)
        return Welcome(now=action, pending=pending)

    def take_over(self, told: Sequence[Event], *, world_size: int) -> Welcome:
        for event in told:  # those of steps that were heard of before change nothing
            self.post(event)
        return self.replan(WorkersChanged(world_size=world_size))

    @property
    def answers(self) -> Mapping[int, Action]:
        """Decisions of late, by their steps."""
        return self._answers

    def hold_failed(self) -> None:
        raise AssertionError("this runtime never asks the workers to hold")

    def commands(self) -> Commands:
        commands = Commands(save=self._save, stop=self._stop, notes=tuple(self._notes))
        self._save, self._stop, self._notes = None, None, []
        return commands

    def record(self) -> BrainRecord:
        return BrainRecord(state=encode_state(self.state))

    def _ask(self, wanted: RequestWorkers) -> None:
        self._notes.append({"kind": "workers_wanted", "num_workers": wanted.num_workers, "reason": wanted.reason})

    def _take(self, event: Event) -> Action:
        self._state, action = controller.advance(self.state, event, self.rules)
        return action
