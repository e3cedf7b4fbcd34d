"""The Protocols through which the session meets the world; adapters live in ``runtime/`` and ``ray_train/``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.types import Action, ApplyPlan, Event

if TYPE_CHECKING:
    from torch import Tensor


class Collective(Protocol):
    """All ranks call every method, equally often, in the same order.

    Rank and world size may change at the boundary between two steps: they are read when needed, and not kept.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks in float64, the same on each."""
        ...

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Begin ``sum``; what is returned waits for it, and is called once."""
        ...

    def sum_tensor(self, tensor: Tensor) -> None:
        """Put the sum over the ranks into ``tensor``, the same on each; where it lies, without waiting for a device."""
        ...

    def all_to_all(self, tensor: Tensor, *, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """1-D ``tensor`` in pieces of ``sends`` elements, one for each rank; what the ranks sent here, in their order.

        ``receives`` is how many elements each of them sends to this one.
        """
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's 1-D ``tensor``, all of one length, one after the other; the same on each."""
        ...

    def broadcast(self, tensor: Tensor, *, source: int = 0) -> None:
        """Put what the rank ``source`` has in ``tensor``, contiguous and on the training device, into every rank's."""
        ...

    def share(self, value: Any, *, source: int = 0) -> Any:
        """The value (plain Python data) of the rank ``source``, on every rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value by rank, on rank zero; an empty list elsewhere."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a member of a group runs, as launchers count it."""

    local_rank: int
    local_world_size: int
    node_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Who trains together. Each group has its own, numbered in the order in which they are formed."""

    generation: int
    members: tuple[str, ...]  # by rank
    places: tuple[Place, ...]  # by rank
    store: tuple[str, int]  # host and port, where they find each other
    lost: str | None = None  # who is gone, without whom nothing more can be agreed upon in the group before

    def rank_of(self, member: str) -> int | None:
        return self.members.index(member) if member in self.members else None


class Membership(Protocol):
    """How one process takes part in groups that change while training goes on."""

    member: str

    @property
    def joins(self) -> bool:
        """Whether this process is in no group yet."""
        ...

    def latest(self) -> View | None:
        """The newest view that this process was told of."""
        ...

    def wait(self, *, newer_than: int, timeout_s: float) -> View | None:
        """The same, once there is one newer than that generation; ``None`` if none comes in time."""
        ...

    def ready(self) -> None:
        """This process has warmed up, and may be taken in."""
        ...

    def broken(self, why: str) -> None:
        """The group at hand cannot go on: a member of it is gone."""
        ...

    def received(self, view: View, carried: Mapping[str, Any]) -> None:
        """This process has all that the others of ``view`` know, and can go on without them; see ``formed``."""
        ...

    def formed(self, view: View, carried: Mapping[str, Any]) -> None:
        """This process now trains in ``view``; ``carried`` is the furthest that any ``carry`` gave."""
        ...

    def carry(self) -> dict[str, Any]:
        """What this runtime counts and newcomers must count on from: plain data."""
        ...

    def left(self) -> None:
        """This process was left out of the newest view, and ends."""
        ...

    def beat(self, *, waits: bool) -> None:
        """A sign of life: training has gone on, and ``waits`` for the other ranks from here, or does not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BrainRecord:
    """What rank zero saves with a checkpoint: an encoded controller state, and the events it has not absorbed yet."""

    state: str | None = None
    tail: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What training should do as it begins or resumes: now, and after a decision that is on its way."""

    now: ApplyPlan
    pending: ApplyPlan | None
    notes: tuple[Mapping[str, Any], ...] = ()  # events of the cluster, for rank zero to write down


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """What was asked of the workers since they last looked."""

    save: str | None = None
    hold: str | None = None  # save, then wait to be resized
    regroup: View | None = None  # go on as this group, without stopping
    stop: str | None = None
    notes: tuple[Mapping[str, Any], ...] = ()


class Brain(Protocol):
    """Rank zero's way to the controller, in this process or in Ray Train's; only rank zero calls it."""

    def begin(self, record: BrainRecord, *, world_size: int, dataset_size: int, resize_cost_s: float | None) -> Welcome:
        """Set the controller to ``record`` and learn the plan to begin with."""
        ...

    def post(self, event: Event) -> None:
        """Hand over an event; never waits."""
        ...

    def answer(self, step: int) -> Action:
        """The decision taken at ``step``; waits for it. Asked only for steps that are decision points."""
        ...

    def replan(self, event: Event) -> Welcome:
        """Hand over an event that must change the plan at once, and wait for that plan."""
        ...

    def take_over(self, told: Sequence[Event], *, world_size: int) -> Welcome:
        """Become rank zero's way in the place of a process that is gone, with the newest events that it knew of."""
        ...

    def hold_failed(self) -> None:
        """Say that the workers could not save and go on training instead of holding."""
        ...

    def commands(self) -> Commands:
        """What was asked since the last call; never waits."""
        ...

    def record(self) -> BrainRecord:
        """What to save with a checkpoint of this moment."""
        ...


class Tracker(Protocol):
    """Follows a run beside its folder, on a service or a screen: it is given each line as the run's file gets it.

    Rank zero calls it, from the training thread, which must not wait: who talks to a network does so in a thread of
    its own. A tracker that raises is dropped, with an event that says so, and the run goes on. Numbers in a row may be
    ``None``, where they are not known, and NaN.
    """

    name: str

    def step(self, row: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``."""
        ...

    def event(self, row: Mapping[str, Any]) -> None:
        """A line of ``events.jsonl``; ``finished``, ``stopped`` or ``fault`` says how the run ends."""
        ...

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """A line of ``evals.jsonl``."""
        ...

    def groups(self, row: Mapping[str, Any]) -> None:
        """A line of ``groups.jsonl``."""
        ...

    def close(self) -> None:
        """Nothing more comes from this process; without an ending before it the run goes on in another one."""
        ...
