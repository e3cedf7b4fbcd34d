"""One small Ray cluster for all tests of the session."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import free_port

ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture(scope="session")
def metrics_port() -> int:
    """Where the cluster's metrics can be scraped."""
    return free_port()


@pytest.fixture(scope="session")
def cluster(metrics_port: int) -> Iterator[None]:
    import ray

    # The agents read it there, not from a system config.
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112  # as Ray spells it
    scratch = tempfile.mkdtemp(prefix="gs-")  # short: Ray puts sockets below it
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _temp_dir=scratch,
        _metrics_export_port=metrics_port,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}},
    )
    yield
    ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)
