"""A Ray that a run starts on this machine listens on its network, and asks whoever comes for a token."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_COME = (
    "import ray, sys\n"
    "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='error')\n"
    "print('CAME IN', ray.cluster_resources()['CPU'])\n"
)


@pytest.mark.ray
def test_who_has_no_token_does_not_come_in(cluster: None, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    assert not address.startswith("127.")

    def come(home: Path) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
        return subprocess.run(
            [sys.executable, "-c", _COME, address],
            env={**environment, "RAY_AUTH_MODE": "token", "HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    stranger = come(tmp_path)
    assert stranger.returncode != 0
    assert "CAME IN" not in stranger.stdout
    assert "CAME IN 4.0" in come(Path.home()).stdout
