"""Whoever comes, goes or is lost: Ray Train is handed each report that all have made, once, in order, and no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings, strategies as st

from orchestrator.ray_train.reports import Reports, _NumberedQueue

Made = tuple[int, str]  # number, and who made it


def drained(reports: Reports[Made], members: list[str]) -> list[tuple[int, list[Made | None]]]:
    found = []
    while (whole := reports.whole(members)) is not None:
        found.append(whole)
    return found


def test_one_who_comes_later_counts_as_having_made_those_before() -> None:
    reports: Reports[Made] = Reports()
    reports.begin("a", since=3)
    reports.take("a", 4, (4, "a"))
    reports.begin("b", since=5)
    reports.take("a", 5, (5, "a"))
    reports.take("a", 6, (6, "a"))
    assert drained(reports, ["a", "b"]) == [(4, [(4, "a"), None]), (5, [(5, "a"), None])]
    reports.take("b", 6, (6, "b"))
    assert drained(reports, ["a", "b"]) == [(6, [(6, "a"), (6, "b")])]


def test_what_one_was_kept_from_making_is_left_out_once_it_makes_the_next() -> None:
    reports: Reports[Made] = Reports()
    for name in ("a", "b"):
        reports.begin(name, since=0)
    reports.take("a", 1, (1, "a"))
    assert drained(reports, ["a", "b"]) == []
    reports.take("b", 2, (2, "b"))
    assert drained(reports, ["a", "b"]) == []
    reports.take("a", 2, (2, "a"))
    assert drained(reports, ["a", "b"]) == [(2, [(2, "a"), (2, "b")])]


def test_one_that_is_not_waited_for_may_still_report_and_be_waited_for_again() -> None:
    """Where Ray waits for the survivors of a node's notice alone."""
    reports: Reports[Made] = Reports()
    for name in ("a", "b"):
        reports.begin(name, since=0)
    reports.take("a", 1, (1, "a"))
    assert drained(reports, ["a"]) == [(1, [(1, "a")])]
    reports.take("b", 1, (1, "b"))
    for name in ("a", "b"):
        reports.take(name, 2, (2, name))
    assert drained(reports, ["a", "b"])[-1] == (2, [(2, "a"), (2, "b")])


def test_a_number_is_that_which_the_worker_counts_to_when_the_report_is_made() -> None:
    context = SimpleNamespace(current_report_index=6)
    queue = _NumberedQueue(context)
    report: Any = SimpleNamespace()
    queue.put(report)
    assert queue.get_nowait() is report
    assert report.number == 7


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_each_report_of_all_is_handed_on_once_whatever_happens_between(data: st.DataObject) -> None:
    """Workers report together; a loss may come between those that had made the newest and those that had not."""
    reports: Reports[Made] = Reports()
    count = data.draw(st.integers(0, 3))
    since = {"0": count}  # of those that train
    on_their_way: dict[str, list[int]] = {"0": []}  # made, and not seen by the controller yet
    reports.begin("0", since=count)
    expected: list[int] = []
    handed: list[int] = []

    def look(some: list[str]) -> None:
        for name in some:
            if on_their_way[name]:
                number = on_their_way[name].pop(0)
                reports.take(name, number, (number, name))
        whole = reports.whole(list(since))
        if whole is not None:
            number, found = whole
            handed.append(number)
            assert found == [(number, name) if since[name] < number else None for name in since]

    def make(some: list[str]) -> None:
        nonlocal count
        count += bool(some)
        for name in some:
            on_their_way[name].append(count)
        if len(some) == len(since):
            expected.append(count)

    for number in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["report", "join", "leave", "lose", "look"]))
        if what == "report":
            make(list(since))
        elif what == "join":
            since[f"new {number}"], on_their_way[f"new {number}"] = count, []
            reports.begin(f"new {number}", since=count)
        elif what in ("leave", "lose") and len(since) > 1:
            del since[data.draw(st.sampled_from(sorted(since)))]
            if what == "lose":
                make(data.draw(st.lists(st.sampled_from(sorted(since)), unique=True)))
            # What only those had made who are gone, went with them.
            expected = [one for one in expected if one in handed or min(since.values()) < one]
        else:
            look(data.draw(st.lists(st.sampled_from(sorted(since)), unique=True)))
    make(list(since))
    while any(on_their_way[name] for name in since):
        look(list(since))
    for _ in expected:
        look([])
    assert handed == sorted(set(handed))
    assert set(expected) <= set(handed)
