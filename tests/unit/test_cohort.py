"""Newcomers on their way are neither forgotten nor given up while the group that they are for changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.ray_train import cohort
from orchestrator.ray_train.cohort import Cohort

WORKERS: Any = ["a", "b"]


class Reserved:
    def wait(self, timeout_seconds: float) -> bool:
        return True

    def shutdown(self) -> None: ...


class Starting:
    """A group whose newcomers are started once ``go`` is set."""

    placement_strategy = "PACK"

    def __init__(self) -> None:
        self.resources_per_worker = {"CPU": 1.0}
        self.go = threading.Event()

    def get_worker_group_context(self) -> Any:
        return self

    def start_beside(self, slots: Any) -> Any:
        assert self.go.wait(60)
        return list(WORKERS)


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cohort, Starting]]:
    monkeypatch.setattr(cohort.Slots, "asked", lambda number, **how: Reserved())
    monkeypatch.setattr(cohort, "standings", lambda workers: {})
    group = Starting()
    yield Cohort(group, 2, timeout_s=1.0), group
    group.go.set()


def start(newcomers: Cohort, group: Starting) -> None:
    group.go.set()
    while not newcomers.is_ready():
        time.sleep(0.001)


def test_a_change_of_the_group_does_not_end_those_that_are_being_started(starting: tuple[Cohort, Starting]) -> None:
    newcomers, group = starting
    assert not newcomers.is_over(trains=["others"])
    start(newcomers, group)
    assert not newcomers.is_over(trains=["others", "a"])
    assert newcomers.workers == ["b"]
    assert newcomers.is_over(trains=["others", "a", "b"])


@pytest.mark.parametrize(("gone", "problem"), [([], None), (["b"], "one of them died")])
def test_a_newcomer_that_does_not_answer_is_given_up_only_if_it_is_dead(
    starting: tuple[Cohort, Starting], gone: Any, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    newcomers, group = starting
    start(newcomers, group)
    monkeypatch.setattr(cohort, "standings", lambda workers: {"a": None, "b": None})
    monkeypatch.setattr(cohort, "dead", lambda workers: gone)
    assert not newcomers.is_ready()
    assert newcomers.problem == problem
