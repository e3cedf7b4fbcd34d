"""Why does a field stand in a manifest, where that is not plain from its name?"""

from __future__ import annotations

from launch.kubernetes.pods import DRAIN_S, GRACE_S
from launch.kubernetes.yaml_text import Path

# The end of a field's path, positions in lists left out, and the kinds of manifests that it is about.
_REASONS: tuple[tuple[str, str], ...] = (
    ("spec accessModes", "All nodes write into the run's folder, so the volume must be mountable by many at once."),
    (
        "spec entrypoint",
        "The same command begins the run and goes on with it: Kubernetes may give it again at any time.",
    ),
    (
        "spec entrypointNumCpus",
        "The command only waits for training; it needs no place on a node, and the head has none.",
    ),
    (
        "spec runtimeEnvYAML",
        "A stop leaves the job this long to save; Ray would kill it after 3 s. Nothing is installed here: what the "
        "run needs is in the image, so that every pod and every attempt has the same.",
    ),
    (
        "spec submissionMode",
        "A pod of its own submits, so that what became of the job is known even if the operator was away. "
        "Trust .status.jobStatus, not that pod: submitted again, it can end well for a job that failed.",
    ),
    ("submitterConfig backoffLimit", "How often the mere submission is tried; it repeats no training."),
    (
        "spec backoffLimit",
        "After a failure the job goes on on a new cluster, so often, from the last checkpoint in the run's folder.",
    ),
    ("spec shutdownAfterJobFinishes", "The pods are given back when the job ends, after the seconds below."),
    ("spec activeDeadlineSeconds", "cluster.active_deadline_s: the job is ended then, whatever it does."),
    (
        "spec preRunningDeadlineSeconds",
        "Pods that never start, for want of nodes or of the image, end the job instead of waiting for ever.",
    ),
    ("spec suspend", "It begins suspended; Kueue sets this to false when the queue has room."),
    ("kueue.x-k8s.io/queue-name", "The queue that admits the job."),
    ("kueue.x-k8s.io/elastic-job", "Lets Kueue admit workers that come later (gate ElasticJobsViaWorkloadSlices)."),
    (
        "rayClusterSpec rayVersion",
        "Must equal the Ray in the image, which must equal the one that groundswell is pinned to: they move together.",
    ),
    ("spec rayVersion", "Must equal the Ray in the image: they move together."),
    ("authOptions mode", "Nobody without the token that the operator makes may submit to the cluster or look into it."),
    (
        "enableInTreeAutoscaling",
        "true: the controller asks Ray for workers, and the autoscaler adds and removes pods for them. false where "
        "Kueue wants the size to stay.",
    ),
    (
        "autoscalerOptions version",
        "Version 2 knows the groups' priorities, and replaces pods instead of restarting them.",
    ),
    ("autoscalerOptions idleTimeoutSeconds", "A pod without a worker is given back after so long."),
    ("autoscalerOptions resources", "At least 1Gi: with its default of 512Mi the autoscaler may run out of memory."),
    (
        "headGroupSpec rayStartParams",
        "The head offers no CPU and no GPU, so that no worker is put on it; Ray wants these numbers as text.",
    ),
    (
        "cluster-autoscaler.kubernetes.io/safe-to-evict",
        "The job dies with its head, so no node autoscaler may move it to save a node.",
    ),
    ("karpenter.sh/do-not-disrupt", "The same, said to Karpenter."),
    (
        "template spec restartPolicy",
        "A Ray pod that restarts in its place comes back without its state; it is replaced instead.",
    ),
    (
        "affinity nodeAffinity",
        "Nodes that may be taken back are none for the head, with which the job dies, nor for the workers that the run "
        "needs at least: these pods stay off the nodes of the spot groups.",
    ),
    (
        "securityContext fsGroup",
        "Volumes belong to the group of the user that pods run as, so that they can be written.",
    ),
    ("spec automountServiceAccountToken", "Only the head's autoscaler talks to Kubernetes."),
    (
        "spec terminationGracePeriodSeconds",
        f"A pod that must go has {DRAIN_S} s to save (RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S), and is killed after "
        f"{GRACE_S}. Ray and Kubernetes both take 30 by default, and the checkpoint would be lost half way.",
    ),
    (
        "workerGroupSpecs replicas",
        "workers.initial in whole pods; minReplicas is workers.min, on on-demand nodes first, and maxReplicas "
        "workers.max or the group's max_workers: what the controller may ask for is what the cluster may give.",
    ),
    (
        "workerGroupSpecs priority",
        "The autoscaler takes the group with the highest number first: the order in the config.",
    ),
    (
        "workerGroupSpecs rayStartParams",
        "Just what workers_per_pod workers reserve, even where the pod has more, so that no more are put into it.",
    ),
    (
        "resources limits",
        "Requests equal limits: a neighbour takes nothing away, and memory that is promised is there.",
    ),
    ("podMetricsEndpoints port", "Every pod of Ray has this port; the operator names it so."),
)


def reason(kind: str, path: Path) -> str | None:
    """Why the field at ``path`` of a manifest of this kind is there; ``None`` where its name says it."""
    if kind == "ConfigMap":
        return None
    words = [part for part in path if isinstance(part, str)]
    for end, why in _REASONS:
        pattern = end.split()
        if words[-len(pattern) :] == pattern:
            return why
    return None


def all_reasons() -> tuple[str, ...]:
    """Every reason there is, in the order of the table."""
    return tuple(why for _, why in _REASONS)
