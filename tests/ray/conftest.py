"""One small Ray cluster for all tests of the session."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    scratch = tempfile.mkdtemp(prefix="gs-")  # short: Ray puts sockets below it
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _temp_dir=scratch,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}},
    )
    yield
    ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)
