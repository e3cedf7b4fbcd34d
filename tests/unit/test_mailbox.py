"""The mailbox tells the controller's side when to come again."""

from __future__ import annotations

import pytest

from orchestrator.ray_train import mailbox
from orchestrator.ray_train.mailbox import Mailbox
from orchestrator.types import GradMeasured, GradSample

STEP_S, BATCH = 0.02, 8


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def measured(step: int) -> GradMeasured:
    seen = (step + 1) * BATCH
    return GradMeasured(sample=GradSample(step=step, samples_seen=seen, batch=BATCH, micro_batches=2, loss=1.0, lr=0.1))


@pytest.mark.parametrize("group", [1, 3, 16])
def test_it_is_due_when_the_next_decision_is_however_many_steps_come_at_once(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(mailbox, "time", clock)
    box = Mailbox(every_samples=100 * BATCH)
    assert box.exchange(()).due_in_s is None
    step = 0
    while step + group <= 80:
        clock.now_s += group * STEP_S
        for _ in range(group):
            box.post(measured(step))
            clock.now_s += 1e-5  # they are posted one right after the other
            step += 1
    assert box.exchange(()).due_in_s == pytest.approx((100 - step) * STEP_S, rel=0.02)
    clock.now_s += 0.1
    assert box.exchange(()).due_in_s == pytest.approx((100 - step) * STEP_S - 0.1, rel=0.05)
