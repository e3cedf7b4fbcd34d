"""What a step costs once and what a sample costs, told apart from step times alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from orchestrator.core import codec, throughput
from orchestrator.core.throughput import StepModel, TimedLayout, Timings, fit, note


def timed(*steps: tuple[int, int, float], each: int = 8) -> Timings:
    """``each`` equal steps of every (workers, samples of the busiest, seconds)."""
    timings = Timings()
    for workers, samples, seconds in steps:
        for _ in range(each):
            timings = note(timings, seconds, workers=workers, busiest_samples=samples)
    return timings


def found(*steps: tuple[int, int, float], each: int = 8) -> StepModel:
    model = fit(timed(*steps, each=each))
    assert model is not None
    return model


def test_two_lengths_give_what_a_step_and_what_a_sample_cost() -> None:
    model = found((1, 32, 0.164), (1, 64, 0.228))
    assert (model.sample_s, model.once(1)) == pytest.approx((0.002, 0.1), rel=1e-9)
    assert model.step_time_s(1000, workers=1) == pytest.approx(2.1, rel=1e-9)


def test_noisy_times_of_two_fleets_give_the_planted_model_back() -> None:
    """A tenth of noise on each time, and pauses of a minute now and then; 5 seeds, each within 15 %."""
    for seed in range(5):
        rng, timings = np.random.default_rng(seed), Timings()
        for workers, samples in ((1, 32), (1, 64), (1, 128), (2, 64), (2, 128)):
            for step in range(32):
                seconds = 0.1 + 0.06 * (workers == 2) + 0.002 * samples
                noisy = 60.0 if step % 10 == 3 else seconds * float(np.exp(0.1 * rng.standard_normal()))
                timings = note(timings, noisy, workers=workers, busiest_samples=samples)
        model = fit(timings)
        assert model is not None
        assert (model.once(1), model.once(2), model.sample_s) == pytest.approx((0.1, 0.16, 0.002), rel=0.15)


@pytest.mark.parametrize(("overlap", "expected"), [(1.0, 7.0), (2.0, 5.0)])
def test_the_step_times_of_pollux_are_of_this_form_at_a_fixed_micro_batch(overlap, expected) -> None:
    """T_grad = 3, T_sync = 4: one micro-batch takes their sum without overlap, and 5 with the exponent 2."""

    def pollux(micro_batches: int, sync: float) -> float:
        return (micro_batches - 1) * 3.0 + float((3.0**overlap + sync**overlap) ** (1 / overlap))

    model = found((2, 10, pollux(1, 4.0)), (2, 20, pollux(2, 4.0)), (8, 10, pollux(1, 9.0)))
    assert model.step_time_s(10, workers=2) == pytest.approx(expected, rel=1e-9)
    for micro_batches in (3, 17):
        for workers, sync in ((2, 4.0), (8, 9.0)):
            predicted = model.step_time_s(10 * micro_batches, workers=workers)
            assert predicted == pytest.approx(pollux(micro_batches, sync), rel=1e-9)


@pytest.mark.parametrize(
    "steps",
    [
        (),
        ((1, 32, 0.1),),
        ((1, 32, 0.1), (1, 39, 0.11)),  # lengths too much alike
        ((1, 32, 0.1), (2, 64, 0.2)),  # each fleet at one length
        ((1, 32, 0.1), (1, 64, 0.1)),  # more samples for nothing
        ((1, 32, 0.1), (1, 64, 0.1 + 1e-16)),  # a slope of nothing but rounding
        ((1, 32, 0.2), (1, 64, 0.1)),
    ],
)
def test_what_cannot_be_told_apart_is_no_model(steps) -> None:
    assert fit(timed(*steps)) is None


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((), False),
        (((1, 32, 0.1), (1, 39, 0.1)), False),  # lengths too much alike
        (((1, 32, 0.1), (1, 64, 0.1)), True),
        (((1, 32, 0.2), (1, 64, 0.1)), True),
        (((1, 32, 0.1), (1, 64, 0.1 + 1e-16)), True),
        (((1, 32, 0.1), (1, 64, 0.11)), False),  # a model
    ],
)
def test_that_longer_steps_took_no_longer_is_said_where_it_was_seen(steps, said) -> None:
    assert throughput.took_no_longer(timed(*steps)) == said


def test_seven_steps_of_a_length_are_not_enough() -> None:
    few = timed((1, 64, 0.2), each=7)
    enough = timed((1, 32, 0.1)).layouts
    assert fit(Timings(layouts=(*enough, *few.layouts))) is None
    assert fit(note(Timings(layouts=(*enough, *few.layouts)), 0.2, workers=1, busiest_samples=64)) is not None


def test_a_fleet_between_those_timed_lies_on_a_line_and_nothing_is_said_of_larger_ones() -> None:
    model = StepModel(sample_s=1.0, once_s=((2, 0.1), (6, 0.5)))
    assert [model.once(k) for k in (1, 2, 3, 4, 6)] == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.5])
    assert (model.once(7), model.step_time_s(1.0, workers=7), model.most_workers) == (None, None, 6)
    assert StepModel(sample_s=1.0, once_s=((1, 0.3),)).once(1) == 0.3


def test_more_workers_never_synchronise_faster_and_nothing_costs_less_than_nothing() -> None:
    model = found((1, 10, 1.5), (1, 20, 2.5), (4, 10, 1.2), (4, 20, 2.2))
    assert [model.once(k) for k in (1, 4)] == pytest.approx([0.5, 0.5], abs=0.05)
    assert found((1, 10, 1.0), (1, 20, 2.5)).once(1) == 0.0


def test_only_the_newest_layouts_and_times_are_kept() -> None:
    timings = timed(*((1, 10 * n, float(n)) for n in range(1, 13)), each=40)
    assert [t.busiest_samples for t in timings.layouts] == [10 * n for n in range(5, 13)]
    assert {len(t.step_times_s) for t in timings.layouts} == {32}
    again = note(timings, 9.0, workers=1, busiest_samples=50)
    assert again.layouts[-1] == TimedLayout(workers=1, busiest_samples=50, step_times_s=(*[5.0] * 31, 9.0))
    assert len(again.layouts) == 8


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 500), st.floats(1e-6, 1e3)), max_size=12))
def test_whatever_was_timed_a_model_is_positive_and_survives_its_encoding(steps) -> None:
    timings = timed(*steps)
    known = {c.__name__: c for c in (Timings, TimedLayout)}
    assert codec.decode(json.loads(json.dumps(codec.encode(timings))), known) == timings
    model = throughput.fit(timings)
    if model is not None:
        assert model.sample_s > 0
        once = [seconds for _, seconds in model.once_s]
        assert once == sorted(once)
        assert once[0] >= 0
