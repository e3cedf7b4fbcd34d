"""The talk with Ray's autoscaler: what this run asks it for, and what it has for this run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, final

import ray

logger = logging.getLogger(__name__)

_ANSWER_S = 5.0

Reserved = Mapping[str, Mapping[str, float]]  # resources by node


@final
class Request:
    """For as many workers as are wanted; it stands as long as it is of use.

    A request keeps nodes for so many from being taken away, and not always those that are in use: with it, nodes that
    training has left are never given back. So there is none while all that are wanted are there. At the most that
    training may have there is nothing to give back, and it stands, so that nobody else counts on those nodes.
    """

    def __init__(self, *, send: Callable[[], None], repeat: Callable[[], None], cancel: Callable[[], None]) -> None:
        """``repeat`` sends it when that is due again: Ray forgets requests."""
        self._send, self._repeat, self._cancel = send, repeat, cancel
        self._sent: int | None = None  # workers

    def send(self, wanted: int) -> None:
        self._send()
        self._sent = wanted

    def keep(self, *, wanted: int, present: int, most: int) -> None:
        """To be called regularly, while ``present`` workers train. All in workers."""
        if present == wanted < most:
            if self._sent is not None:
                self._cancel()
                self._sent = None
        elif self._sent != wanted:
            self.send(wanted)
        else:
            self._repeat()


def reserved_now(coordinator: Any, requester: str) -> Reserved | None:
    """What is really there for ``requester`` at this moment; ``None`` if Ray does not answer.

    ``coordinator`` is Ray's AutoscalingCoordinator. By itself it looks at the nodes every 20 s: a node that died since
    would be counted, and its workers waited for.
    """
    try:
        found: Reserved = ray.get(
            coordinator.get_reserved_resources.remote(requester, recompute=True), timeout=_ANSWER_S
        )
    except (ray.exceptions.RayError, TimeoutError):
        logger.warning("Ray did not say what it has reserved for %s: the workers stay as they are", requester)
        return None
    return found
