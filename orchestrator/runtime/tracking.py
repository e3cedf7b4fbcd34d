"""From the config's ``tracking`` to what follows the run: which libraries that needs, and which run they go on with."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError, Problem
from orchestrator.runtime import folder
from orchestrator.runtime.mlflow_tracker import MlflowTracker
from orchestrator.runtime.queued_tracker import LAST_PATIENCE_S, QueuedTracker, ServiceTracker
from orchestrator.runtime.spending import ENDING_S
from orchestrator.runtime.trackers import Trackers
from orchestrator.runtime.wandb_tracker import WandbTracker

_SECTION_KEYS = {"mlflow": "mlflow_experiment", "wandb": "wandb_project"}  # by extra, which is named as its module


def check_libraries(config: RunConfig) -> None:
    """Refuse services whose library is not installed; imports none. Raises ``ConfigError``."""
    problems = []
    for extra, key in _SECTION_KEYS.items():
        value = getattr(config.tracking, key)
        if value is not None and not _is_installed(extra):
            rule = f"needs {extra}, which is not installed here"
            fix = f"pip install 'groundswell[{extra}]' wherever the run trains, or take the key out"
            problems.append(Problem(source=None, key=f"tracking.{key}", value=value, rule=rule, fix=fix))
    if problems:
        raise ConfigError(*problems)


def _is_installed(module: str) -> bool:
    """A folder of that name is no library: W&B leaves a ``wandb`` wherever it was used."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def follow(trackers: Trackers, config: RunConfig, path: Path, *, now: Callable[[], float]) -> None:
    """Add the services of ``config`` to ``trackers``; those that an earlier attempt began with go on with its run."""
    known = {row["tracker"]: row["run_id"] for row in folder.rows(path / folder.EVENTS) if row["kind"] == "tracking"}

    # The workers wait with rank zero, and a budget keeps back no more than this for their end.
    last_patience_s = LAST_PATIENCE_S if config.budget.limit_worker_hours is None else min(LAST_PATIENCE_S, ENDING_S)

    def add(name: str, make: Callable[[], ServiceTracker]) -> None:
        every_s = config.tracking.every_s
        trackers.add(
            QueuedTracker(name, make, say=trackers.say, every_s=every_s, now=now, last_patience_s=last_patience_s)
        )

    if config.tracking.mlflow_experiment is not None:
        add("mlflow", lambda: MlflowTracker(config, run_id=known.get("mlflow")))
    if config.tracking.wandb_project is not None:
        add("wandb", lambda: WandbTracker(config, folder=path, run_id=known.get("wandb")))
