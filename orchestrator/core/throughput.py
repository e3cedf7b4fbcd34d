"""What a plan costs in time, from the step times measured so far.

Two readings of the same clock, the only one that enters the core. ``StepTimes`` belong to the layout of the moment: a
step is taken to last its longest run of micro-batches, what synchronising adds is inside the measured time of a
micro-batch, and nothing but the number of workers asked for depends on it. ``Timings`` remember several layouts, so
that a ``StepModel`` can tell what a step costs once from what a sample costs; only policies that are declared
time-dependent are shown it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

_WINDOW = 32
_ENOUGH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """The newest times per micro-batch [s], oldest first; the median is used, so that a pause does not count."""

    per_micro_batch_s: tuple[float, ...] = ()


def absorb(times: StepTimes, step_time_s: float, *, accum_steps: int) -> StepTimes:
    return replace(times, per_micro_batch_s=(*times.per_micro_batch_s, step_time_s / accum_steps)[-_WINDOW:])


def micro_batch_time_s(times: StepTimes) -> float | None:
    """Median time of one micro-batch [s], or ``None`` before enough steps were timed."""
    if len(times.per_micro_batch_s) < _ENOUGH:
        return None
    return statistics.median(times.per_micro_batch_s)


def predicted_saving_s(
    times: StepTimes, *, remaining_samples: int, batch: int, accum_now: int, accum_then: int
) -> float | None:
    """Time [s] that fewer accumulation steps would save over the samples that are left; ``None`` if unknown."""
    each = micro_batch_time_s(times)
    if each is None:
        return None
    return max(0, remaining_samples) / batch * (accum_now - accum_then) * each


_LAYOUTS = 8  # of the newest are remembered
_LEAST_RISE = 1e-3  # of a step's time, for twice its samples
_APART = 1.25  # lengths of a run nearer than this do not tell its slope from its start


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLayout:
    """The newest times [s], oldest first, of steps in which the busiest of ``workers`` took so many samples."""

    workers: int
    busiest_samples: int
    step_times_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """The layouts timed last, the present one at the end. They are of one micro-batch: another one begins anew."""

    layouts: tuple[TimedLayout, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """A step lasts ``once_s`` of its number of workers + ``sample_s`` x the samples of its busiest worker.

    Pollux (Qiao et al., OSDI 2021, arXiv:2008.12260) writes T = (a - 1) T_grad + (T_grad^g + T_sync^g)^(1/g) for a
    micro-batches a worker, T_grad rising with the micro-batch and T_sync with the workers K. Our micro-batch is fixed,
    so T_grad is one number and everything behind a T_grad is one number for each K, whatever the overlap g and the
    network: those numbers are what is fitted. Optimizer and bookkeeping, which Pollux leaves out, are in them as well.

    ``once_s`` holds (workers, seconds) of the fleets that were timed, in order; it never falls with the workers.
    """

    sample_s: float
    once_s: tuple[tuple[int, float], ...]

    @property
    def most_workers(self) -> int:
        """The largest fleet that was timed; nothing is said of larger ones."""
        return self.once_s[-1][0]

    def once(self, workers: int) -> float | None:
        """What a step of ``workers`` costs besides its samples [s]: on a line between the fleets that were timed, and
        below the smallest what that one costs."""
        for (fewer, low), (more, high) in pairwise(((1, self.once_s[0][1]), *self.once_s)):
            if fewer <= workers <= more:
                return low if more == fewer else low + (high - low) * (workers - fewer) / (more - fewer)
        return None

    def step_time_s(self, busiest_samples: float, *, workers: int) -> float | None:
        once = self.once(workers)
        return None if once is None else once + self.sample_s * busiest_samples


def note(timings: Timings, step_time_s: float, *, workers: int, busiest_samples: int) -> Timings:
    """Take in one step."""
    same = [t for t in timings.layouts if (t.workers, t.busiest_samples) == (workers, busiest_samples)]
    others = tuple(t for t in timings.layouts if t not in same)
    newest = (*(same[0].step_times_s if same else ()), step_time_s)[-_WINDOW:]
    layout = TimedLayout(workers=workers, busiest_samples=busiest_samples, step_times_s=newest)
    return Timings(layouts=(*others, layout)[-_LAYOUTS:])


def fit(timings: Timings) -> StepModel | None:
    """Least squares on relative errors of the layouts' medians, with one slope and a start for each fleet.

    ``None`` while slope and start cannot be told apart: no fleet was timed (eight steps each) at two run lengths that
    are 1.25 times apart, or longer runs took no longer, which ``took_no_longer`` tells.
    """
    line = _line(timings)
    if line is None or not line.rises:
        return None
    slope, once, least = line.rise / line.spread, [], 0.0
    for workers in sorted(line.centres):
        x, y = line.centres[workers]
        least = max(least, y - slope * x)  # more workers never synchronise faster; what looks so is noise
        once.append((workers, least))
    return StepModel(sample_s=slope, once_s=tuple(once))


def took_no_longer(timings: Timings) -> bool:
    """Whether runs of clearly different lengths were timed, and the longer ones took no longer."""
    line = _line(timings)
    return line is not None and not line.rises


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """What the slope common to all fleets is the ratio of, and (samples, seconds) in the middle of each fleet's."""

    rise: float
    spread: float
    centres: Mapping[int, tuple[float, float]]

    @property
    def rises(self) -> bool:
        """Whether twice the samples take noticeably longer; a slope by rounding is none."""
        samples, seconds = max(self.centres.values())
        return self.rise / self.spread * samples > _LEAST_RISE * seconds


def _line(timings: Timings) -> _Line | None:
    """``None`` where no fleet was timed at two lengths."""
    fleets: dict[int, list[tuple[float, float, float]]] = {}
    for layout in timings.layouts:
        if len(layout.step_times_s) >= _ENOUGH:
            seconds = statistics.median(layout.step_times_s)
            if seconds > 0:
                weight = len(layout.step_times_s) / seconds**2
                fleets.setdefault(layout.workers, []).append((weight, float(layout.busiest_samples), seconds))
    lengths = [[samples for _, samples, _ in fleet] for fleet in fleets.values()]
    if not any(max(each) >= _APART * min(each) for each in lengths):
        return None
    centres = {workers: _centre(fleet) for workers, fleet in fleets.items()}
    rise = spread = 0.0
    for workers, fleet in fleets.items():
        x, y = centres[workers]
        rise += math.fsum(w * (samples - x) * (seconds - y) for w, samples, seconds in fleet)
        spread += math.fsum(w * (samples - x) ** 2 for w, samples, _ in fleet)
    return _Line(rise=rise, spread=spread, centres=centres)


def _centre(fleet: list[tuple[float, float, float]]) -> tuple[float, float]:
    total = math.fsum(w for w, _, _ in fleet)
    return math.fsum(w * x for w, x, _ in fleet) / total, math.fsum(w * y for w, _, y in fleet) / total
