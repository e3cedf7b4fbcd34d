"""Rank zero's desk for orders: requests are looked for at every exchange, and each is answered by an event.

They are taken in the order of their names, and removed once they are answered: one that a crash left unanswered is
taken again by the next attempt, unless nobody waits for it any more. The event holds what the controller was told, so
that a replay tells it the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from orchestrator.core import codec, orders
from orchestrator.core.controller import Rules
from orchestrator.ports import Brain
from orchestrator.runtime import folder
from orchestrator.runtime.brain import STATE_TYPES
from orchestrator.runtime.control_requests import CONTROL, SUFFIX, TAKEN, Order, Request, read_request, take_request
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.progress import Moment
from orchestrator.types import ApplyPlan, Ordered, Orders

_SET_ASIDE = ".refused"


def standing_orders(run: Path) -> Orders | None:
    """What the newest answer of any attempt says of the orders that stand; ``None`` where none were ever given.

    Raises ``ValueError`` for an answer of another version.
    """
    newest = None
    for row in folder.rows(run / folder.EVENTS):
        if row["kind"] == "control" and row.get("cause") is not None:
            newest = row["cause"]
    if newest is None:
        return None
    event = codec.decode(newest, STATE_TYPES)
    if not isinstance(event, Ordered):
        raise ValueError(f"an event of control holds {event}")
    return event.orders


@final
class ControlDesk:
    """Rank zero's: takes requests, hands them to the controller and answers them."""

    def __init__(self, run: Path, *, journal: Journal, rules: Rules, workers_stay: bool) -> None:
        self._place = str(run / CONTROL)
        self._journal = journal
        self._rules = rules
        self._workers_stay = workers_stay
        self._standing = Orders()
        self._waiting: list[Request] = []  # for a checkpoint, or for the end
        self._save = False
        self._seen: set[str] = set()  # what cannot be removed is not taken twice

    def asks_to_save(self) -> bool:
        """Whether a checkpoint was ordered since this was asked last."""
        asked, self._save = self._save, False
        return asked

    @property
    def wants_stop(self) -> bool:
        return any(request.order == "stop" for request in self._waiting)

    def begin(self, standing: Orders, brain: Brain, at: Moment) -> None:
        """Orders outlive the attempt that they were given to, and the checkpoint that it goes on from."""
        self._stand(standing, brain)
        said = f"still by order: {orders.sentence(standing)}"
        self._event(None, None, said, at, cause=codec.encode(Ordered(orders=standing)))

    def take(self, brain: Brain, at: Moment, *, coming: Callable[[], ApplyPlan | None]) -> None:
        """Obey or refuse what came since the last look; ``coming`` finds the decision that is on its way by now."""
        for request in self._requests(at):
            if request.order in ("checkpoint", "stop"):
                self._waiting.append(request)
                self._save = self._save or request.order == "checkpoint"
                continue
            given = self._judge(request)
            if isinstance(given, str):
                self._event(request.id, request.order, given, at, accepted=False)
            else:
                late = coming()
                self._stand(given, brain)
                answer = orders.sentence(given)
                if late is not None:
                    answer += f"; batch {late.target.batch}, decided before, takes effect at step {late.effective_step}"
                cause = codec.encode(Ordered(orders=given))
                self._event(request.id, request.order, answer, at, cause=cause)
            self._remove(request.id)

    def saved(self, path: str, at: Moment) -> None:
        """A checkpoint is there."""
        self._answer("checkpoint", f"saved in {path}", at, path=path)

    def not_saved(self, why: str, at: Moment) -> None:
        self._answer("checkpoint", why, at, accepted=False)

    def ended(self, path: str, at: Moment) -> None:
        self._answer("stop", f"training has ended, saved in {path}", at, path=path)

    def _requests(self, at: Moment) -> Iterator[Request]:
        """Those that came since; what is none is set aside, and said."""
        try:
            names = sorted(name for name in os.listdir(self._place) if name.endswith((SUFFIX, TAKEN)))
        except OSError:  # no order was ever given, or the storage is away for a moment
            return
        for name in names:
            path = Path(self._place, name)
            id = path.stem
            if id in self._seen:
                continue
            try:
                request = read_request(path)
            except FileNotFoundError:  # withdrawn
                continue
            except (OSError, ValueError) as error:
                with suppress(OSError):
                    path.replace(path.with_suffix(_SET_ASIDE))
                self._seen.add(id)
                self._event(id, None, f"{name} is no request and was set aside: {error}", at, accepted=False)
                continue
            if path.suffix == SUFFIX and not take_request(path):
                continue
            self._seen.add(id)
            late_s = 0.0 if request.expires_s is None else time.time() - request.expires_s
            if late_s > 0:
                self._event(id, request.order, f"nobody has waited for it for {late_s:.0f} s", at, accepted=False)
                self._remove(id)
                continue
            yield request

    def _judge(self, request: Request) -> Orders | str:
        """The orders that would stand after ``request``, or why it is refused."""
        refused = orders.refusal(
            request.onto(Orders()),  # what stands already was not refused
            smallest_batch=self._rules.smallest_batch,
            min_workers=self._rules.workers.minimum,
            workers_stay=self._workers_stay,
        )
        return refused or request.onto(self._standing)

    def _stand(self, given: Orders, brain: Brain) -> None:
        brain.post(Ordered(orders=given))
        self._standing = given

    def _answer(self, order: Order, answer: str, at: Moment, **evidence: Any) -> None:
        for request in [request for request in self._waiting if request.order == order]:
            self._waiting.remove(request)
            self._event(request.id, order, answer, at, **evidence)
            self._remove(request.id)

    def _event(
        self, request: str | None, order: Order | None, answer: str, at: Moment, *, accepted: bool = True, **more: Any
    ) -> None:
        self._journal.event(
            "control",
            reason=answer,
            step=at.step,
            samples_seen=at.samples_seen,
            request=request,
            order=order,
            accepted=accepted,
            held=self._standing.held,
            max_batch=self._standing.max_batch,
            max_workers=self._standing.max_workers,
            **more,
        )

    def _remove(self, request: str) -> None:
        for suffix in (SUFFIX, TAKEN):
            with suppress(OSError):
                Path(self._place, f"{request}{suffix}").unlink(missing_ok=True)
