"""When is a budget used up, and how many workers can what is left of it pay to the end of the run?"""

from __future__ import annotations

from orchestrator.core import throughput
from orchestrator.core.staffing import Ceiling, Need
from orchestrator.types import Spent, Stop

_S_PER_HOUR = 3600.0


def used_up(budget_worker_hours: float | None, spent: Spent) -> Stop | None:
    """A stop, where what is left would not last until a later one has saved and ended the workers."""
    if budget_worker_hours is None or spent.worker_hours + spent.reserve_worker_hours < budget_worker_hours:
        return None
    return Stop(
        reason=f"the budget of {budget_worker_hours:.4g} worker-hours is used up: {spent.worker_hours:.4g} are spent, "
        f"and {spent.reserve_worker_hours:.2g} are kept to save and end"
    )


def ceiling(need: Need, budget_worker_hours: float | None, spent: Spent | None) -> Ceiling | None:
    """The most workers that what is left pays to the end of the run, at the present batch; ``None``: no budget, or
    a fleet that is to stay.

    N workers take the steps that are left in ceil(k / N) micro-batches each, k of them in the batch, and all N are paid
    meanwhile; another number than ``need.asked`` is a resize first, which pauses both fleets. Before enough steps were
    timed, and where no fleet reaches the end, there are no more than there are.
    """
    if budget_worker_hours is None or spent is None or need.when == "never":
        return None
    each, asked, limits = throughput.micro_batch_time_s(need.times), need.asked, need.limits
    if each is None:
        return Ceiling(workers=asked, reason="what more workers would take of the budget is not known yet")
    left = budget_worker_hours - spent.worker_hours - spent.reserve_worker_hours
    num_micro_batches, steps = need.plan.num_micro_batches, need.remaining_samples / need.plan.batch

    def worker_hours(workers: int) -> float:
        busy_s = steps * -(-num_micro_batches // workers) * each
        pause = 0.0 if workers == asked else need.resize_cost_s * max(workers, asked)
        return (busy_s * workers + pause) / _S_PER_HOUR

    enough = [n for n in {asked, *range(limits.minimum, limits.maximum + 1)} if worker_hours(n) <= left]
    if not enough:
        return Ceiling(workers=asked, reason=f"the {left:.3g} worker-hours left do not finish the run on any workers")
    most = max(enough)
    return Ceiling(
        workers=most,
        reason=f"the {left:.3g} worker-hours left finish the run on {most} workers, which take about "
        f"{worker_hours(most):.3g}",
    )
