"""Saved states come back exactly, or are refused."""

import json
import math

import pytest
from hypothesis import given, strategies as st

from orchestrator.core import codec
from orchestrator.core.throughput import StepTimes
from orchestrator.types import GradMeasured, GradSample, NoiseStats, Target, Verdict

KNOWN = {c.__name__: c for c in (StepTimes, GradMeasured, GradSample, NoiseStats, Target, Verdict)}
numbers = st.floats(allow_nan=False, allow_infinity=False)


def there_and_back(value: object) -> object:
    return codec.decode(json.loads(json.dumps(codec.encode(value))), KNOWN)


@given(st.lists(numbers), numbers, st.integers(0, 2**60), st.none() | numbers)
def test_values_survive_to_the_last_bit(times: list[float], loss: float, step: int, grad_sq: float | None) -> None:
    sample = GradSample(
        step=step, samples_seen=1, batch=1, micro_batches=1, loss=loss, lr=0.1, grad_sq=grad_sq
    )  # fmt: skip
    value = (StepTimes(per_micro_batch_s=tuple(times)), GradMeasured(sample=sample, step_time_s=math.pi))
    assert there_and_back(value) == value


def test_enums_keep_their_type() -> None:
    stats = NoiseStats(verdict=Verdict.TOO_NOISY, low=1.5)
    back = there_and_back(stats)
    assert back == stats
    assert isinstance(back, NoiseStats)
    assert back.verdict is Verdict.TOO_NOISY


def test_what_a_version_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown type 'Nonsense'"):
        codec.decode({"$": "Nonsense"}, KNOWN)
    with pytest.raises(ValueError, match="does not fit this version"):
        codec.decode({"$": "Target", "batch": 3, "colour": "red"}, KNOWN)
    with pytest.raises(TypeError, match="cannot encode"):
        codec.encode(object())
