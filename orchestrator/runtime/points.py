"""Where does a rank stand in the run? Three points a step, in their order, which ranks that lose one compare.

Before step n is taken, then while the caller evaluates what it came to, then at the boundary to the next.
"""

from __future__ import annotations


def before_step(number: int) -> int:
    return 3 * number


def after_step(number: int) -> int:
    return 3 * number + 1


def at_boundary(number: int) -> int:
    return 3 * number + 2


def steps_at(point: int) -> int:
    """How many steps were taken there."""
    return -(-point // 3)
