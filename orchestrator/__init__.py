"""Groundswell: a global batch that grows with the measured gradient noise scale while training goes on.

For people who own their loop: ``Session``, with a ``RunConfig`` from ``load_config``, runs the same lines on one
process, under torchrun and under Ray Train.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "RunConfig": "orchestrator.config",
    "load_config": "orchestrator.config",
    "Session": "orchestrator.session",
    "Task": "orchestrator.tasks.protocol",
    "Worker": "orchestrator.runtime.worker",
    "local_worker": "orchestrator.runtime.worker",
    "shard": "orchestrator.runtime.sharding",
}

__all__ = ["RunConfig", "Session", "Task", "Worker", "load_config", "local_worker", "shard"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, and reading a config needs none of it."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
