"""In which order are the terms of a sum added, so that it comes out the same however they are shared out?

Floating-point addition is commutative and not associative: what a sum rounds to depends on how its terms are grouped.
Here the terms have numbers, and the numbers alone say which sums are added: those of two neighbouring blocks of 2^k
terms, where the left one begins at a multiple of 2^(k+1). Whoever holds a run of consecutive terms adds up the blocks
that lie within it; put together in order, the runs' blocks are added on by the same rule, to the same bits.

It is pairwise summation (Higham 1993, The accuracy of floating point summation, SIAM Journal on Scientific Computing
14, 783-799): each of n terms goes through at most ceil(log2 n) additions, so the error is at most
c u / (1 - c u) of the sum of the terms' absolute values, with c that number and u the unit roundoff.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """``size`` terms from number ``first`` on. Raises ``ValueError`` unless it is one that the rule knows."""

    first: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.size & (self.size - 1) or self.first < 0 or self.first % self.size:
            raise ValueError(
                f"a block has 2^k terms and begins at a multiple of that, got size={self.size}, first={self.first}"
            )

    @property
    def end(self) -> int:
        return self.first + self.size

    def joins(self, following: Block) -> bool:
        """Whether the rule adds the sum of ``following`` to this one's."""
        return self.size == following.size and self.end == following.first and self.first % (2 * self.size) == 0


def blocks(run: range) -> tuple[Block, ...]:
    """The blocks whose sums a holder of the terms in ``run`` is left with, in order: 2 log2(len(run)) + 1 at most."""
    found: list[Block] = []
    at = run.start
    while at < run.stop:
        size = 1 << ((run.stop - at).bit_length() - 1)
        if at:
            size = min(size, at & -at)
        found.append(Block(first=at, size=size))
        at += size
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Partials(Generic[T]):
    """A run of consecutive terms, added up as far as the rule goes: the sums of its blocks, in order.

    ``add(left, right)`` is how two sums are added; it may put the result into ``left``, which is not read again.
    """

    sums: tuple[tuple[Block, T], ...] = ()

    def plus(self, block: Block, value: T, *, add: Callable[[T, T], T]) -> Partials[T]:
        """With the block that follows. Raises ``ValueError`` for one that does not."""
        if self.sums and block.first != self.sums[-1][0].end:
            raise ValueError(
                f"term {block.first} does not follow term {self.sums[-1][0].end - 1}: add terms in the order of their "
                "numbers"
            )
        sums = list(self.sums)
        while sums and sums[-1][0].joins(block):
            left, total = sums.pop()
            block, value = Block(first=left.first, size=2 * left.size), add(total, value)
        return Partials((*sums, (block, value)))

    def total(self, *, add: Callable[[T, T], T]) -> T:
        """The sum of all terms. Raises ``ValueError`` where there are none, or the first of them is not here."""
        if not self.sums or self.sums[0][0].first != 0:
            raise ValueError("a total needs all terms, from number 0 on")
        *before, (_, value) = self.sums
        for _, left in reversed(before):  # no two of a size: from the smallest, which adds one to no term's depth
            value = add(left, value)
        return value
