"""Nodes come when training wants workers, and go within a minute of the decision that it wants fewer.

Ray's own autoscaler decides; its provider of nodes starts them as processes of this machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launch.cli import main
from launch.outcome import EXIT_STOPPED
from orchestrator.config import to_yaml
from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify
from tests.ray.test_head_dies import environment, kill, processes_of, running, until
from tests.support import config, free_port

GIVEN_BACK_WITHIN_S = 60
HEAD = "f" * 51 + "00000"  # as the provider counts the nodes that it simulates


@contextmanager
def autoscaling_head() -> Iterator[tuple[str, str]]:
    """A head without CPUs that may add nodes of one: its address, and the folder that its processes are known by."""
    place, port = tempfile.mkdtemp(prefix="ga-", dir="/tmp"), free_port()
    scaling = {
        "cluster_name": "grows",
        "max_workers": 3,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "use_node_id_as_ip": True,  # without it the autoscaler knows none of them, and takes none back
            "disable_launch_config_check": True,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 80_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 3,
            },
        },
        "head_node_type": "ray.head.default",
        # What Ray reads of every such file.
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    file = Path(place) / "autoscaling.json"
    file.write_text(json.dumps(scaling))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={place}", "--include-dashboard=false"]
    command += [f"--dashboard-port={free_port()}", f"--autoscaling-config={file}", "--object-store-memory=80000000"]
    simulated = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_raylet_start_wait_time_s": "150",  # on a busy machine
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_CLOUD_INSTANCE_ID": HEAD,
    }

    def started() -> str:
        return Path(f"{place}.log").read_text()

    with open(f"{place}.log", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment() | simulated)
        try:
            until(lambda: "runtime started" in started(), what=started)
            yield f"127.0.0.1:{port}", place
        finally:
            process.kill()
            kill(place)
            process.wait()


def nodes(place: str) -> int:
    """How many are there, the head among them."""
    found = 0
    for pid in processes_of(place):
        try:
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        found += program.endswith(b"/raylet")
    return found


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_nodes_come_for_workers_and_go_within_a_minute_of_wanting_fewer(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    settings = config(
        tmp_path,
        task={"name": "tests.ray.tasks:slow", "options": {"step_s": 0.05, "pids": str(tmp_path / "pids")}},
        train={"samples": 1_000_000},
        batch={"initial": 8, "micro_batch": 4, "max": 64},
        controller={"policy": "schedule", "ramp": [[80, 24]], "every_samples": 40},
        workers={"initial": 1, "max": 3, "micro_batches_each": 2, "when": "always"},
        ledger=True,
    )
    file, run, said = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "said"
    file.write_text(to_yaml(settings))

    def rows() -> list[dict[str, Any]]:
        return list(folder.rows(run / folder.METRICS)) if (run / folder.METRICS).exists() else []

    def workers() -> int:
        return rows()[-1]["world_size"] if rows() else 0

    with autoscaling_head() as (address, place), running(file, address, said) as job:
        until(lambda: workers() == 1 or job.poll() is not None, what=said.read_text)
        assert nodes(place) == 2, said.read_text()
        began_s = time.monotonic()
        until(lambda: workers() == 3 or job.poll() is not None, what=said.read_text)
        assert nodes(place) == 4, said.read_text()
        print(f"three workers on nodes of their own {time.monotonic() - began_s:.0f} s after the first step")
        done = CliRunner().invoke(main, ["control", str(run), "cap", "--max-workers", "1"])
        assert done.exit_code == 0, done.output
        ordered_s = time.monotonic()
        until(lambda: nodes(place) == 2 or job.poll() is not None, what=said.read_text)
        went_s = time.monotonic() - ordered_s
        print(f"two nodes given back {went_s:.0f} s after the order")
        (run / folder.STOP_REQUEST).touch()
        assert job.wait(100) == EXIT_STOPPED, said.read_text()
    assert workers() == 1
    assert went_s < GIVEN_BACK_WITHIN_S
    assert verify(run).violation is None
