"""How do the ranks' readings by group come together? At the decisions only, in one sum of the steps since the last.

A group's squared norms are linear in the micro-batches, so each rank keeps those of its own, where they were computed;
at a decision, a checkpoint or the end the matrix of steps and groups is summed over the ranks, and rank zero's journal
takes it in step by step. The sum begins at the end of a step and is heard at the end of the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.core.groups import GroupSums
from orchestrator.measure.groups import GroupMeter, GroupReading, layers, parameter_groups
from orchestrator.measure.preconditioner import AdamPreconditioner
from orchestrator.measure.sharded import Attach
from orchestrator.ports import Collective
from orchestrator.runtime.exchange import OwnStep
from orchestrator.runtime.journal import Journal


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A finished step: what all ranks have alike, whether it decides, and this rank's part, if it was measured."""

    sums: GroupSums
    decides: bool
    reading: GroupReading | None


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A sum that has begun; ``mean_grad_sqs`` are all ranks' alike, or the second half of it, of sharded gradients."""

    steps: list[_Waiting]
    result: Callable[[], list[float]]
    mean_grad_sqs: list[list[float]] | None


@final
class GroupNoise:
    """One rank's part of the measurement by group; does nothing where the config asks for none."""

    def __init__(
        self,
        config: RunConfig,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        trained: list[nn.Parameter],
        collective: Collective,
        journal: Journal,
        attach: Attach | None = None,
    ) -> None:
        """``attach`` is given where the parameters are sharded (``GroupMeter``)."""
        groups: dict[str, list[nn.Parameter]] = {}
        if config.measure.groups != "none":
            groups = layers(model, trained) if config.measure.groups == "layers" else parameter_groups(optimizer)
        preconditioner = AdamPreconditioner(optimizer) if config.measure.preconditioned else None
        wanted = bool(groups) or preconditioner is not None
        attaching = {} if attach is None else {"attach": attach}
        self._meter = GroupMeter(groups, preconditioner=preconditioner, **attaching) if wanted else None
        self._sharded = attach is not None
        self._collective = collective
        self._journal = journal
        self._measured = False
        self._reading: GroupReading | None = None
        self._waiting: list[_Waiting] = []
        self._under_way: _UnderWay | None = None

    def begin_step(self, *, measure: bool) -> None:
        self._measured, self._reading = measure, None
        if self._meter is not None:
            self._meter.begin_step(measure=measure)

    def end_micro_batch(self, *, size: int, loss_scale: float) -> None:
        if self._meter is not None and self._measured:
            self._meter.end_micro_batch(size=size, loss_scale=loss_scale)

    def read(self, *, grad_scale: float) -> None:
        """Read the step's gradients, before the optimizer uses them."""
        if self._meter is not None and self._measured:
            self._reading = self._meter.read(grad_scale=grad_scale)

    def add(self, step: OwnStep) -> None:
        """Collective at decisions. Take in the step just read, now finished."""
        if self._meter is None:
            return
        self._finish()
        sums = GroupSums(
            step=step.step,
            samples_seen=step.samples_seen,
            batch=step.plan.batch,
            micro_batches=step.plan.num_micro_batches,
            lr=step.lr,
        )
        self._waiting.append(_Waiting(sums, step.decides, self._reading))
        if step.decides:
            self._begin()

    def settle(self) -> None:
        """Collective. Bring together all that waits: what follows saves the averages."""
        if self._meter is not None:
            self._finish()
            if self._waiting:
                self._begin()
                self._finish()

    def give_up(self) -> None:
        """Forget the steps that no sum told of: a part of them is lost."""
        self._waiting, self._under_way = [], None

    def close(self) -> None:
        if self._meter is not None:
            self._meter.close()

    def _begin(self) -> None:
        steps, self._waiting = self._waiting, []
        readings = [step.reading for step in steps if step.reading is not None]
        # The one host synchronisation.
        own = _rows([reading.weighted_sq_sum for reading in readings])
        means = _rows([reading.mean_grad_sq for reading in readings])
        summed = own + means if self._sharded else own
        result = self._collective.start_sum([number for row in summed for number in row]) if own else list
        self._under_way = _UnderWay(steps, result, None if self._sharded else means)

    def _finish(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        assert self._meter is not None, "nothing begins without it"
        numbers, width = under_way.result(), len(self._meter.names)
        found = [numbers[first : first + width] for first in range(0, len(numbers), width)]
        means = iter(found[len(found) // 2 :] if under_way.mean_grad_sqs is None else under_way.mean_grad_sqs)
        rows = iter(found)
        finished = [
            (step.sums, step.decides)
            if step.reading is None
            else (replace(step.sums, weighted_sq_sums=next(rows), mean_grad_sqs=next(means)), step.decides)
            for step in under_way.steps
        ]
        self._journal.group_steps(finished, self._meter.names)


def _rows(vectors: list[Tensor]) -> list[list[float]]:
    found: list[list[float]] = torch.stack(vectors).tolist() if vectors else []
    return found
