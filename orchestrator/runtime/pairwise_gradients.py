"""How do gradients come to the same bits on any layout? (``train.reproducible``)

Each micro-batch's gradient is taken alone and added to the others pairwise, by their numbers in the micro-batch list
(``orchestrator.core.pairwise``): which two sums are added does not depend on who computed them. A rank adds up the
blocks that lie within its run: one, where the run is 2^k micro-batches and begins at a multiple of that, and seldom
more than two or three. At the end of the step every rank is sent its share of the elements of everybody's blocks, adds
them on, and sends the result to all. For one block a rank that is as much traffic as DDP's all-reduce, which is not
used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from orchestrator.core.pairwise import Block, Partials, blocks
from orchestrator.errors import SessionError
from orchestrator.ports import Collective
from orchestrator.types import BatchPlan

Values = list[Tensor | None]
"""Of one block, by parameter: ``None`` where no micro-batch of it gave a gradient."""


@final
class PairwiseGradients:
    """Sums gradients over a step's micro-batches: ``begin_step`` | (backward | ``end_micro_batch``)* | ``finish``.

    ``totals`` are tensors that a micro-batch adds to besides ``.grad``, such as statistics of it; they are summed in
    the same way, from zero in each. A rank holds the sums of its blocks: with a run of n micro-batches at most
    log2(n) + 1 gradients at once where it begins at a multiple of n, else 2 log2(n) + 1. Raises ``SessionError`` for a
    gradient that is sparse.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, totals: Sequence[Tensor] = (), collective: Collective
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._totals = totals
        self._collective = collective
        self._plan: BatchPlan | None = None
        self._own: Partials[Values] = Partials()
        self._done = 0
        by_dtype: defaultdict[torch.dtype, list[int]] = defaultdict(list)
        self._likes: list[Tensor] = [*self._parameters, *totals]
        for number, like in enumerate(self._likes):
            by_dtype[like.dtype].append(number)
        self._by_dtype = tuple(by_dtype.values())

    def begin_step(self, plan: BatchPlan) -> None:
        """Forget the last step."""
        self._plan, self._own, self._done = plan, Partials(), 0
        self._reset()

    def end_micro_batch(self) -> None:
        """Take the gradient that the micro-batch's backward pass left in ``.grad``, which is ``None`` again."""
        gradients = [p.grad for p in self._parameters]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise SessionError(
                    f"the gradient of a parameter of shape {tuple(parameter.shape)} is sparse, and train.reproducible "
                    "adds up dense ones only: build its layer with sparse=False, or write train.reproducible: false"
                )
        block = Block(first=self._at_hand.run(self._collective.rank)[self._done], size=1)
        self._own = self._own.plus(block, [*gradients, *(total.clone() for total in self._totals)], add=_add)
        self._done += 1
        self._reset()

    def finish(self, *, spoil: bool) -> None:
        """Collective. Put the sum over all micro-batches of all ranks into ``.grad`` and the totals.

        With ``spoil`` on any rank all get NaN, which tells them that the step is not whole.
        """
        if self._at_hand.world_size == 1:
            summed = None if spoil else self._own.total(add=_add)
        else:
            summed = self._summed(spoil)
        self._own = Partials()
        if summed is None:
            return
        for parameter, value in zip(self._parameters, summed, strict=False):
            parameter.grad = value
        for total, value in zip(self._totals, summed[len(self._parameters) :], strict=True):
            if value is not None:
                total.copy_(value)

    def _summed(self, spoil: bool) -> Values:
        """Collective. What any micro-batch gave a gradient for, in tensors like those that autograd makes."""
        ranks = range(self._at_hand.world_size)
        of_ranks = [blocks(self._at_hand.run(rank)) for rank in ranks]
        own = [] if spoil else [values for _, values in self._own.sums]
        # An idle rank has no tensors yet to put the sums into; nor has one whose blocks lack a parameter.
        found: Values = own[0] if own else [None for _ in self._likes]
        for members in self._by_dtype:
            likes = [self._likes[number] for number in members]
            packed = _Packed(likes, shares=len(ranks))
            rows = packed.rows(len(of_ranks[self._collective.rank]))
            if spoil:
                rows.fill_(torch.nan)
            for row, values in zip(rows, own, strict=False):
                packed.put([values[number] for number in members], row)
            whole = self._exchanged(rows, of_ranks, share=packed.share)
            taken = packed.take(whole, [found[number] for number in members])
            for number, value in zip(members, taken, strict=True):
                found[number] = value
        return found

    def _exchanged(self, rows: Tensor, of_ranks: Sequence[Sequence[Block]], *, share: int) -> Tensor:
        """Collective. From the ranks' blocks, a row each, the row of the whole sum."""
        world_size = len(of_ranks)
        by_rank = rows.view(-1, world_size, share).transpose(0, 1).reshape(-1)
        received = self._collective.all_to_all(
            by_rank, sends=[len(rows) * share] * world_size, receives=[len(own) * share for own in of_ranks]
        )
        partials: Partials[Tensor] = Partials()
        every_block = (block for own in of_ranks for block in own)
        for block, row in zip(every_block, received.view(-1, share), strict=True):
            partials = partials.plus(block, row, add=Tensor.add_)
        return self._collective.all_gather(partials.total(add=Tensor.add_))

    @property
    def _at_hand(self) -> BatchPlan:
        assert self._plan is not None, "begin_step comes first"
        return self._plan

    def _reset(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        for total in self._totals:
            total.zero_()


class _Packed:
    """Tensors of one dtype in a row, one after the other, then for each of them whether it is there, then a rest that
    makes the row divisible into ``shares``."""

    def __init__(self, likes: Sequence[Tensor], *, shares: int) -> None:
        self._likes = likes
        self._sizes = [like.numel() for like in likes]
        used = sum(self._sizes) + len(likes)
        self.share = -(-used // shares)
        self._length, self._rest = self.share * shares, self.share * shares - used

    def rows(self, count: int) -> Tensor:
        return torch.empty(count, self._length, dtype=self._likes[0].dtype, device=self._likes[0].device)

    def put(self, values: Values, row: Tensor) -> None:
        *places, there, rest = row.split([*self._sizes, len(values), self._rest])
        present = [(place.view_as(v), v) for place, v in zip(places, values, strict=True) if v is not None]
        if present:
            torch._foreach_copy_([place for place, _ in present], [value for _, value in present])
        for place, value in zip(places, values, strict=True):
            if value is None:
                place.fill_(-0.0)  # x + -0.0 is x for every x; 0.0 would turn -0.0 into 0.0
        there.copy_(torch.tensor([value is not None for value in values]))
        rest.zero_()

    def take(self, row: Tensor, into: Values) -> Values:
        """The row's tensors, put into those of ``into`` that are there; ``None`` for what no row had."""
        *places, there, _ = row.split([*self._sizes, len(self._likes), self._rest])
        found: Values = [
            None if is_there == 0 else torch.empty_like(like) if own is None else own  # NaN is there
            for is_there, like, own in zip(there.tolist(), self._likes, into, strict=True)
        ]
        pairs = [(value, place.view_as(value)) for value, place in zip(found, places, strict=True) if value is not None]
        if pairs:
            torch._foreach_copy_([value for value, _ in pairs], [place for _, place in pairs])
        return found


@torch.no_grad()
def _add(left: Values, right: Values) -> Values:
    """Into the left one's tensors, which nobody else holds."""
    both = [(x, y) for x, y in zip(left, right, strict=True) if x is not None and y is not None]
    if both:
        torch._foreach_add_([x for x, _ in both], [y for _, y in both])
    return [y if x is None else x for x, y in zip(left, right, strict=True)]
