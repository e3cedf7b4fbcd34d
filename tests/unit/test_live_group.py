"""When a change of the group is in force for Ray Train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

from orchestrator.ports import Place, View
from orchestrator.ray_train import live_group
from orchestrator.ray_train.live_group import LiveWorkerGroup
from orchestrator.ray_train.places import who_stays

GONE = WorkerHealthCheckFailedError("gone", failure=RuntimeError("the actor died"))


@pytest.mark.parametrize(
    ("members", "left", "installed"), [(("b",), True, True), (("b",), False, False), (("a",), False, False)]
)
def test_the_next_rank_zero_is_met_as_soon_as_the_one_before_it_has_handed_over(
    members: tuple[str, ...], left: bool, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for the controller before the group stands, which nobody would answer otherwise."""
    installed_as: list[int] = []
    group: Any = LiveWorkerGroup.__new__(LiveWorkerGroup)
    place = Place(local_rank=0, local_world_size=1, node_rank=0)
    group._view = View(generation=1, members=members, places=(place,), store=("host", 1))
    group._installed, group._workers_by_member = 0, {"a": "a", "b": "b"}
    monkeypatch.setattr(live_group, "member_of", lambda worker: worker)
    monkeypatch.setattr(LiveWorkerGroup, "get_workers", lambda self: ["a", "b"])
    found = {"a": SimpleNamespace(generation=0, left=left), "b": SimpleNamespace(generation=0, left=False)}
    monkeypatch.setattr(live_group, "standings", lambda asked: {name: found[name] for name in asked})
    monkeypatch.setattr(live_group, "heard", lambda asked: [found[name] for name in asked])
    monkeypatch.setattr(
        LiveWorkerGroup, "_install", lambda self, view, *, reports: installed_as.append(view.generation)
    )
    group._install_formed()
    assert installed_as == [1] * installed


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


def polled(**given: Any) -> Any:
    return WorkerStatus(**{"running": True, "error": None, "training_report": None, **given})


@pytest.mark.parametrize(
    ("errors", "running", "left"),
    [
        ([None, GONE, None], [True, True, True], [0, 2]),
        ([GONE, GONE, None], [True, True, True], None),  # fewer than the fewest
        ([None, GONE, ValueError()], [True, True, True], None),  # one has failed by itself
        ([None, GONE, None], [True, True, False], None),  # one is done
        ([None, None, None], [True, True, True], None),
    ],
)
def test_others_go_on_without_those_that_are_gone_where_enough_of_them_train(
    errors: list[Any], running: list[bool], left: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    group: Any = LiveWorkerGroup.__new__(LiveWorkerGroup)
    monkeypatch.setattr(LiveWorkerGroup, "get_workers", lambda self: ["a", "b", "c"])
    without: list[str] = []
    monkeypatch.setattr(LiveWorkerGroup, "_go_on_without", lambda self, gone: without.extend(gone))
    results = [polled(error=error, running=runs) for error, runs in zip(errors, running, strict=True)]
    found = group._without_the_gone(results, fewest=2)
    assert found == (results if left is None else [results[rank] for rank in left])
    assert without == ([] if left is None else [name for rank, name in enumerate("abc") if rank not in left])
