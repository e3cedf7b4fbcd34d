"""The request for nodes stands while it is of use: never while a size below the most is steady, for it holds nodes."""

from __future__ import annotations

from orchestrator.ray_train.resources import Request


class Ray:
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.request = Request(
            send=lambda: self.heard.append("sent"),
            repeat=lambda: self.heard.append("repeated"),
            cancel=lambda: self.heard.append("cancelled"),
        )

    def after(self, *, wanted: int, present: int) -> list[str]:
        self.heard.clear()
        self.request.keep(wanted=wanted, present=present, most=4)
        return list(self.heard)


def test_a_request_is_sent_at_once_and_again_until_all_are_there_and_then_cancelled_once() -> None:
    ray = Ray()
    ray.request.send(1)
    assert ray.after(wanted=1, present=1) == ["cancelled"]
    assert ray.after(wanted=1, present=1) == []
    assert ray.after(wanted=3, present=1) == ["sent"]
    assert ray.after(wanted=3, present=2) == ["repeated"]
    assert ray.after(wanted=3, present=3) == ["cancelled"]


def test_fewer_are_asked_for_before_workers_go_and_nothing_after() -> None:
    ray = Ray()
    ray.request.send(3)
    assert ray.after(wanted=1, present=3) == ["sent"]
    assert ray.after(wanted=1, present=3) == ["repeated"]
    assert ray.after(wanted=1, present=1) == ["cancelled"]


def test_a_lost_worker_is_asked_for_again() -> None:
    ray = Ray()
    ray.request.send(2)
    assert ray.after(wanted=2, present=2) == ["cancelled"]
    assert ray.after(wanted=2, present=1) == ["sent"]


def test_at_the_most_that_there_may_be_the_request_stands() -> None:
    ray = Ray()
    assert ray.after(wanted=4, present=3) == ["sent"]
    assert ray.after(wanted=4, present=4) == ["repeated"]
