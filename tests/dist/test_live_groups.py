"""Groups that change while training goes on, without Ray: who is told of which group is written down beforehand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore

from orchestrator.ports import Commands, Place, View
from orchestrator.runtime import folder
from orchestrator.runtime.brain import LocalBrain
from orchestrator.runtime.collective import Apart, ChangingCollective
from orchestrator.runtime.group import Groups
from orchestrator.runtime.worker import Worker
from orchestrator.session import Session
from tests.support import EAGER, blobs, config, cross_entropy, mlp, run_fleet

pytestmark = pytest.mark.dist

BRANCHED = {**EAGER, "policy": "branched", "branch_every_samples": 256, "branch_samples": 96}
_CHANGES_AT = 10  # steps


class Died(Exception):
    """Of the rank that is lost."""


class Told:
    """A membership by a script: ``groups`` follow each other, and the store says which is the newest."""

    def __init__(self, rank: int, groups: list[list[int]], store: TCPStore, port: int) -> None:
        self.member = str(rank)
        self.joins = rank not in groups[0]
        self._store = store
        self._generation = 0
        self.fails_in = 0  # the generation whose forming fails at its very end
        self._views = [
            View(
                generation=number,
                members=tuple(map(str, ranks)),
                places=tuple(Place(local_rank=i, local_world_size=len(ranks), node_rank=0) for i in range(len(ranks))),
                store=("127.0.0.1", port),
                lost="a worker is gone" if number and len(ranks) < len(groups[number - 1]) else None,
            )
            for number, ranks in enumerate(groups)
        ]

    def latest(self) -> View:
        return self._views[self._store.add("newest", 0)]

    def next(self) -> View:
        """Tell all of the next group."""
        newest = self._store.add("newest", 0) + 1
        self._store.add("newest", 1)
        return self._views[newest]

    def wait(self, *, newer_than: int, timeout_s: float) -> View | None:
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if (view := self.latest()).generation > newer_than:
                return view
            time.sleep(0.01)
        return None

    @property
    def is_ready(self) -> bool:
        return self._store.add("ready", 0) > 0

    def ready(self) -> None:
        self._store.add("ready", 1)

    def broken(self, why: str) -> None:
        if self._store.add(f"broken {self._generation}", 1) == 1:
            self.next()

    def received(self, view: View, carried: Mapping[str, Any]) -> None: ...

    def formed(self, view: View, carried: Mapping[str, Any]) -> None:
        self.joins, self._generation = False, view.generation
        if view.generation == self.fails_in:
            self.fails_in = 0
            raise RuntimeError("gloo: another rank is gone")

    def carry(self) -> dict[str, Any]:
        return {}

    def left(self) -> None: ...

    def beat(self, *, waits: bool) -> None: ...


class Asks:
    """Rank zero's controller, which asks for the next group once, when a newcomer is ready."""

    def __init__(self, inner: LocalBrain, told: Told) -> None:
        self._inner, self._told = inner, told
        self._asked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def commands(self) -> Commands:
        if self._asked or self._inner.state.step < _CHANGES_AT or not self._told.is_ready:
            return self._inner.commands()
        self._asked = True
        return Commands(regroup=self._told.next())


