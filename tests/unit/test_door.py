"""What the controller may take for a hang, and what it may not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ray

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


def test_who_is_ready_to_join_waits_until_it_trains(door: Door) -> None:
    door.beat(waits=False)  # of the rehearsal
    door.ready()
    assert door.standing().waits
    place = Place(local_rank=0, local_world_size=1, node_rank=0)
    door.received(View(generation=3, members=("a",), places=(place,), store=("host", 1)), {"reports": 7})
    assert (door.standing().received, door.standing().generation, door.standing().reports) == (3, -1, 7)
    assert door.standing().waits
