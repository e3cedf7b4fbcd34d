"""Which objects does a run need on a cluster: a job or a cluster that stands, its config, storage and account?"""

from __future__ import annotations

import shlex
from importlib import metadata
from typing import Any, Literal

from launch.kubernetes.pods import (
    CONFIG_FOLDER,
    DRAIN_S,
    Tree,
    claim_name,
    cluster_of,
    config_name,
    container_security,
    head_pod,
    instance_labels,
    submitter_pod,
    worker_pod,
)
from orchestrator.config import RunConfig, to_yaml
from orchestrator.config.worker_pods import PodCount, cpus_of, gpus_of, is_fixed, job_name, pod_counts

Kind = Literal["RayJob", "RayCluster"]

_SUBMISSION_ATTEMPTS = 3


def render(config: RunConfig, *, kind: Kind = "RayJob") -> list[Tree]:
    """The manifests in the order in which they are applied; equal configs give equal ones.

    ``RayJob`` brings its own cluster, runs ``config`` on it and takes it away; ``RayCluster`` is one that stands, to
    submit to, with no pods that train until a run asks for them.
    """
    cluster = cluster_of(config)
    documents = []
    if cluster.service_account is not None and cluster.service_account.create:
        account = cluster.service_account
        own = {**cluster.annotations, **account.annotations}
        documents.append(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(config, account.name, own)}
        )
    if cluster.storage.size_gib is not None:
        documents.append(_claim(config, cluster.storage.size_gib))
    if kind == "RayJob":
        documents.append(_config_map(config))
        documents.append(_job(config))
    else:
        documents.append(_standing_cluster(config))
    if cluster.pod_monitor is not None:
        documents.append(_pod_monitor(config))
    return documents


def run_dir(config: RunConfig) -> str:
    """What ``--run-dir`` is on the cluster; the run lies in a folder of its name below it."""
    storage = cluster_of(config).storage
    return storage.object_path or storage.mount_path


def entrypoint(config: RunConfig) -> str:
    """The job's command, which may be given again and again: it begins the run or goes on with it."""
    words = ["groundswell", "run", f"{CONFIG_FOLDER}/config.yaml", "--auto-resume", "--address", "auto"]
    return shlex.join([*words, "--run-dir", run_dir(config)])


def _job(config: RunConfig) -> Tree:
    cluster = cluster_of(config)
    spec: Tree = {
        "entrypoint": entrypoint(config),
        "entrypointNumCpus": 0,
        "runtimeEnvYAML": f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{DRAIN_S}"\n',
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": _SUBMISSION_ATTEMPTS},
        "backoffLimit": cluster.backoff_limit,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.ttl_s,
    }
    if cluster.active_deadline_s is not None:
        spec["activeDeadlineSeconds"] = cluster.active_deadline_s
    if cluster.pre_running_deadline_s is not None:
        spec["preRunningDeadlineSeconds"] = cluster.pre_running_deadline_s
    if cluster.kueue is not None:
        spec["suspend"] = True
    spec["submitterPodTemplate"] = submitter_pod(config)
    spec["rayClusterSpec"] = _cluster_spec(config, pod_counts(cluster, config.workers), with_config=True)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _queued_metadata(config), "spec": spec}


def _standing_cluster(config: RunConfig) -> Tree:
    cluster = cluster_of(config)
    counts = pod_counts(cluster, config.workers)
    if not is_fixed(cluster):
        counts = [PodCount(group=count.group, min=0, initial=0, max=count.max) for count in counts]
    spec = _cluster_spec(config, counts, with_config=False)
    if cluster.kueue is not None:
        spec = {"suspend": True, **spec}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": _queued_metadata(config), "spec": spec}


def _cluster_spec(config: RunConfig, counts: list[PodCount], *, with_config: bool) -> Tree:
    cluster = cluster_of(config)
    spec: Tree = {"rayVersion": metadata.version("ray"), "authOptions": {"mode": "token"}}
    autoscales = not is_fixed(cluster)
    spec["enableInTreeAutoscaling"] = autoscales
    if autoscales:
        amount = {"cpu": "500m", "memory": "1Gi"}
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": cluster.idle_timeout_s,
            "resources": {"requests": amount, "limits": dict(amount)},
            "securityContext": container_security(),
        }
    spec["headGroupSpec"] = {
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
        "template": head_pod(config, with_config=with_config),
    }
    spec["workerGroupSpecs"] = [
        _worker_group(config, count, priority=len(counts) - index if autoscales and len(counts) > 1 else None)
        for index, count in enumerate(counts)
    ]
    return spec


def _worker_group(config: RunConfig, count: PodCount, *, priority: int | None) -> Tree:
    group: Tree = {
        "groupName": count.group.name,
        "replicas": count.initial,
        "minReplicas": count.min,
        "maxReplicas": count.max,
    }
    if priority is not None:
        group["priority"] = priority
    group["rayStartParams"] = {
        "num-cpus": str(cpus_of(count.group, config.workers)),
        "num-gpus": str(gpus_of(count.group, config.workers)),
    }
    group["template"] = worker_pod(config, count)
    return group


def _config_map(config: RunConfig) -> Tree:
    text = to_yaml(config, comments=False)
    metadata = _metadata(config, config_name(config), cluster_of(config).annotations)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"config.yaml": text}}


def _claim(config: RunConfig, size_gib: int) -> Tree:
    cluster, name = cluster_of(config), claim_name(config)
    assert name is not None, "a new claim has a name"
    spec: Tree = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": f"{size_gib}Gi"}}}
    if cluster.storage.storage_class is not None:
        spec["storageClassName"] = cluster.storage.storage_class
    metadata = _metadata(config, name, cluster.annotations)
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def _pod_monitor(config: RunConfig) -> Tree:
    cluster = cluster_of(config)
    assert cluster.pod_monitor is not None, "rendered on request"
    name = job_name(cluster, config.run.name)
    metadata = _metadata(config, name, cluster.annotations)
    metadata["labels"] = {**cluster.pod_monitor.labels, **metadata["labels"]}
    spec = {
        "selector": {"matchLabels": instance_labels(config)},
        "podMetricsEndpoints": [{"port": "metrics", "interval": f"{cluster.pod_monitor.interval_s}s"}],
    }
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": metadata, "spec": spec}


def _metadata(config: RunConfig, name: str, annotations: dict[str, str]) -> dict[str, Any]:
    cluster = cluster_of(config)
    whole: dict[str, Any] = {"name": name}
    if cluster.namespace is not None:
        whole["namespace"] = cluster.namespace
    whole["labels"] = {**cluster.labels, **instance_labels(config)}
    return {**whole, "annotations": dict(annotations)} if annotations else whole


def _queued_metadata(config: RunConfig) -> dict[str, Any]:
    """The metadata of what Kueue admits, if there is a queue."""
    cluster = cluster_of(config)
    annotations = dict(cluster.annotations)
    if cluster.kueue is not None and cluster.kueue.elastic:
        annotations["kueue.x-k8s.io/elastic-job"] = "true"
    whole = _metadata(config, job_name(cluster, config.run.name), annotations)
    if cluster.kueue is not None:
        whole["labels"] = {**whole["labels"], "kueue.x-k8s.io/queue-name": cluster.kueue.queue}
    return whole
