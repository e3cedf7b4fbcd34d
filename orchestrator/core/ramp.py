"""How does the learning rate get from the old batch's to the new one's: at once, or over some samples?"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.types import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp:
    """Begun at a change of the batch, from the rule's factor that was in force there."""

    start_factor: float
    start_samples: int  # samples seen

    def factor(self, goal: float, *, samples_seen: int, length_samples: int) -> float:
        """The rule's factor at ``samples_seen``, on a straight line to ``goal``, what the rule says."""
        progress = (samples_seen - self.start_samples) / length_samples if length_samples else 1.0
        return goal if progress >= 1 else self.start_factor + (goal - self.start_factor) * progress


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """What the last step was taken with: saved with a checkpoint, so that a jump there happens once."""

    target: Target
    ramp: Ramp | None = None
    branched_samples: int = 0  # samples seen when a round of branches was last due
    round_waits: bool = False  # for a noise scale
