"""How large may the batch be before the loss notices? Found by training it: branches from one state, judged together.

Merrill et al. 2025, arXiv:2505.23971. Branches at 1, 2, 4 ... times the batch start from the same weights and train on
the same samples, each with the learning rate that the run's rule gives it. The largest batch that loses nothing is the
critical one, measured and not inferred; divided by the noise scale of the same moment it gives the factor (kappa) that
turns one into the other on the model at hand. That paper reports noise scales far below the critical batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.types import NoiseStats

MULTIPLES = (1, 2, 4, 8)
FEWEST_STEPS = 4  # of the largest branch; the loss is read from the second half of them


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchSettings:
    """How often branches are trained, for how long each, and by how much a loss may lie above another.

    A round that is due waits for a noise scale to compare with, and is looked at again every ``retry_samples``.
    """

    every_samples: int
    retry_samples: int
    samples: int  # of each branch
    tolerance: float  # loss
    ceiling: int  # samples; the largest batch that may be tried


def multiples_for(batch: int, *, remaining: int, settings: BranchSettings) -> tuple[int, ...]:
    """Which multiples of ``batch`` to try with ``remaining`` samples left in the run; none if there are not two."""
    if remaining < settings.samples:
        return ()
    most = min(settings.ceiling, settings.samples // FEWEST_STEPS)
    found = tuple(k for k in MULTIPLES if k * batch <= most)
    return found if len(found) > 1 else ()


def largest_harmless(losses: Sequence[tuple[int, float]], *, tolerance: float) -> int | None:
    """The largest multiple whose loss is at most ``tolerance`` above that of *every* smaller one.

    ``losses`` holds (multiple, loss) from the smallest multiple up; a branch that diverged has a loss that is not
    finite. ``None`` when the first one did: then there is nothing to compare with.
    """
    if not losses or not math.isfinite(losses[0][1]):
        return None
    best, found = losses[0][1], losses[0][0]
    for multiple, loss in losses[1:]:
        if not math.isfinite(loss):
            continue
        if loss <= best + tolerance:
            found = multiple
        best = min(best, loss)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What branches found: ``kappa`` = critical batch / noise scale, ``None`` where the noise scale was not known."""

    critical_batch: int  # samples; the least it can be, the truth lies below the next larger batch that was tried
    kappa: float | None
    reason: str


def calibrate(
    batch: int, losses: Sequence[tuple[int, float]], *, stats: NoiseStats, tolerance: float
) -> Calibration | None:
    """The critical batch by branches from ``batch``, set against the noise scale; ``None`` if nothing was learnt."""
    found = largest_harmless(losses, tolerance=tolerance)
    if found is None:
        return None
    critical = found * batch
    tried = ", ".join(f"{loss:.4g} at {multiple * batch}" for multiple, loss in losses)
    words = f"branches end with loss {tried}: {critical} is the largest batch that is no more than {tolerance:g} worse"
    known = stats.bounded and stats.noise_scale is not None and stats.noise_scale > 0
    kappa = critical / stats.noise_scale if known and stats.noise_scale else None
    if kappa is None:
        words += "; the noise scale is not known well enough to compare it with"
    else:
        words += f", {kappa:.3g} times the noise scale"
    return Calibration(critical_batch=critical, kappa=kappa, reason=words)
