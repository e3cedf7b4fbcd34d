"""Branches: the same samples trained at several batches from one state, and that state put back after.

The trunk stands still meanwhile. The steps of a branch come to the user's loop like any others; what they change is
what ``_Kept`` holds, and nothing of them is measured, written down or counted.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, final

import torch
from torch import nn

from orchestrator.core.branching import BranchSettings, multiples_for
from orchestrator.ports import Collective
from orchestrator.runtime.run_state import RunState
from orchestrator.types import ApplyPlan, Branched


@final
class Branches:
    """A round of branches now and then; none at all without ``settings``. All ranks make the same calls."""

    def __init__(
        self,
        settings: BranchSettings | None,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        collective: Collective,
        device: torch.device,
    ) -> None:
        self._settings = settings
        self._of = (model, optimizer, scaler, device)
        self._collective = collective
        self._round: _Round | None = None

    @property
    def under_way(self) -> bool:
        return self._round is not None

    def due(self, state: RunState) -> bool:
        """Whether a round should begin from ``state``, at the boundary after a step."""
        settings = self._settings
        return settings is not None and state.round_due(settings.every_samples) and bool(self._multiples(state))

    def begin(self, trunk: RunState) -> RunState:
        """What to train in the place of ``trunk``: its first branch, by ``plan``."""
        assert self._settings is not None, "a round was due"
        self._round = _Round(trunk, self._multiples(trunk), self._settings.samples, _Kept(*self._of))
        return self._round.state

    def plan(self) -> ApplyPlan:
        """What the branch under way trains by, from its first step on: a change of the batch like any other."""
        assert self._round is not None
        return self._round.plan()

    def took(self, batch: int, loss_sum: float) -> None:
        """A step of ``batch`` samples was taken on the branch; ``loss_sum`` is over this rank's part of them."""
        assert self._round is not None
        self._round.took(batch, loss_sum)

    def diverged(self) -> None:
        """The mean gradient, which all ranks have alike, is not finite: the branch ends here."""
        assert self._round is not None
        self._round.diverged = True

    def go_on(self, *, stop: bool) -> tuple[RunState, Branched | None]:
        """Collective at the end of a branch. What to train next, and what was found if the round is over.

        A stop that any rank was asked for ends the round, without a result.
        """
        assert self._round is not None
        if not self._round.at_end_of_branch:
            return self._round.state, None
        loss_sum, stops = self._collective.sum([self._round.loss_sum, float(stop)])
        self._round.end_branch(loss_sum)
        if stops:
            return self._end(), None  # the round is due again when the run goes on
        if self._round.next_branch():
            return self._round.state, None
        found = self._round.result()
        return self.give_up(), found

    def give_up(self) -> RunState:
        """End the round; the trunk, as it was, and not to be branched here again."""
        trunk = self._end()
        trunk.round_done()
        return trunk

    def _end(self) -> RunState:
        assert self._round is not None
        trunk = self._round.trunk
        self._round.kept.put_back()
        self._round = None
        return trunk

    def _multiples(self, state: RunState) -> tuple[int, ...]:
        assert self._settings is not None
        return multiples_for(state.plan.batch, remaining=state.remaining, settings=self._settings)


class _Round:
    def __init__(self, trunk: RunState, multiples: tuple[int, ...], samples: int, kept: _Kept) -> None:
        self.trunk = trunk
        self.kept = kept
        self._samples = samples
        self._waiting = list(multiples)
        self._losses: list[tuple[int, float | None]] = []
        self._begin_branch()

    @property
    def at_end_of_branch(self) -> bool:
        return self.diverged or self.state.is_over

    def took(self, batch: int, loss_sum: float) -> None:
        self.state.took(batch)
        if 2 * (self.state.samples_seen - self.trunk.samples_seen) > self._samples:
            self.loss_sum += loss_sum
            self._loss_samples += batch

    def end_branch(self, loss_sum: float) -> None:
        """``loss_sum`` is over all ranks."""
        mean = math.inf if self.diverged else loss_sum / self._loss_samples
        self._losses.append((self._multiple, mean if math.isfinite(mean) else None))

    def next_branch(self) -> bool:
        if not self._waiting:
            return False
        self.kept.put_back()
        self._begin_branch()
        return True

    def plan(self) -> ApplyPlan:
        assert self.trunk.in_force is not None, "a plan was adopted"
        plan, target = self.trunk.plan, self.trunk.in_force.target
        batch = self._multiple * target.batch
        return ApplyPlan(
            plan=replace(plan, batch=batch),  # in the same micro-batches
            target=replace(target, batch=batch),
            lr_factor=1.0,  # for the record of a plan, and this one leaves none
            effective_step=self.state.step,
            reason=f"a branch at {self._multiple} times the batch",
        )

    def result(self) -> Branched:
        return Branched(step=self.trunk.step, batch=self.trunk.plan.batch, losses=tuple(self._losses))

    def _begin_branch(self) -> None:
        self._multiple = self._waiting.pop(0)
        self.diverged, self.loss_sum, self._loss_samples = False, 0.0, 0
        self.state = self.trunk.branch(samples=self._samples)


class _Kept:
    """All that training changes, as it was; on the device where it lives."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        device: torch.device,
    ) -> None:
        self._tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
        self._optimizer, self._optimizer_state = optimizer, copy.deepcopy(optimizer.state_dict())
        self._scaler, self._scaler_state = scaler, {} if scaler is None else copy.deepcopy(scaler.state_dict())
        self._device = device if device.type == "cuda" else None
        self._generator = torch.get_rng_state()  # what the user's own loop draws from
        self._device_generator: Any = None if self._device is None else torch.cuda.get_rng_state(self._device)

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, kept in self._tensors:
            tensor.copy_(kept)
        self._optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))  # it keeps what it is given
        if self._scaler is not None:
            self._scaler.load_state_dict(self._scaler_state)
        torch.set_rng_state(self._generator)
        if self._device is not None:
            torch.cuda.set_rng_state(self._device_generator, self._device)
