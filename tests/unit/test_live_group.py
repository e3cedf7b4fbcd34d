"""When a change of the group is in force for Ray Train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.ports import Place, View
from orchestrator.ray_train import live_group
from orchestrator.ray_train.live_group import LiveWorkerGroup, who_stays


@pytest.mark.parametrize(
    ("members", "left", "installed"), [(("b",), True, True), (("b",), False, False), (("a",), False, False)]
)
def test_the_next_rank_zero_is_met_as_soon_as_the_one_before_it_has_handed_over(
    members: tuple[str, ...], left: bool, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for the controller before the group stands, which nobody would answer otherwise."""
    found: list[int] = []
    group: Any = LiveWorkerGroup.__new__(LiveWorkerGroup)
    place = Place(local_rank=0, local_world_size=1, node_rank=0)
    group._view = View(generation=1, members=members, places=(place,), store=("host", 1))
    group._installed, group._workers_by_member = 0, {"a": "a", "b": "b"}
    monkeypatch.setattr(live_group, "member_of", lambda worker: worker)
    monkeypatch.setattr(LiveWorkerGroup, "get_workers", lambda self: ["a", "b"])
    standings = {"a": SimpleNamespace(generation=0, left=left), "b": SimpleNamespace(generation=0, left=False)}
    monkeypatch.setattr(LiveWorkerGroup, "_standings", lambda self, asked: {name: standings[name] for name in asked})
    monkeypatch.setattr(LiveWorkerGroup, "_install", lambda self, view, *, reports: found.append(view.generation))
    group._install_formed()
    assert found == [1] * installed


@pytest.mark.parametrize(
    ("nodes", "number", "stay"),
    [
        ("aabb", 4, [0, 1, 2, 3]),
        ("aabb", 2, [0, 1]),
        ("abab", 2, [0, 2]),  # and not one on each
        ("abbb", 3, [0, 1, 2]),
        ("abcbc", 3, [0, 1, 3]),
        ("abcc", 3, [0, 2, 3]),
        ("abc", 1, [0]),
    ],
)
def test_workers_go_so_that_nodes_get_empty_and_rank_zero_stays(nodes: str, number: int, stay: list[int]) -> None:
    assert who_stays(nodes, number) == stay
