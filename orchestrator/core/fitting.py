"""Which is the largest micro-batch that fits in memory, when all one can do is try?"""

from __future__ import annotations

from collections.abc import Callable


def largest_fitting(fits: Callable[[int], bool], *, start: int, most: int) -> int:
    """The largest size of at most ``most`` samples that ``fits``; zero when not even one sample does.

    The search begins at ``start`` samples, doubles or halves from there until it has one size that fits and one that
    does not, and bisects between them. What fits is taken to fit in any smaller size as well; where that is not so,
    the answer is still a size that was tried and did fit. No size is tried twice, none is more than twice one that
    fits (but for ``start``), and there are at most ``2 * log2(most) + 2`` trials. Raises ``ValueError`` unless
    ``1 <= start <= most``.
    """
    if not 1 <= start <= most:
        raise ValueError(f"the search must start in [1, most={most}], got start={start}")
    if fits(start):
        fitting, failing = start, most + 1
        while fitting < most:
            size = min(2 * fitting, most)
            if not fits(size):
                failing = size
                break
            fitting = size
    else:
        fitting, failing = 0, start
        while failing > 1:
            size = failing // 2
            if fits(size):
                fitting = size
                break
            failing = size
    while failing - fitting > 1:
        size = (fitting + failing) // 2
        if fits(size):
            fitting = size
        else:
            failing = size
    return fitting
