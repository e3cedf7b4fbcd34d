"""How is kubectl called? Every call is said, and what kubectl says of an error is passed on with its exit code."""

from __future__ import annotations

import shlex
import subprocess
from typing import Any

import click

from launch.kubernetes.pods import Tree, cluster_of
from orchestrator.config import RunConfig
from orchestrator.errors import GroundswellError


def kubectl(config: RunConfig, *arguments: str, text: str | None = None, read: bool = False) -> str:
    """Call kubectl in the config's namespace with ``text`` as its input; what it prints is returned if ``read``.

    Exits with kubectl's own code where that is not 0. Raises ``GroundswellError`` where there is no kubectl.
    """
    namespace = cluster_of(config).namespace
    command = ["kubectl", *arguments, *(() if namespace is None else ("--namespace", namespace))]
    click.echo(f"$ {shlex.join(command)}", err=True)
    try:
        done = subprocess.run(command, input=text, text=True, stdout=subprocess.PIPE if read else None, check=False)
    except FileNotFoundError as error:
        raise GroundswellError(
            "kubectl is not on the PATH; install it and choose the cluster as its context"
        ) from error
    if done.returncode != 0:
        raise click.exceptions.Exit(done.returncode)
    return done.stdout or ""


def references(documents: list[Tree]) -> list[str]:
    """Each object as kubectl names it: ``rayjob/digits``."""
    return [f"{document['kind'].lower()}/{document['metadata']['name']}" for document in documents]


def status_line(found: Any, *, attempts: int) -> str:
    """What the operator says of a RayJob or a RayCluster, in a line or two.

    The job's own status counts: the pod that submitted it can end well for a job that failed.
    """
    name, status = found["metadata"]["name"], found.get("status") or {}
    if found["kind"] == "RayCluster":
        ready, wanted = status.get("readyWorkerReplicas", 0), status.get("desiredWorkerReplicas", 0)
        return f"{name}: {status.get('state') or 'no state yet'}, {ready} of {wanted} worker pods ready"
    deployment = status.get("jobDeploymentStatus") or "New"
    words = [f"{name}: {status.get('jobStatus') or 'not submitted yet'} (deployment {deployment})"]
    if failed := status.get("failed", 0):
        words.append(f"{failed} of {attempts} attempts failed")
    if cluster := status.get("rayClusterName"):
        words.append(f"cluster {cluster}")
    lines = [", ".join(words)]
    lines += [f"  {status[key]}" for key in ("reason", "message") if status.get(key)]
    return "\n".join(lines)
