"""Process groups that are formed anew while their members live on.

Each group finds itself through a store that outlives it, under a prefix of its own. Members wait for each other there
first, where they can turn away when a newer view comes; the group itself is then formed in milliseconds.

Nothing may keep a reference to a group that is left: gloo closes its connections when the last one goes, and that is
what tells a member that waits for another's data that this one has turned away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from typing import final

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _abort_process_group, _set_pg_timeout

from orchestrator.errors import GroundswellError
from orchestrator.ports import Collective, View
from orchestrator.runtime.collective import ProcessGroupCollective, Solo

_FORMING = timedelta(seconds=10)  # once all members have come
_CONNECTING = timedelta(seconds=20)
_LOOK_EVERY_S = 0.002
_LONGEST_EXCHANGE_S = 1800.0  # torch's own for gloo

# What torch says when a member of the group is gone, or does not answer. Only NCCL has an error class of its own.
_SIGNS = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "pair closure",
    "process group",
)


class NotFormedError(GroundswellError):
    """A group that was not formed: a member did not come, or the view was overtaken by a newer one."""


def lost_peer(error: BaseException) -> str | None:
    """``error`` in words, if it is what an exchange raises when another member is gone.

    Without the exception itself, whose traceback would keep the group alive that it came from.
    """
    return f"{type(error).__name__}: {error}" if _is_lost_peer(error) else None


def _is_lost_peer(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@final
class Groups:
    """Forms one group after another for one process, and leaves each."""

    def __init__(self, member: str, *, device: torch.device, hang_timeout_s: float | None) -> None:
        # It keeps the group that is the default one when it is first imported, and DDP imports it.
        import_module("torch._dynamo")
        self._member = member
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._longest = timedelta(seconds=hang_timeout_s or _LONGEST_EXCHANGE_S)
        self._store: tuple[tuple[str, int], TCPStore] | None = None

    def form(self, view: View, *, overtaken: Callable[[], bool], patience_s: float) -> Collective:
        """Collective among the members of ``view``. Raises ``NotFormedError``."""
        rank, world_size = view.rank_of(self._member), len(view.members)
        assert rank is not None, "only members form a group"
        store = PrefixStore(f"group {view.generation}", self._connected(view.store))
        self._meet(store, rank, view, overtaken=overtaken, patience_s=patience_s)
        try:
            dist.init_process_group(self._backend, store=store, rank=rank, world_size=world_size, timeout=_FORMING)
        except RuntimeError as error:
            self.leave(broken=True)
            raise NotFormedError(f"group {view.generation} was not formed: {error}") from None
        _set_pg_timeout(self._longest)
        return ProcessGroupCollective() if world_size > 1 else Solo()

    def leave(self, *, broken: bool) -> None:
        """The group at hand, if there is one."""
        if not dist.is_initialized():
            return
        if broken and self._backend == "nccl":
            _abort_process_group()  # ending it in order would wait for those who are gone
        else:
            dist.destroy_process_group()

    def _connected(self, address: tuple[str, int]) -> TCPStore:
        if self._store is None or self._store[0] != address:
            self._store = address, TCPStore(*address, is_master=False, timeout=_CONNECTING)
        return self._store[1]

    def _meet(self, store: Store, rank: int, view: View, *, overtaken: Callable[[], bool], patience_s: float) -> None:
        """Wait until every member has come."""
        store.set(f"rank {rank} came", self._member)
        end_s = time.monotonic() + patience_s
        missing = [f"rank {other} came" for other in range(len(view.members))]
        while missing:
            if overtaken():
                raise NotFormedError(f"group {view.generation} was overtaken by a newer one")
            if time.monotonic() > end_s:
                raise NotFormedError(f"group {view.generation}: not {', nor '.join(missing)} within {patience_s:.0f} s")
            if store.check(missing[:1]):
                del missing[0]
            else:
                time.sleep(_LOOK_EVERY_S)
