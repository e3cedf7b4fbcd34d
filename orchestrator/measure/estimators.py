"""The ways to measure that a config can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from orchestrator.errors import ConfigError
from orchestrator.measure.meter import Estimator
from orchestrator.measure.micro_batch import GradMeter
from orchestrator.measure.norm_layers import NormLayersMeter
from orchestrator.measure.per_example import PerExampleMeter
from orchestrator.registry import resolve

ESTIMATORS: Mapping[str, Estimator] = {
    "micro_batch": Estimator(build=lambda model, parameters, settings: GradMeter(parameters)),
    "per_example": Estimator(
        build=lambda model, parameters, settings: PerExampleMeter(model, parameters, leave_out=settings.leave_out),
        compares="samples",
    ),
    "norm_layers": Estimator(
        build=lambda model, parameters, settings: NormLayersMeter(model, parameters, leave_out=settings.leave_out),
        compares="samples",
    ),
    "split": Estimator(build=lambda model, parameters, settings: GradMeter(parameters), halves=True),
}


def find_estimator(name: str) -> Estimator:
    """The one called ``name``: built in, or what ``package.module:factory`` returns. Raises ``ConfigError``."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    try:
        factory: Callable[[], object] = resolve(name, {}, kind="estimator")

    except ValueError as error:
        raise ConfigError(str(error)) from error
    found = factory()
    if not isinstance(found, Estimator):
        raise ConfigError(
            f"estimator {name!r} returned {type(found).__name__}; its factory takes nothing and returns an "
            "orchestrator.measure.meter.Estimator"
        )
    return found
