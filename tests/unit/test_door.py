"""What the controller may take for a hang, and what it may not."""

from __future__ import annotations

from dataclasses import replace
from threading import Condition
from types import SimpleNamespace

import pytest
import ray
from ray.train.v2._internal.execution import context

from orchestrator.ports import Place, View
from orchestrator.ray_train.door import Door, Standing

TRAINS = Standing(
    generation=0, received=0, reports=0, ready=False, broken=-1, why="", left=False, beats=3, quiet_s=9.0, waits=False
)


def test_only_training_that_has_begun_and_waits_for_nobody_hangs() -> None:
    assert TRAINS.hangs(longest_s=8.0)
    assert not TRAINS.hangs(longest_s=10.0)
    assert not replace(TRAINS, beats=0).hangs(longest_s=8.0)
    assert not replace(TRAINS, waits=True).hangs(longest_s=8.0)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    class Context:
        def get_actor_id(self) -> str:
            return "a"

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    return Door()


def test_who_found_its_group_broken_waits(door: Door) -> None:
    door.beat(waits=False)
    assert not door.standing().waits
    door.broken("a rank is gone")
    assert door.standing().waits
    door.beat(waits=False)
    assert not door.standing().waits


def test_who_has_what_the_others_know_counts_on_from_there(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though those others are lost before the group is formed: it may go on alone, and make the next report."""
    counts = SimpleNamespace(
        report_order_condition=Condition(), report_call_index=2, current_report_index=2, collective_seq=5
    )
    monkeypatch.setattr(context, "get_train_context", lambda: counts)
    door.beat(waits=False)  # of the rehearsal
    door.ready()
    assert door.standing().waits
    place = Place(local_rank=0, local_world_size=1, node_rank=0)
    door.received(
        View(generation=3, members=("a",), places=(place,), store=("host", 1)), {"reports": 7, "collectives": 9}
    )
    assert (door.standing().received, door.standing().generation, door.standing().reports) == (3, -1, 7)
    assert door.standing().waits
    assert counts.report_call_index == counts.current_report_index == 7
    assert door.carry() == {"reports": 7, "collectives": 9}
