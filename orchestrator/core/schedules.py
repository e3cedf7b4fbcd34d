"""The learning rate over the run, as a fraction of its base, by samples seen.

Indexed by samples, a schedule ends where it should whatever batches were used on the way; indexed by optimizer steps,
a growing batch would stretch it (a cosine would end at 0.15 instead of 0 after one doubling half-way).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orchestrator.registry import resolve

Schedule = Callable[[int], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSettings:
    """The config's ``schedule`` section; what a schedule does not use is ``None``."""

    name: str
    warmup_samples: int = 0
    start_fraction: float | None = None
    final_fraction: float | None = None
    milestones_samples: tuple[int, ...] | None = None
    gamma: float | None = None
    decay_samples: int | None = None


def build_schedule(settings: ScheduleSettings, *, total_samples: int) -> Schedule:
    """``samples seen -> fraction of the base rate``. Raises ``ValueError`` when it does not fit the run.

    ``package.module:factory`` is called as ``factory(settings, total_samples=...)`` and brings its own warm-up.
    """
    if settings.warmup_samples >= total_samples:
        raise ValueError(
            f"schedule.warmup_samples {settings.warmup_samples} does not end within the run's {total_samples} samples; "
            "shorten it, or train longer"
        )
    factory = resolve(settings.name, SCHEDULES, kind="schedule")
    schedule: Schedule = factory(settings, total_samples=total_samples)
    return schedule if settings.name not in _WARMED else _with_warmup(schedule, settings.warmup_samples)


def constant(settings: ScheduleSettings, *, total_samples: int) -> Schedule:
    return lambda samples: 1.0


def cosine(settings: ScheduleSettings, *, total_samples: int) -> Schedule:
    """Half a cosine from the end of the warm-up to ``final_fraction`` at the end of the run.

    Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts.
    """
    final = settings.final_fraction or 0.0
    return lambda samples: _cosine(_progress(samples, settings.warmup_samples, total_samples), 1.0, final)


def linear(settings: ScheduleSettings, *, total_samples: int) -> Schedule:
    """A straight line from the end of the warm-up to ``final_fraction`` at the end of the run."""
    final = settings.final_fraction or 0.0
    return lambda samples: 1 + (final - 1) * _progress(samples, settings.warmup_samples, total_samples)


def step(settings: ScheduleSettings, *, total_samples: int) -> Schedule:
    """Multiplied by ``gamma`` at each of ``milestones_samples``."""
    gamma = 0.1 if settings.gamma is None else settings.gamma
    milestones = settings.milestones_samples or ()
    return lambda samples: gamma ** sum(samples >= milestone for milestone in milestones)


def wsd(settings: ScheduleSettings, *, total_samples: int) -> Schedule:
    """Warm-up, stable, then a straight line to ``final_fraction`` over the last ``decay_samples``.

    Hu et al. 2024, arXiv:2404.06395, with a straight line for their decay.
    """
    final, decay = settings.final_fraction or 0.0, settings.decay_samples or 0
    if decay > total_samples - settings.warmup_samples:
        raise ValueError(
            f"schedule.decay_samples {decay} and warmup_samples {settings.warmup_samples} do not fit into the run's "
            f"{total_samples} samples; shorten one"
        )
    return lambda samples: 1 + (final - 1) * _progress(samples, total_samples - decay, total_samples)


def one_cycle(settings: ScheduleSettings, *, total_samples: int) -> Schedule:
    """Up along a cosine from ``start_fraction`` over ``warmup_samples``, then down to ``final_fraction``.

    Smith and Topin 2017, arXiv:1708.07120.
    """
    start, final = settings.start_fraction or 0.0, settings.final_fraction or 0.0
    peak = settings.warmup_samples

    def fraction(samples: int) -> float:
        if samples < peak:
            return _cosine(samples / peak, start, 1.0)
        return _cosine(_progress(samples, peak, total_samples), 1.0, final)

    return fraction


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "step": step,
    "wsd": wsd,
    "one_cycle": one_cycle,
}
_WARMED = frozenset({"constant", "cosine", "linear", "step", "wsd"})
_FIRST_STEPS = 100  # a warm-up begins at this part of its way, so that the first step is not lost at a rate of zero


def _with_warmup(schedule: Schedule, warmup_samples: int) -> Schedule:
    def fraction(samples: int) -> float:
        if samples >= warmup_samples:
            return schedule(samples)
        return schedule(samples) * max(samples / warmup_samples, 1 / _FIRST_STEPS)

    return fraction


def _progress(samples: int, first: int, last: int) -> float:
    """Where ``samples`` lies between ``first`` (0) and ``last`` (1)."""
    if last <= first:
        return float(samples >= last)
    return min(1.0, max(0.0, (samples - first) / (last - first)))


def _cosine(progress: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
