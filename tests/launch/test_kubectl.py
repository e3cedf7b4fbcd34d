"""``groundswell k8s apply``, ``status``, ``logs`` and ``delete``: what kubectl is asked, by one that records it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.bundled import find_config
from launch.cli import main
from launch.kubernetes.manifests import render
from orchestrator.config import load_config

NAME = "digits-on-kubernetes"

# Writes down its arguments and its input, says what it was told to say, and exits with the code that it was told.
STAND_IN = """\
#!{python}
import json, os, sys
folder = os.environ["STAND_IN"]
with open(folder + "/call.json", "w") as file:
    json.dump([sys.argv[1:], "" if "-" not in sys.argv else sys.stdin.read()], file)
print(os.environ.get("STAND_IN_SAYS", "done"))
if code := int(os.environ.get("STAND_IN_CODE", "0")):
    print("Error from server: it was refused", file=sys.stderr)
    sys.exit(code)
"""


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


class Kubectl:
    """A folder with a kubectl in it, first on the PATH, and what it was asked."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str]) -> None:
        self.folder, self.patch, self.output = folder, patch, output
        program = folder / "kubectl"
        program.write_text(STAND_IN.format(python=sys.executable), encoding="utf-8")
        program.chmod(0o755)
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("STAND_IN", str(folder))

    def call(self, *arguments: str, says: str = "done", code: int = 0) -> Done:
        self.patch.setenv("STAND_IN_SAYS", says)
        self.patch.setenv("STAND_IN_CODE", str(code))
        exited = main(["k8s", *arguments], standalone_mode=False)
        return Done(exited or 0, *self.output.readouterr())

    @property
    def asked(self) -> list[str]:
        return json.loads((self.folder / "call.json").read_text())[0]

    @property
    def given(self) -> str:
        return json.loads((self.folder / "call.json").read_text())[1]

    @property
    def was_called(self) -> bool:
        return (self.folder / "call.json").exists()


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Kubectl:
    return Kubectl(tmp_path, monkeypatch, capfd)


def test_apply_hands_over_the_checked_manifests_and_says_the_command(kubectl: Kubectl) -> None:
    done = kubectl.call("apply", "digits_on_kubernetes", "--set", "cluster.namespace=research")
    assert done.code == 0, done.stderr
    assert kubectl.asked == ["apply", "--filename", "-", "--namespace", "research"]
    assert "$ kubectl apply --filename - --namespace research" in done.stderr
    config = load_config(find_config("digits_on_kubernetes"), ["cluster.namespace=research"])
    assert list(yaml.safe_load_all(kubectl.given)) == render(config)
    assert done.stdout == "done\n"


def test_a_dry_run_asks_the_server(kubectl: Kubectl) -> None:
    kubectl.call("apply", "digits_on_kubernetes", "--dry-run", "--kind", "RayCluster")
    assert kubectl.asked == ["apply", "--dry-run=server", "--filename", "-"]
    assert "kind: RayCluster" in kubectl.given


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.image=x", "cluster.image"),
        ("cluster=null", "cluster:"),
    ],
)
def test_what_could_not_run_never_reaches_kubectl(kubectl: Kubectl, override: str, words: str) -> None:
    done = kubectl.call("apply", "digits_on_kubernetes", "--set", override)
    assert done.code == 2
    assert words in done.stderr
    assert not kubectl.was_called


def test_errors_of_kubectl_are_passed_on_with_their_code(kubectl: Kubectl) -> None:
    for command in ("apply", "status", "logs", "delete"):
        done = kubectl.call(command, "digits_on_kubernetes", code=3)
        assert done.code == 3
        assert "it was refused" in done.stderr


def test_without_kubectl_it_says_so(kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch) -> None:
    (kubectl.folder / "kubectl").unlink()
    monkeypatch.setenv("PATH", str(kubectl.folder))
    done = kubectl.call("logs", "digits_on_kubernetes")
    assert done.code == 2
    assert "kubectl is not on the PATH" in done.stderr


def status(**fields: Any) -> str:
    return json.dumps({"kind": "RayJob", "metadata": {"name": NAME}, "status": fields})


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (status(), f"{NAME}: not submitted yet (deployment New)"),
        (
            status(jobStatus="RUNNING", jobDeploymentStatus="Running", rayClusterName="c-1", failed=1),
            f"{NAME}: RUNNING (deployment Running), 1 of 3 attempts failed, cluster c-1",
        ),
        (
            status(jobStatus="FAILED", jobDeploymentStatus="Failed", reason="AppFailed", message="exit code 1"),
            f"{NAME}: FAILED (deployment Failed)\n  AppFailed\n  exit code 1",
        ),
    ],
)
def test_status_is_that_of_the_job_and_not_of_the_pod_that_submitted_it(kubectl: Kubectl, says: str, said: str) -> None:
    done = kubectl.call("status", "digits_on_kubernetes", says=says)
    assert kubectl.asked == ["get", "rayjob", NAME, "--output", "json"]
    assert done.stdout == f"{said}\n"


def test_status_of_a_cluster_that_stands_counts_its_pods(kubectl: Kubectl) -> None:
    fields = {"state": "ready", "readyWorkerReplicas": 1, "desiredWorkerReplicas": 2}
    says = json.dumps({"kind": "RayCluster", "metadata": {"name": NAME}, "status": fields})
    done = kubectl.call("status", "digits_on_kubernetes", "--kind", "RayCluster", says=says)
    assert kubectl.asked[:3] == ["get", "raycluster", NAME]
    assert done.stdout == f"{NAME}: ready, 1 of 2 worker pods ready\n"


def test_logs_are_those_of_the_job_or_of_the_head(kubectl: Kubectl) -> None:
    kubectl.call("logs", "digits_on_kubernetes", "--follow")
    assert kubectl.asked == ["logs", f"job/{NAME}", "--follow"]
    kubectl.call("logs", "digits_on_kubernetes", "--kind", "RayCluster")
    selector = f"app.kubernetes.io/instance={NAME},ray.io/node-type=head"
    assert kubectl.asked == ["logs", "--selector", selector, "--container", "ray-head"]


def test_delete_keeps_the_runs_unless_they_are_named(kubectl: Kubectl) -> None:
    done = kubectl.call("delete", "digits_on_kubernetes")
    assert kubectl.asked == ["delete", "--ignore-not-found", f"rayjob/{NAME}", f"configmap/{NAME}-config"]
    assert f"Kept: persistentvolumeclaim/{NAME}-runs" in done.stderr
    done = kubectl.call("delete", "digits_on_kubernetes", "--storage")
    assert kubectl.asked[-1] == f"persistentvolumeclaim/{NAME}-runs"
    assert "Kept" not in done.stderr
