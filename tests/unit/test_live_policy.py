"""What the scaling policy asks of a group whose workers come and go while the others train."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.train.v2.api.config import ScalingConfig

from orchestrator.ports import Commands
from orchestrator.ray_train.policy import AdaptiveScalingPolicy
from orchestrator.ray_train.resources import Request
from tests.support import config


class Group:
    """So many workers train, and some newcomers are ready to."""

    def __init__(self, workers: int, *, newcomers: int) -> None:
        self.workers, self.newcomers = workers, newcomers
        self.notes: tuple[Any, ...] = ()
        self.lost = self.preempted = 0
        self.is_changing = False
        self.views: list[int] = []

    def __len__(self) -> int:
        return self.workers

    @property
    def recruits(self) -> bool:
        return self.newcomers > 0

    def look(self) -> None: ...

    def view_with(self, number: int) -> Any:
        self.views.append(number)
        self.newcomers -= max(0, number - self.workers)
        self.workers = number
        return SimpleNamespace(members=("rank zero",))

    def member(self, name: str) -> Any:
        """Rank zero stays what it is."""
        return SimpleNamespace(actor=None)

    def dismiss(self, why: str) -> None:
        self.newcomers = 0


class Host:
    begun = True

    def __init__(self, wanted: int) -> None:
        self.wanted_workers = wanted

    def command(self, commands: Commands) -> None: ...


def nothing() -> None:
    """No cluster is asked for anything."""


def views_told(folder: Path, *, workers: int, newcomers: int, wanted: int) -> tuple[list[int], int]:
    """The sizes of the groups that are told in some polls, and the newcomers that wait in the end."""
    settings = config(folder, workers={"initial": wanted, "max": 8})
    policy = AdaptiveScalingPolicy(ScalingConfig(num_workers=(1, 8)), settings)
    policy._request = Request(send=nothing, repeat=nothing, cancel=nothing)
    group: Any = Group(workers, newcomers=newcomers)
    host: Any = Host(wanted)
    for _ in range(4):
        policy._change_live(group, host)
    return group.views, group.newcomers


def test_a_group_changes_once_to_what_is_wanted(tmp_path: Path) -> None:
    assert views_told(tmp_path, workers=2, newcomers=2, wanted=4) == ([4], 0)


def test_newcomers_that_are_not_wanted_any_more_are_dismissed_and_training_is_left_alone(tmp_path: Path) -> None:
    assert views_told(tmp_path, workers=2, newcomers=2, wanted=2) == ([], 0)
    assert views_told(tmp_path, workers=2, newcomers=2, wanted=3) == ([3], 0)
