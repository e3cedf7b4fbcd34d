"""Connects to a Ray cluster, or starts one on this machine, and runs the trainer on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from orchestrator.config import RunConfig


def fit(config: RunConfig, *, resume: bool, address: str, on_start: Callable[[str], None]) -> None:
    """Train to the end or to a stop. Raises the error that ended it, ours where it was ours.

    ``on_start`` is given the host and port of the head, once it is known.
    """
    import ray

    from orchestrator.ray_train.trainer import AdaptiveTrainer, own_error

    started = not ray.is_initialized()
    if started:
        # A user's task is imported by the workers as it is here.
        paths = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
    on_start(str(ray.get_runtime_context().gcs_address))
    try:
        AdaptiveTrainer(config, resume=resume).fit()
    except Exception as error:
        raise own_error(error) or error from error
    finally:
        if started:
            ray.shutdown()


def add_working_directory() -> None:
    """Let a task be imported from where the command was typed, as ``python`` itself would."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
