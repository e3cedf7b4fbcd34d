"""When does an estimator that reads a part of the parameters stop reading the whole? The run's first samples decide.

All of it is the same on every rank and runtime: a step is in the calibration or after it by the samples seen before it,
every rank takes in the moments of all ranks together, and the fit is made once all of them are in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, final

from orchestrator.core import calibration, codec
from orchestrator.core.calibration import CalibrationBlock, CalibrationFit, CalibrationSettings, CalibrationState
from orchestrator.measure.meter import CalibratedMeter, Meter
from orchestrator.runtime.journal import Journal

logger = logging.getLogger(__name__)

Moments = tuple[float, float]  # |G|^2, tr(Sigma)

_KEY = "calibration"  # in a checkpoint's metadata
_STATE_TYPES: Mapping[str, type] = {cls.__name__: cls for cls in (CalibrationState, CalibrationBlock, CalibrationFit)}


@final
class Calibration:
    """Does nothing with a meter that reads but one thing: then ``samples`` is ``None``."""

    def __init__(self, samples: int | None, *, meter: Meter) -> None:
        self._settings = None if samples is None else CalibrationSettings(samples=samples)
        self._meter = meter
        self._state = CalibrationState()
        self._fit: CalibrationFit | None = None  # made when the calibration ends

    def take_in(self, whole: Moments | None, part: Moments | None, *, samples_seen: int, batch: int) -> Moments | None:
        """One finished step, in order; its moments as they count from here on. ``None`` was not measured."""
        if self._settings is not None and whole is not None and part is not None:
            self._state = calibration.absorb(
                self._state, self._settings, whole=whole, part=part, samples_seen=samples_seen, batch=batch
            )
        if whole is None or self._fit is None or self._fit.problem is not None:
            return whole
        return calibration.scaled(whole, by=self._fit)  # what the meter reads now is the part

    def is_over(self, samples_seen: int) -> bool:
        """Whether the step just taken was the last of the calibration: all of its steps are wanted for ``conclude``."""
        return self._settings is not None and self._fit is None and samples_seen >= self._settings.samples

    def conclude(self, journal: Journal, *, step: int, samples_seen: int) -> None:
        """Fit, write it down, and read the one or the other from the next step on."""
        self._fit = calibration.fit(self._state)
        self._go_on()
        journal.event(
            "calibration", reason=_sentence(self._fit), step=step, samples_seen=samples_seen, **asdict(self._fit)
        )
        if self._fit.problem is not None and journal.is_open:
            logger.warning("%s", _sentence(self._fit))

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {_KEY: None if self._settings is None else codec.encode((self._state, self._fit))}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Raises ``TypeError`` or ``ValueError`` for what ``memory`` did not give."""
        if self._settings is not None and memory.get(_KEY) is not None:  # else another estimator wrote it
            self._state, self._fit = codec.decode(memory[_KEY], _STATE_TYPES)
            self._go_on()

    def _go_on(self) -> None:
        if self._fit is not None:
            assert isinstance(self._meter, CalibratedMeter), "the config gives calibration_samples to no other"
            self._meter.go_on_with("part" if self._fit.problem is None else "whole")


def _sentence(fit: CalibrationFit) -> str:
    slope = "of the noise scale not known" if fit.slope is None else f"of the noise scale {fit.slope:.4g}"
    if fit.slope_low is not None and fit.slope_high is not None:
        slope += f" [{fit.slope_low:.4g}, {fit.slope_high:.4g}]"
    found = f"{fit.steps} steps of {fit.samples} samples give a slope {slope}"
    if fit.problem is not None:
        return f"{found}, which cannot be used: {fit.problem}; the run goes on measuring per example"
    return (
        f"{found}: from here on only the normalisation layers are read, their |G|^2 times {fit.grad_sq_ratio:.4g} and "
        f"their tr(Sigma) times {fit.trace_cov_ratio:.4g}"
    )
