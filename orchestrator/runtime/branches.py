"""Branches: the same samples trained at several batches from one state, and that state put back after.

The trunk stands still meanwhile. The steps of a branch come to the user's loop like any others; what they change is
what ``Kept`` holds, and nothing of them is measured, written down or counted.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import final

import torch
from torch import nn

from orchestrator.core.branching import BranchSettings, multiples_for
from orchestrator.ports import Collective
from orchestrator.runtime.kept import Kept
from orchestrator.runtime.memory import is_out_of_memory
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
        return self._settings is not None and state.round_due(self._settings) and bool(self._multiples(state))

    def begin(self, trunk: RunState, *, noise_scale: float | None) -> str | None:
        """Collective. Begin a round; why not, if not. ``noise_scale`` is rank zero's, and goes with the branches' rule.

        Without one there is nothing to compare with, and a rule that goes by it would give every branch the same rate:
        the round waits. Where memory does not suffice to keep the state, it is given up.
        """
        assert self._settings is not None, "a round was due"
        known: float | None = self._collective.share(noise_scale)
        if known is None:
            trunk.round_done(waits=True)
            return "a round of branches waits until the noise scale is known"
        kept = None
        try:
            kept = Kept(*self._of)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if self._collective.sum([float(kept is None)])[0]:
            trunk.round_done()
            return "memory does not suffice to keep the state that branches would begin from"
        assert kept is not None, "no rank ran out of memory"
        self._round = _Round(trunk, self._multiples(trunk), self._settings.samples, kept, known)
        return None

    @property
    def state(self) -> RunState:
        """What to train on, in the trunk's place."""
        assert self._round is not None
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

    def go_on(self) -> Branched | None:
        """Collective at the end of a branch. Go to the next, or end the round with what it found."""
        assert self._round is not None
        if not self._round.at_end_of_branch:
            return None
        self._round.end_branch(self._collective.sum([self._round.loss_sum])[0])
        if self._round.next_branch():
            return None
        found = self._round.result()
        self.give_up().round_done()
        return found

    def give_up(self) -> RunState:
        """End the round without a result: the trunk, as it was, where the round is still due."""
        assert self._round is not None
        trunk = self._round.trunk
        self._round.kept.put_back()
        self._round = None
        return trunk

    def _multiples(self, state: RunState) -> tuple[int, ...]:
        assert self._settings is not None
        return multiples_for(state.plan.batch, remaining=state.remaining, settings=self._settings)


class _Round:
    def __init__(
        self, trunk: RunState, multiples: tuple[int, ...], samples: int, kept: Kept, noise_scale: float
    ) -> None:
        self.trunk = trunk
        self.kept = kept
        self._samples = samples
        self._noise_scale = noise_scale
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
        batch, target = self._multiple * self.trunk.plan.batch, self.trunk.in_force.target
        # The trunk keeps the noise scale that its own batch was decided with; a larger one is decided with today's.
        scale = target.noise_scale if self._multiple == 1 else self._noise_scale
        return ApplyPlan(
            plan=replace(self.trunk.plan, batch=batch),  # in the same micro-batches
            target=replace(target, batch=batch, noise_scale=scale),
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
