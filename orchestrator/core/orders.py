"""What becomes of a decision under the standing orders of the one who operates the run, and which orders are refused?

A hold comes before a cap: what is held keeps its batch, also above a cap, until it is released. An order reaches
decisions alone: what was decided before and is on its way takes effect.
"""

from __future__ import annotations

from orchestrator.core.staffing import Ceiling
from orchestrator.types import Decision, Orders


def refusal(orders: Orders, *, smallest_batch: int | None, min_workers: int, workers_stay: bool) -> str | None:
    """Why ``orders`` cannot be carried out; ``None`` where they can.

    ``smallest_batch`` [samples] is the batch's floor, ``None`` where the batch is never altered. ``workers_stay`` says
    that the runtime cannot change the fleet.
    """
    if (most := orders.max_batch) is not None:
        if smallest_batch is None:
            return (
                f"max_batch {most}: the batch of this run is never altered (controller.mode advise, or policy fixed); "
                "to change it, stop the run and resume it with another config"
            )
        if most < smallest_batch:
            return f"max_batch {most}: below the floor of the batch, {smallest_batch} (batch.min); order that or more"
    if (workers := orders.max_workers) is not None:
        if workers_stay:
            return f"max_workers {workers}: workers come and go under Ray only, and here they stay as they are"
        if workers < min_workers:
            return f"max_workers {workers}: fewer than workers.min, {min_workers}; order that or more"
    return None


def restrained(wish: Decision, orders: Orders, *, batch: int) -> Decision:
    """What is decided in the place of ``wish``; ``batch`` is the target there is.

    A cap below it is taken at this decision, with neither dead-band nor cooldown: who orders it has a reason.
    """
    if orders.held:
        return Decision(target_batch=batch, reason=f"keep {batch}: held by order; {wish.reason}")
    if orders.max_batch is None or wish.target_batch <= orders.max_batch:
        return wish
    return Decision(target_batch=orders.max_batch, reason=f"{wish.reason}; at most {orders.max_batch} by order")


def workers_asked(asked: int | None, present: int, *, before: Orders, given: Orders) -> int | None:
    """The workers asked for once ``given`` stands: a hold that begins takes back those that are not there.

    Workers that are to go stay asked away: their resize has begun, or begins at once.
    """
    if before.held or not given.held:
        return asked
    return present if asked is None else min(asked, present)


def workers_kept(asked: int | None, present: int, orders: Orders) -> int | None:
    """The workers asked for once ``present`` train: under a hold those of a resize that had begun before it stay."""
    return max(asked, present) if orders.held and asked is not None else asked


def ceiling(orders: Orders) -> Ceiling | None:
    """On the workers that are asked for."""
    if orders.max_workers is None:
        return None
    return Ceiling(workers=orders.max_workers, reason=f"workers at most {orders.max_workers} by order")


def sentence(orders: Orders) -> str:
    """The orders in words."""
    said = ["batch and workers are held"] if orders.held else []
    if orders.max_batch is not None:
        said.append(f"batch at most {orders.max_batch}")
    if orders.max_workers is not None:
        said.append(f"workers at most {orders.max_workers}")
    return ", ".join(said) or "no orders stand"
