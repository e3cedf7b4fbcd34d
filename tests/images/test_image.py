"""The image builds from its Dockerfile, and does what it is for as user 1000: minutes, and ten gigabytes meanwhile."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.buildah import ROOT, Buildah, built_image

pytestmark = [pytest.mark.image, pytest.mark.timeout(2400)]
TAG = "localhost/groundswell:cpu"
README = (ROOT / "README.md").read_text()

# What docker/compose.yaml starts, on one machine's network: a head without CPUs, a worker, and a token for both.
CLUSTER = """
set -eu
export OMP_NUM_THREADS=1 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/token
(umask 077; head -c 32 /dev/urandom | base64 > token)
ray start --head --block --num-cpus=0 --num-gpus=0 --object-store-memory=200000000 --temp-dir=/tmp/gs \
    --port=GCS --ray-client-server-port=CLIENT --dashboard-port=DASHBOARD --dashboard-agent-listen-port=AGENT \
    --metrics-export-port=METRICS > head.log 2>&1 &
head=$!
trap 'kill $head' EXIT
comes() { tries=0; until "$@"; do tries=$((tries + 1)); test $tries -lt 90; sleep 1; done; }
comes groundswell-health $head AGENT
echo "the head is well" > seen
ray start --block --address=127.0.0.1:GCS --num-cpus=1 --object-store-memory=200000000 > worker.log 2>&1 &
worker=$!
trap 'kill $worker $head' EXIT
comes wget -qO metrics http://127.0.0.1:METRICS/metrics
grep -q '^# HELP' metrics
if wget -qO- http://127.0.0.1:DASHBOARD/api/jobs/; then exit 3; else echo "refused without a token" >> seen; fi
wget -qO- --header="Authorization: Bearer $(cat token)" http://127.0.0.1:DASHBOARD/api/jobs/ >> seen
groundswell run digits --set train.epochs=4 --set workers.max=1 --set run.name=on_cluster \
    --address 127.0.0.1:GCS >> seen
kill $worker
wait $worker || true
kill $head
wait $head || true
trap - EXIT
if groundswell-health $head AGENT; then exit 4; fi
echo "ended" >> seen
"""


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    with built_image(TAG) as builder:
        builder("from", "--name", "plain", TAG)
        yield builder


def test_it_runs_as_user_1000_who_cannot_change_what_is_installed(buildah: Buildah) -> None:
    assert buildah.run("plain", "id", "-u").stdout.strip() == "1000"
    assert buildah.run("plain", "touch", "/opt/groundswell/x", check=False).returncode != 0
    buildah.run("plain", "touch", "/home/ray/x", "/home/ray/runs/x")


@pytest.mark.parametrize("shell", ["-c", "-lc"])
def test_kuberay_finds_what_it_calls(buildah: Buildah, shell: str) -> None:
    seen = buildah.run("plain", "/bin/bash", shell, "command -v ray python groundswell wget").stdout.split()
    assert seen == [*(f"/opt/groundswell/bin/{name}" for name in ("ray", "python", "groundswell")), "/usr/bin/wget"]


def test_doctor_finds_all_well(buildah: Buildah) -> None:
    said = buildah.run("plain", "tini", "-s", "--", "groundswell", "doctor").stdout
    assert said.splitlines()[-1] == "All is well."
    assert "1 node" in said


def test_digits_trains_under_ray(buildah: Buildah) -> None:
    command = "OMP_NUM_THREADS=1 groundswell run digits --set train.epochs=4 && groundswell ledger verify runs/digits"
    said = buildah.run("plain", "bash", "-c", command).stdout
    (accuracy,) = re.findall(r"Held out: accuracy ([\d.]+)", said)
    assert float(accuracy) > 0.95
    assert "exactly once" in said


def test_a_head_and_a_worker_train_behind_a_token(buildah: Buildah) -> None:
    script = CLUSTER
    for name in ("GCS", "CLIENT", "DASHBOARD", "AGENT", "METRICS"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            script = re.sub(rf"\b{name}\b", str(free.getsockname()[1]), script)
    buildah.run("plain", "bash", "-c", script)
    seen = buildah.run("plain", "cat", "seen").stdout
    for line in ("the head is well", "refused without a token", "Finished in ", "ended"):
        assert line in seen, seen


def test_a_teams_own_code_goes_on_top_as_the_readme_says(buildah: Buildah, tmp_path: Path) -> None:
    (dockerfile,) = re.findall(r"```dockerfile\n(.*?)```", README, re.S)
    (tmp_path / "Dockerfile").write_text(dockerfile)
    (tmp_path / "requirements.txt").write_text("tabulate\ntorch\n")
    (tmp_path / "example_task.py").write_text((ROOT / "tests/unit/example_task.py").read_text())
    (tmp_path / "example.yaml").write_text(re.findall(r"```yaml\n(.*?)```", README, re.S)[0])
    buildah.build(tmp_path, tmp_path / "Dockerfile", "localhost/team")
    buildah("from", "--name", "team", "localhost/team")
    said = buildah.run("team", "groundswell", "run", "code/example.yaml", "--runtime", "local").stdout
    assert "Finished in " in said
    assert buildah.run("team", "python", "-c", "import tabulate, torch; print(torch.__version__)").stdout.endswith(
        "+cpu\n"
    )
    refused = buildah.run("team", "pip", "install", "--target=/tmp/x", "--dry-run", "torch<2.13", check=False)
    assert refused.returncode != 0


def test_it_is_no_larger_than_it_was_and_its_history_holds_no_secret(buildah: Buildah) -> None:
    image = json.loads(buildah("inspect", "--type", "image", TAG).stdout)
    manifest = json.loads(image["Manifest"])
    assert sum(layer["size"] for layer in manifest["layers"]) < 2.6e9
    assert not re.search(r"token|passw|secret", json.dumps([image["Docker"], image["History"]]), re.I)
