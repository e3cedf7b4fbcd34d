"""What the ranks tell each other is heard as it was said."""

from __future__ import annotations

from hypothesis import given, strategies as st

from orchestrator.runtime.announcement import Announcement, StepSums
from orchestrator.types import ApplyPlan, BatchPlan, Target

counts = st.integers(1, 2**40)
numbers = st.floats(allow_nan=False)


@st.composite
def plans(draw: st.DrawFn) -> ApplyPlan:
    batch = draw(counts)
    plan = BatchPlan(
        generation=draw(counts), world_size=draw(counts), batch=batch, micro_batch=draw(st.integers(1, batch))
    )
    target = Target(batch=batch, noise_scale=draw(st.none() | numbers), fresh=draw(st.booleans()))
    return ApplyPlan(plan=plan, target=target, lr_factor=draw(numbers), effective_step=draw(counts), reason="announced")


announcements = st.builds(
    Announcement,
    stop=st.booleans(),
    hold=st.booleans(),
    save=st.booleans(),
    saved_step=st.none() | st.integers(0, 2**40),
    rest_steps=st.integers(0, 16),
    plan=st.none() | plans(),
    sums=st.lists(st.builds(StepSums, weighted_sq_sum=numbers, loss_sum=numbers), max_size=3).map(tuple),
)


@given(announcements)
def test_an_announcement_of_one_rank_comes_back_whole(said: Announcement) -> None:
    assert Announcement.decode(said.encode()) == said


@given(announcements, st.booleans())
def test_what_rank_zero_says_is_heard_through_the_sum_with_a_rank_that_says_nothing(
    said: Announcement, stop: bool
) -> None:
    silent = Announcement(stop=stop, sums=tuple(StepSums(weighted_sq_sum=0.0, loss_sum=0.0) for _ in said.sums))
    heard = Announcement.decode([a + b for a, b in zip(said.encode(), silent.encode(), strict=True)])
    assert heard.plan == said.plan
    assert heard.sums == said.sums
    assert (heard.stop, heard.rest_steps, heard.saved_step) == (said.stop or stop, said.rest_steps, said.saved_step)
