"""In which order do the ranks exchange shards, and how does one of them keep step that can compute no more?

Under FSDP each pass through the model gathers weights from all ranks and gives gradients to all of them, in the order
in which the model's parts run. A rank that leaves the order leaves the others waiting. The first pass of a session
finds the order out: before each exchange rank zero hears from all ranks what they are about to do, and tells them.
From then on every rank knows it; one whose memory ran out in the midst of a pass plays the rest without computing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch

from orchestrator.errors import SessionError
from orchestrator.ports import Collective

_END: Literal["end"] = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One exchange of a pass: the weights of a unit are gathered, or its gradients reduced and scattered."""

    kind: Literal["gather", "reduce"]
    unit: int  # number of the sharded module, in the model's order
    length: int = 0  # entries of a gradient that is reduced, over all ranks
    dtype: torch.dtype | None = None  # of a gradient
    averages: bool = False

    def __str__(self) -> str:
        what = "the weights" if self.kind == "gather" else f"a gradient of {self.length} entries"
        return f"{what} of sharded module {self.unit}"


@final
class Lockstep:
    """The exchanges of one pass, in order: ``begin_pass`` | ``about_to``* | ``end_pass`` or ``rest``.

    Every pass of a run has the same ones, on every rank.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._known: tuple[Exchange, ...] | None = None
        self._seen: list[Exchange] = []  # of the pass at hand
        self.within_pass = False

    def begin_pass(self) -> None:
        self._seen, self.within_pass = [], True

    def about_to(self, exchange: Exchange) -> None:
        """Collective in the first pass. Raises ``SessionError`` where the order is not that of the others."""
        if not self.within_pass:  # an evaluation, or a pass that is played
            return
        if self._known is None:
            self._agree(exchange)
        elif len(self._seen) == len(self._known) or self._known[len(self._seen)] != exchange:
            raise SessionError(f"in this pass {exchange} came next, and {self._expected} before; {_WHY}")
        self._seen.append(exchange)

    def end_pass(self) -> None:
        """Collective in the first pass. The pass was computed to its end on this rank."""
        self.within_pass = False
        if self._known is None:
            self._agree(_END)
            self._known = tuple(self._seen)
        elif 0 < len(self._seen) < len(self._known):
            raise SessionError(f"a pass ended where {self._expected} came before; {_WHY}")

    def rest(self) -> Iterator[Exchange]:
        """What the others still do in the pass at hand, which this rank gave up; each to be done when it is handed out.

        In the first pass as long as any rank computes.
        """
        self.within_pass = False
        if self._known is not None:
            yield from self._known[len(self._seen) :]
            return
        while isinstance(agreed := self._agree(None), Exchange):
            self._seen.append(agreed)
            yield agreed
        if agreed == _END:
            self._known = tuple(self._seen)

    @property
    def _expected(self) -> str:
        assert self._known is not None, "the first pass finds the order out"
        return str(self._known[len(self._seen)]) if len(self._seen) < len(self._known) else "nothing more"

    def _agree(self, mine: Exchange | Literal["end"] | None) -> Exchange | Literal["end"] | None:
        """What the ranks that compute do next; ``None`` where no rank does any more, and for a rank that does not."""
        said = {word for word in self._collective.gather(mine) if word is not None}
        agreed, at_odds = self._collective.share((next(iter(said), None), sorted(map(str, said))))
        if len(at_odds) > 1:
            raise SessionError(f"the ranks go through the model in different orders ({' and '.join(at_odds)}); {_WHY}")
        found: Exchange | Literal["end"] | None = agreed
        return found


_WHY = (
    "sharded weights are gathered from all ranks, so every micro-batch must take the same way through the model: "
    "remove what depends on the rank or the samples, call session.model once a micro-batch, or write "
    "train.parallel: ddp"
)
