"""Ranks of a group that was formed anew exchange at the same steps, whatever each of them did before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.runtime.announcement import Announcement, StepSums
from orchestrator.runtime.exchange import Exchange, OwnStep
from orchestrator.types import BatchPlan

PLAN = BatchPlan(generation=0, world_size=2, batch=8, micro_batch=4)


class Two:
    """A group of two whose other rank has nothing to say; notes at which step each exchange began."""

    rank = 0
    world_size = 2

    def __init__(self) -> None:
        self.at = 0
        self.began_at: list[int] = []

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        self.began_at.append(self.at)
        return lambda: list(values)


class Quiet:
    """A talk in which steps are told, with no other wish than rank zero's about the next exchange."""

    def speak(self, said: Announcement, *, decided_at: Sequence[int], rest_steps: int) -> Announcement:
        return replace(said, rest_steps=rest_steps)

    def steps(self, finished: Sequence[Any]) -> None: ...


class Uncalibrated:
    def take_in(self, *args: Any, **kwargs: Any) -> None:
        return None


def exchange(lag_steps: int) -> tuple[Exchange, Two]:
    group, outer = Two(), (Quiet(), Uncalibrated())
    history: Any
    calibration: Any
    history, calibration = outer
    collective: Any = group
    return Exchange(collective, history, calibration, lag_steps=lag_steps, act=True), group


def take(pair: tuple[Exchange, Two], steps: range, *, decides_every: int) -> list[int]:
    told, group = pair
    for number in steps:
        group.at = number
        own = OwnStep(
            step=number,
            samples_seen=8 * (number + 1),
            plan=PLAN,
            spans=[],
            lr=0.1,
            rule_lr=0.1,
            parts=2,
            measured=False,
            mean_grad_sq=0.0,
            part_mean_grad_sq=None,
            sums=StepSums(weighted_sq_sum=0.0, loss_sum=0.0),
            step_time_s=0.02,
            decides=number % decides_every == 0,
        )
        told.add(own, stop=False)
    return group.began_at


@pytest.mark.parametrize("lag_steps", [1, 2, 5])
@pytest.mark.parametrize("boundary", range(20, 28))
def test_newcomers_exchange_when_the_others_do(boundary: int, lag_steps: int) -> None:
    old, new = exchange(lag_steps), exchange(lag_steps)
    take(old, range(boundary), decides_every=7)
    old[0].settle(stop=False)
    old[1].began_at.clear()
    old[0].begin_anew()
    coming = range(boundary, boundary + 60)
    assert take(old, coming, decides_every=7) == take(new, coming, decides_every=7)
