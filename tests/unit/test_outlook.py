"""A plan's predicted step time, and later what really happened."""

from orchestrator.runtime.outlook import Outlook
from orchestrator.types import BatchPlan


def plan(batch: int, world_size: int = 1, generation: int = 0) -> BatchPlan:
    return BatchPlan(generation=generation, world_size=world_size, batch=batch, micro_batch=8)


def test_nothing_is_predicted_before_steps_were_seen() -> None:
    outlook = Outlook()
    assert outlook.expect(plan(32)) is None
    assert all(outlook.saw(0.4, plan(32)) is None for _ in range(20))


def test_a_step_is_predicted_by_its_longest_run_and_compared_once() -> None:
    outlook = Outlook()
    for _ in range(10):
        outlook.saw(0.4, plan(32))  # four micro-batches of 0.1 s
    assert outlook.expect(plan(96, world_size=2, generation=7)) == 0.1 * 6
    outcomes = [outlook.saw(0.9, plan(96, world_size=2, generation=7)) for _ in range(20)]
    (outcome,) = [found for found in outcomes if found is not None]
    assert outcome.generation == 7
    assert abs(outcome.predicted_step_time_s - 0.6) < 1e-12
    assert abs(outcome.realised_step_time_s - 0.9) < 1e-12


def test_a_pause_does_not_count() -> None:
    outlook = Outlook()
    for took in (0.4, 0.4, 30.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4):
        outlook.saw(took, plan(32))
    assert outlook.expect(plan(64)) == 0.1 * 8
