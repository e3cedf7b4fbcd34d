"""Which reports (``ray.train.report``) every worker has made, though workers come and go between one and the next.

Ray Train pairs the first report of each worker, then the second, and so on. A worker that is lost leaves the others
apart: some have made the report at hand, and others were kept from it. So reports are numbered where they are made,
with the count that Ray keeps of them in each worker, and handed on by number, once every worker has made that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from queue import Queue
from typing import Any, Generic, TypeVar, final

from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.checkpoint.report_handler import ReportCallbackHandler
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

T = TypeVar("T")


@final
class Reports(Generic[T]):
    """Of the workers that train at present."""

    def __init__(self) -> None:
        self._since: dict[str, int] = {}
        self._made: dict[str, dict[int, T]] = {}

    def begin(self, member: str, *, since: int) -> None:
        """``member`` takes part in reports after number ``since``, and in none up to it."""
        self._since[member], self._made[member] = since, {}

    def take(self, member: str, number: int, report: T) -> None:
        """``member`` has made it; each makes its own in order."""
        self._made[member][number] = report

    def whole(self, members: Sequence[str]) -> tuple[int, list[T | None]] | None:
        """The next report that all of ``members`` have made: its number, and each one's; ``None`` of who came later.

        One that a member has passed over, since it was kept from making it, is left out. Others than ``members`` are
        not waited for.
        """
        for number in sorted({number for member in members for number in self._made[member]}):
            took_part = [member for member in members if self._since[member] < number]
            missing = [member for member in took_part if number not in self._made[member]]
            if not missing:
                found = [self._made[member].get(number) for member in members]
                self._forget(number)
                return number, found
            if any(max(self._made[member], default=-1) < number for member in missing):
                return None  # it may still come
        return None

    def _forget(self, number: int) -> None:
        self._made = {
            member: {other: report for other, report in made.items() if other > number}
            for member, made in self._made.items()
        }


def handed_on(
    reports: Reports[_TrainingReport],
    members: Sequence[str],
    results: Sequence[WorkerStatus],
    *,
    handler: ReportCallbackHandler,
    manager: CheckpointManager,
) -> list[WorkerStatus]:
    """Take in what a poll of ``members`` found, and give Ray Train the next report that all have made in its place."""
    for member, result in zip(members, results, strict=True):
        if result.training_report is not None:
            reports.take(member, result.training_report.number, result.training_report)
    # Where the nodes of some are taken, and the others cannot go on without them, Ray waits for the others alone.
    ranks = handler._get_required_ranks()
    whole = reports.whole([members[rank] for rank in ranks])
    given = [replace(result, training_report=None) for result in results]
    if whole is None:
        return given
    number, found = whole
    manager._current_report_index = number - 1  # it counts on by one, and not those that were left out
    for rank, report in zip(ranks, found, strict=True):
        blank = _TrainingReport(checkpoint=None, metrics={}, validation=False)
        # Training is not over before all reports were handed on, of which there is one at a time.
        given[rank] = replace(given[rank], training_report=report or blank, running=True)
    return given


class _NumberedQueue(Queue[Any]):
    """Ray's queue of a worker's reports, of which each gets its number as it is put there."""

    def __init__(self, context: Any) -> None:
        super().__init__(maxsize=1)
        self._context = context

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        item.number = self._context.current_report_index + 1  # which Ray counts on once it is put
        super().put(item, block, timeout)


def number_reports() -> None:
    """Of the worker in this process, from now on."""
    from ray.train.v2._internal.execution.context import get_train_context

    context = get_train_context()
    context.execution_context = replace(context.execution_context, result_queue=_NumberedQueue(context))
