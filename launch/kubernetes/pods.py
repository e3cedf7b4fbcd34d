"""What are the pods of a run: the head, which trains nothing, the workers, and the one that submits the job?

KubeRay adds shared memory, probes, the wait for the head and the authentication token by itself; they are not here.
"""

from __future__ import annotations

import itertools
from typing import Any

from orchestrator.config.cluster import ClusterSection, HeadSection, WorkerGroupSection
from orchestrator.config.run_config import RunConfig
from orchestrator.config.worker_pods import PodCount, cpus_of, gpus_of, job_name

CONFIG_FOLDER = "/etc/groundswell"
PART_OF = {"app.kubernetes.io/part-of": "groundswell"}
USER_ID = 1000

# Ray's own drain lasts as long as Kubernetes' default patience, and a checkpoint is then lost half way.
DRAIN_S, GRACE_S = 100, 120

_KEEP_ON_NODE = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}

Tree = dict[str, Any]


def cluster_of(config: RunConfig) -> ClusterSection:
    """The section that everything here is about; the commands refuse a config without one."""
    assert config.cluster is not None, "a config without cluster is refused before it is rendered"
    return config.cluster


def instance_labels(config: RunConfig) -> Tree:
    """By what the objects and the Ray pods of this job are found."""
    return {**PART_OF, "app.kubernetes.io/instance": job_name(cluster_of(config), config.run.name)}


def head_pod(config: RunConfig, *, with_config: bool) -> Tree:
    """The template of the head; ``with_config``: it has the run's config as a file."""
    cluster = cluster_of(config)
    head = cluster.head
    amount = {"cpu": str(head.cpus), "memory": f"{head.memory_gib}Gi"}
    container = _ray_container(config, "ray-head", amount)
    spec = _ray_pod_spec(config, container, head)
    if with_config:
        mount = {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}
        container["volumeMounts"] = [*container.get("volumeMounts", ()), mount]
        volume = {"name": "config", "configMap": {"name": config_name(config)}}
        spec["volumes"] = [*spec.get("volumes", ()), volume]
    return {"metadata": _pod_metadata(config, _KEEP_ON_NODE), "spec": spec}


def worker_pod(config: RunConfig, count: PodCount) -> Tree:
    """The template of a group's pods: requests equal limits, so that no neighbour takes what training needs."""
    group = count.group
    amount = {"cpu": str(group.cpus or cpus_of(group, config.workers)), "memory": f"{group.memory_gib}Gi"}
    if gpus := gpus_of(group, config.workers):
        amount[group.gpu_resource] = str(gpus)
    spec = _ray_pod_spec(config, _ray_container(config, "ray-worker", amount), group)
    spec["automountServiceAccountToken"] = False
    return {"metadata": _pod_metadata(config, {}), "spec": spec}


def submitter_pod(config: RunConfig) -> Tree:
    """The template of the pod that hands the job to the head; KubeRay writes its command."""
    cluster = cluster_of(config)
    amount = {"cpu": "500m", "memory": "1Gi"}
    container = {
        "name": "ray-job-submitter",
        "image": cluster.image,
        "resources": {"requests": amount, "limits": dict(amount)},
        "securityContext": container_security(),
    }
    spec = {**_pod_spec(config, container, cluster.head), "automountServiceAccountToken": False}
    metadata = {"labels": {**cluster.labels, **PART_OF}}
    return {"metadata": _with_annotations(metadata, cluster.annotations), "spec": spec}


def config_name(config: RunConfig) -> str:
    """The name of the ConfigMap that holds the run's config."""
    return f"{job_name(cluster_of(config), config.run.name)}-config"


def claim_name(config: RunConfig) -> str | None:
    """The volume claim that the run's folder lies on, there already or new; ``None`` for an object store."""
    cluster = cluster_of(config)
    if cluster.storage.size_gib is not None:
        return f"{job_name(cluster, config.run.name)}-runs"
    return cluster.storage.claim


def container_security() -> Tree:
    """What the restricted level of Kubernetes' pod security standards asks of every container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _pod_metadata(config: RunConfig, annotations: Tree) -> Tree:
    cluster = cluster_of(config)
    metadata = {"labels": {**cluster.labels, **instance_labels(config)}}
    return _with_annotations(metadata, {**cluster.annotations, **annotations})


def _with_annotations(metadata: Tree, annotations: Tree) -> Tree:
    return {**metadata, "annotations": dict(annotations)} if annotations else metadata


def _ray_container(config: RunConfig, name: str, amount: Tree) -> Tree:
    cluster = cluster_of(config)
    variables: list[Tree] = [{"name": key, "value": value} for key, value in sorted(cluster.env.items())]
    for key, place in sorted(cluster.secret_env.items()):
        reference = {"name": place.secret, "key": place.key}
        variables.append({"name": key, "valueFrom": {"secretKeyRef": reference}})
    variables.append({"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(DRAIN_S)})
    container = {
        "name": name,
        "image": cluster.image,
        "env": variables,
        "resources": {"requests": amount, "limits": dict(amount)},
        "securityContext": container_security(),
    }
    if claim_name(config) is not None:
        container["volumeMounts"] = [{"name": "runs", "mountPath": cluster.storage.mount_path}]
    return container


def _pod_spec(config: RunConfig, container: Tree, place: HeadSection | WorkerGroupSection) -> Tree:
    """A pod of one container; what was not asked for is left out."""
    cluster = cluster_of(config)
    account = cluster.service_account
    tolerations = [
        {"key": t.key, "operator": "Exists", "effect": t.effect}
        if t.value is None
        else {"key": t.key, "operator": "Equal", "value": t.value, "effect": t.effect}
        for t in place.tolerations
    ]
    wanted = {
        "restartPolicy": "Never",
        "serviceAccountName": account.name if account else None,
        "imagePullSecrets": [{"name": name} for name in cluster.image_pull_secrets],
        "priorityClassName": place.priority_class,
        "nodeSelector": dict(place.node_selector),
        "tolerations": tolerations,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }
    return {key: value for key, value in wanted.items() if value}


def _ray_pod_spec(config: RunConfig, container: Tree, place: HeadSection | WorkerGroupSection) -> Tree:
    """A pod of Ray: it has the run's folder, and time to save what it is at."""
    spec = {**_pod_spec(config, container, place), "terminationGracePeriodSeconds": GRACE_S}
    if (claim := claim_name(config)) is not None:
        spec["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}]
    # A spot group always says where its nodes are, so this is the head or an on-demand group.
    if not place.node_selector and (elsewhere := _off_spot_nodes(cluster_of(config))):
        spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": elsewhere}}
    return spec


def _off_spot_nodes(cluster: ClusterSection) -> Tree | None:
    """The node selector of a pod that stays off the nodes of all spot groups.

    A group's nodes have all its labels, so a node is off them if it lacks one: terms are alternatives, and each
    combination of one label of every group is a term.
    """
    spot = [group.node_selector.items() for group in cluster.worker_groups if group.capacity == "spot"]
    if not spot:
        return None
    terms = []
    for lacking in itertools.product(*spot):
        unlike = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in dict.fromkeys(lacking)]
        terms.append({"matchExpressions": unlike})
    return {"nodeSelectorTerms": terms}