class Clock:
    """By which steps are short, however busy the machine is."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        self._now_s += 0.001
        return self._now_s


def train(
    rank: int,
    path: str,
    groups: list[list[int]],
    norm: bool,
    dies_at: int | None,
    fails_in: int = 0,
    branched: bool = False,
    save_every: int | None = None,
) -> tuple[int, list[float], Any, int] | None:
    """Steps taken, all weights, what is known of the noise by layer, and how many batches the BatchNorm layer counted,
    or where the first branch began. ``None`` of the rank that is lost.
    """
    port: list[Any] = [None]
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = [store.port]
    dist.broadcast_object_list(port)
    if rank > 0:
        store = TCPStore("127.0.0.1", port[0], is_master=False)
    dist.destroy_process_group()

    settings = config(
        path,
        train={"samples": 12 * 120},
        batch={"initial": 12, "micro_batch": 4, "max": 24 if branched else 12},
        checkpoint={"every_samples": save_every},
        evaluation={"every_samples": None},
        measure={"groups": "layers"},
        controller=BRANCHED if branched else {},
    )
    device = torch.device("cpu")
    told = Told(rank, groups, store, port[0])
    if rank == 0:
        told.fails_in = fails_in
    own = Groups(told.member, device=device, hang_timeout_s=20.0)
    first: Any = Apart() if told.joins else own.form(told.latest(), overtaken=lambda: False, patience_s=60.0)
    brain: Any = Asks(LocalBrain(settings), told)
    worker = Worker(
        collective=ChangingCollective(first),
        device=device,
        brain=brain,
        runtime="ray",
        now=Clock(),
        membership=told,
        groups=own,
    )
    model = nn.Sequential(nn.BatchNorm1d(20), mlp()) if norm else mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    branch_from: int | None = None
    try:
        with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), worker=worker) as session:
            for step in session:
                if session.on_branch and branch_from is None:
                    branch_from = session.step_number
                    dies_at = branch_from + 3
                for batch in step:
                    loss = cross_entropy(session.model, batch)
                    if session.step_number == dies_at and worker.rank == 2:
                        raise Died
                    session.backward(loss)
                session.step()
                if told.joins is False and not told.is_ready and len(groups[0]) < len(groups[1]):
                    time.sleep(0.002)  # the newcomer should come before the run is over
    except Died:
        own.leave(broken=True)
        return None
    finally:
        store.add("over", 1)
        while rank == 0 and store.add("over", 0) < 3:
            time.sleep(0.01)
    counted = int(model[0].num_batches_tracked) if norm else 0
    if branched:
        counted = branch_from or 0
    weights = [float(p.detach().double().sum()) for p in model.parameters()]
    return session.step_number, weights, session._history.journal.noise.memory()["groups"], counted


def test_a_newcomer_to_several_ranks_exchanges_when_they_do(tmp_path: Path) -> None:
    found = run_fleet(train, 3, str(tmp_path), [[0, 1], [0, 1, 2]], False, None)
    assert found[0] == found[1] == found[2]
    assert found[0][0] == 120


def test_a_newcomer_comes_in_where_a_checkpoint_is_due_after_every_step(tmp_path: Path) -> None:
    found = run_fleet(train, 3, str(tmp_path), [[0, 1], [0, 1, 2]], False, None, 0, False, 12)
    assert found[0] == found[1] == found[2]
    assert found[0][0] == 120
    (joined,) = [row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "resize"]
    assert joined["step"] < 110


def test_a_step_begun_with_a_rank_that_is_lost_leaves_no_trace_in_running_means(tmp_path: Path) -> None:
    found = run_fleet(train, 3, str(tmp_path), [[0, 1, 2], [0, 1]], True, 5)
    assert found[2] is None
    # Three micro-batches a step: one for rank zero while there were three ranks, two from then on.
    assert found[0][3] == 5 * 1 + 115 * 2
    assert found[0][:3] == found[1][:3]


def test_steps_known_in_part_are_taken_in_once_though_the_group_must_be_formed_twice(tmp_path: Path) -> None:
    run_fleet(train, 3, str(tmp_path), [[0, 1, 2], [0, 1], [0, 1]], False, 5, 1)
    lines = [row["step"] for row in folder.rows(tmp_path / "run" / folder.METRICS)]
    assert lines == list(range(120))


def test_a_round_of_branches_that_a_loss_cut_short_begins_again_at_the_next_boundary(tmp_path: Path) -> None:
    found = run_fleet(train, 3, str(tmp_path), [[0, 1, 2], [0, 1]], False, None, 0, True)
    assert found[0] == found[1]
    rounds = [row["step"] for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "branches"]
    assert rounds[0] == found[0][3] + 1
