"""``groundswell k8s validate``: broken manifests, each refused by the name of the field, with what to do."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launch.cli import main
from launch.kubernetes.manifests import render
from launch.kubernetes.validation import check
from launch.kubernetes.yaml_text import dump
from orchestrator.config import RunConfig
from tests.clusters import realistic

GONE = object()
CLUSTER = "spec.rayClusterSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs[0]"
POD = f"{GROUP}.template.spec"
HEAD = f"{CLUSTER}.headGroupSpec"
RULES = "spec.deletionStrategy.deletionRules"
SELECTED = {"ray.io/cluster": "standing"}


def job() -> Any:
    config = RunConfig.model_validate(realistic("spot_plus_on_demand"))
    return next(document for document in render(config) if document["kind"] == "RayJob")


def put(tree: Any, field: str, value: Any) -> None:
    """Set ``field``, written as ``spec.groups[0].name``; ``GONE`` removes it."""
    parts = [int(part) if part.isdigit() else part for part in field.replace("[", ".").replace("]", "").split(".")]
    for part in parts[:-1]:
        tree = tree.setdefault(part, {}) if isinstance(tree, dict) else tree[part]
    if value is GONE:
        del tree[parts[-1]]
    else:
        tree[parts[-1]] = value


def rule(policy: str, ttl_s: int = 0, outcome: str = "SUCCEEDED") -> dict[str, Any]:
    return {"policy": policy, "condition": {"jobStatus": outcome, "ttlSeconds": ttl_s}}


BY_RULES = {"spec.shutdownAfterJobFinishes": GONE, "spec.ttlSecondsAfterFinished": GONE}

# What is changed in a job that is right, the field that is blamed, and words of the answer.
BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    # The schema's
    "misspelt field": ({"spec.entryPoint": "x"}, "spec.entryPoint", "did you mean entrypoint?"),
    "field of another level": ({"spec.rayVersion": "2.60.0"}, "spec.rayVersion", "no such field"),
    "number as text": ({"spec.backoffLimit": "2"}, "spec.backoffLimit", "a whole number"),
    "text as number": ({f"{HEAD}.rayStartParams.num-cpus": 0}, f"{HEAD}.rayStartParams.num-cpus", "must be text"),
    "beyond an int32": ({"spec.activeDeadlineSeconds": 2**31}, "spec.activeDeadlineSeconds", "at most 2147483647"),
    "no template": ({f"{GROUP}.template": GONE}, f"{GROUP}.template", "must be given"),
    "no maximum": ({f"{GROUP}.maxReplicas": GONE}, f"{GROUP}.maxReplicas", "must be given"),
    "unknown version of the autoscaler": (
        {f"{CLUSTER}.autoscalerOptions.version": "v3"},
        f"{CLUSTER}.autoscalerOptions.version",
        "v1, v2",
    ),
    "no quantity": (
        {f"{POD}.containers[0].resources.limits": {"memory": "16 GB"}},
        f"{POD}.containers[0].resources.limits.memory",
        "must be written as",
    ),
    "quantity of a list": (
        {f"{POD}.containers[0].resources.limits": {"memory": []}},
        f"{POD}.containers[0].resources.limits.memory",
        "a whole number or text",
    ),
    "other version of the API": ({"apiVersion": "ray.io/v1alpha1"}, "apiVersion", "must be ray.io/v1"),
    "deadline of nothing": ({"spec.preRunningDeadlineSeconds": 0}, "spec.preRunningDeadlineSeconds", "at least 1"),
    "no spec": ({"spec": GONE}, "spec", "must be given"),
    "replicas of the head": ({f"{HEAD}.replicas": 1}, f"{HEAD}.replicas", "no such field"),
    # Names
    "name too long": ({"metadata.name": "a" * 48}, "metadata.name", "at most 47"),
    "name with a digit first": ({"metadata.name": "2nd"}, "metadata.name", "begin with a letter"),
    "label": ({"metadata.labels.team": "a b"}, "metadata.labels.team", "at most 63"),
    # The operator's, of a job
    "unknown mode": ({"spec.submissionMode": "JobMode"}, "spec.submissionMode", "K8sJobMode, HTTPMode"),
    "no entrypoint": ({"spec.entrypoint": " "}, "spec.entrypoint", "the command"),
    "two commands": ({"spec.entrypoint": "python a.py && b"}, "spec.entrypoint", "what follows &&"),
    "open quotes": ({"spec.entrypoint": "python 'a.py"}, "spec.entrypoint", "close the quotes"),
    "suspended and kept": ({"spec.suspend": True, **BY_RULES}, "spec.suspend", "shutdownAfterJobFinishes: true"),
    "lifetime without an end": (
        {"spec.shutdownAfterJobFinishes": False},
        "spec.ttlSecondsAfterFinished",
        "nothing is taken away",
    ),
    "negative lifetime": ({"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished", "0 or more"),
    "deadline in the past": ({"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds", "1 or more"),
    "negative retries": ({"spec.backoffLimit": -1}, "spec.backoffLimit", "0 or more"),
    "no cluster": ({CLUSTER: GONE}, CLUSTER, "rayClusterSpec, or clusterSelector"),
    "two clusters": ({"spec.clusterSelector": SELECTED}, "spec.clusterSelector", "would not be used"),
    "selector of nothing": (
        {CLUSTER: GONE, "spec.clusterSelector": {"a": "b"}},
        "spec.clusterSelector[ray.io/cluster]",
        "must name the cluster",
    ),
    "suspended on another's cluster": (
        {CLUSTER: GONE, "spec.clusterSelector": SELECTED, "spec.suspend": True},
        "spec.suspend",
        "cannot be suspended",
    ),
    "by hand and again": ({"spec.submissionMode": "InteractiveMode"}, "spec.backoffLimit", "not tried again"),
    "sidecar and pod": ({"spec.submissionMode": "SidecarMode"}, "spec.submitterPodTemplate", "head's pod submits"),
    "sidecar of another's cluster": (
        {CLUSTER: GONE, "spec.clusterSelector": SELECTED, "spec.submissionMode": "SidecarMode"},
        "spec.submissionMode",
        "no sidecar",
    ),
    "sidecar that restarts": (
        {"spec.submissionMode": "SidecarMode", f"{HEAD}.template.spec.restartPolicy": "OnFailure"},
        f"{HEAD}.template.spec.restartPolicy",
        "SidecarMode",
    ),
    "submitter that restarts": (
        {"spec.submitterPodTemplate.spec.restartPolicy": GONE},
        "spec.submitterPodTemplate.spec.restartPolicy",
        "Never or OnFailure",
    ),
    "runtime environment": ({"spec.runtimeEnvYAML": "a: [1"}, "spec.runtimeEnvYAML", "must be YAML"),
    "other manager": ({"spec.managedBy": "me"}, "spec.managedBy", "ray.io/kuberay-operator"),
    "rules and an end": ({"spec.deletionStrategy": {"deletionRules": [rule("DeleteSelf")]}}, RULES, "as well"),
    "no rules": ({"spec.deletionStrategy": {}, **BY_RULES}, "spec.deletionStrategy", "needs deletionRules"),
    "half of the old rules": (
        {"spec.deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}, **BY_RULES},
        "spec.deletionStrategy",
        "both onSuccess and onFailure",
    ),
    "old and new rules": (
        {
            "spec.deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}, "deletionRules": [rule("DeleteSelf")]},
            **BY_RULES,
        },
        RULES,
        "remove onSuccess",
    ),
    "workers that come back": (
        {"spec.deletionStrategy": {"deletionRules": [rule("DeleteWorkers")]}, **BY_RULES},
        f"{RULES}[0].policy",
        "bring the workers back",
    ),
    "rule twice": (
        {"spec.deletionStrategy": {"deletionRules": [rule("DeleteSelf"), rule("DeleteSelf", 9)]}, **BY_RULES},
        f"{RULES}[1].policy",
        "another rule",
    ),
    "job before its cluster": (
        {"spec.deletionStrategy": {"deletionRules": [rule("DeleteSelf", 5), rule("DeleteCluster", 9)]}, **BY_RULES},
        f"{RULES}[1].condition.ttlSeconds",
        "the cluster before the job",
    ),
    "rule of no outcome": (
        {"spec.deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]}, **BY_RULES},
        f"{RULES}[0].condition",
        "needs one of",
    ),
    "kept by rule": (
        {"spec.deletionStrategy": {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteSelf"}}},
        "spec.deletionStrategy.onSuccess.policy",
        "shutdownAfterJobFinishes deletes",
    ),
    "others' cluster deleted": (
        {
            CLUSTER: GONE,
            "spec.clusterSelector": SELECTED,
            "spec.deletionStrategy": {"deletionRules": [rule("DeleteCluster")]},
            **BY_RULES,
        },
        f"{RULES}[0].policy",
        "does not delete it",
    ),
    # The operator's, of a cluster
    "fewest above most": ({f"{GROUP}.minReplicas": 4}, f"{GROUP}.minReplicas", "more than maxReplicas, 3"),
    "outside the limits": ({f"{GROUP}.replicas": 9}, f"{GROUP}.replicas", "0 to 3"),
    "negative minimum": ({f"{GROUP}.minReplicas": -1}, f"{GROUP}.minReplicas", "0 or more"),
    "no hosts": ({f"{GROUP}.numOfHosts": 0}, f"{GROUP}.numOfHosts", "1 or more"),
    "group twice": ({f"{GROUP}.groupName": "on-demand"}, f"{CLUSTER}.workerGroupSpecs[1].groupName", "another group"),
    "group in capitals": ({f"{GROUP}.groupName": "GPU"}, f"{GROUP}.groupName", "lower-case"),
    "no containers": ({f"{POD}.containers": []}, f"{POD}.containers", "at least one container"),
    "resources twice": ({f"{GROUP}.resources": {"CPU": "4"}}, f"{GROUP}.resources", "keep one"),
    "labels for ray start": (
        {f"{GROUP}.rayStartParams.labels": "a=b"},
        f"{GROUP}.rayStartParams.labels",
        "under labels",
    ),
    "labels of a group": ({f"{GROUP}.labels": {"a": "b c"}}, f"{GROUP}.labels.a", "at most 63"),
    "a pod that restarts": ({f"{POD}.restartPolicy": "Always"}, f"{POD}.restartPolicy", "autoscaler v2"),
    "no policy of restarts": ({f"{POD}.restartPolicy": "No"}, f"{POD}.restartPolicy", "Always, OnFailure or Never"),
    "a group asleep": ({f"{GROUP}.suspend": True}, f"{GROUP}.suspend", "autoscaler decides"),
    "priority of version 1": (
        {f"{CLUSTER}.autoscalerOptions.version": "v1"},
        f"{GROUP}.priority",
        "only autoscaler v2",
    ),
    "options of nobody": (
        {f"{CLUSTER}.enableInTreeAutoscaling": False},
        f"{CLUSTER}.autoscalerOptions",
        "nothing uses",
    ),
    "negative patience": (
        {f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds": -1},
        f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds",
        "0 or more",
    ),
    "version twice": (
        {f"{HEAD}.template.spec.containers[0].env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]},
        f"{HEAD}.template.spec.containers[0].env",
        "remove the variable",
    ),
    "tokens without a version": ({f"{CLUSTER}.rayVersion": GONE}, f"{CLUSTER}.rayVersion", "authOptions.mode is token"),
    "tokens of an old Ray": ({f"{CLUSTER}.rayVersion": "2.51.1"}, f"{CLUSTER}.rayVersion", "2.52 or newer"),
    "no version": ({f"{CLUSTER}.rayVersion": "latest"}, f"{CLUSTER}.rayVersion", "is no version"),
    "redis by the way": (
        {f"{HEAD}.template.spec.containers[0].env": [{"name": "RAY_REDIS_ADDRESS", "value": "r:6379"}]},
        f"{CLUSTER}.gcsFaultToleranceOptions",
        "redisAddress",
    ),
    "name of a redis user": (
        {f"{HEAD}.rayStartParams.redis-username": "me"},
        f"{HEAD}.rayStartParams.redis-username",
        "redisUsername",
    ),
    "redis twice": (
        {
            f"{CLUSTER}.gcsFaultToleranceOptions": {"redisAddress": "r:6379"},
            f"{HEAD}.template.spec.containers[0].env": [{"name": "RAY_REDIS_ADDRESS", "value": "r:6379"}],
        },
        f"{CLUSTER}.gcsFaultToleranceOptions.redisAddress",
        "remove the variable",
    ),
    "fault tolerance twice": (
        {
            f"{CLUSTER}.gcsFaultToleranceOptions": {"redisAddress": "r:6379"},
            "metadata.annotations": {"ray.io/ft-enabled": "true"},
        },
        "metadata.annotations[ray.io/ft-enabled]",
        "remove the annotation",
    ),
    # Pods
    "volume of nowhere": ({f"{POD}.volumes": []}, f"{POD}.containers[0].volumeMounts[0].name", "no volume"),
    "no image": ({f"{POD}.containers[0].image": GONE}, f"{POD}.containers[0].image", "must be given"),
    "name of a container": ({f"{POD}.containers[0].name": "Ray"}, f"{POD}.containers[0].name", "lower-case"),
    "more wanted than allowed": (
        {f"{POD}.containers[0].resources.requests.memory": "200Gi"},
        f"{POD}.containers[0].resources.requests.memory",
        "more than resources.limits",
    ),
    "half a device": (
        {f"{POD}.containers[0].resources.requests": {"nvidia.com/gpu": 1}},
        f"{POD}.containers[0].resources.requests[nvidia.com/gpu]",
        "must be equal",
    ),
    "variable twice": (
        {f"{POD}.containers[0].env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
        f"{POD}.containers[0].env[1].name",
        "given twice",
    ),
    # Kueue
    "queue without elasticity": (
        {"metadata.labels": {"kueue.x-k8s.io/queue-name": "q"}},
        f"{CLUSTER}.enableInTreeAutoscaling",
        "unless it is elastic",
    ),
    "queue and kept": (
        {"metadata.labels": {"kueue.x-k8s.io/queue-name": "q"}, **BY_RULES},
        "spec.shutdownAfterJobFinishes",
        "give its cluster back",
    ),
}


def changed(changes: dict[str, Any]) -> Any:
    manifest = copy.deepcopy(job())
    for field, value in changes.items():
        put(manifest, field, value)
    return manifest


def test_the_job_that_is_broken_below_is_right() -> None:
    assert check(dump([job()]), "job.yaml").problems == ()


@pytest.mark.parametrize(("changes", "field", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_manifest_is_refused_by_the_name_of_its_field(changes: dict[str, Any], field: str, words: str) -> None:
    text = dump([changed(changes)])
    found = {problem.key: problem for problem in check(text, "job.yaml").problems}
    assert field in found, {key: str(value) for key, value in found.items()}
    assert words in str(found[field])
    assert found[field].line is not None


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("kind: ConfigMap\napiVersion: v1\nmetadata: {name: a}\ndata: {'a b': c}\n", "data[a b]", "no file name"),
        ("kind: ConfigMap\napiVersion: v1\nmetadata: {name: a}\ndata: {a: 1}\n", "data.a", "must be text"),
        ("kind: ConfigMap\napiVersion: v1\nmetadata: {name: A}\n", "metadata.name", "lower-case"),
        (f"kind: ConfigMap\napiVersion: v1\nmetadata: {{name: a}}\ndata: {{a: {'x' * 2**20}x}}\n", "data", "at most"),
        ("kind: ConfigMap\napiVersion: v1\nmetadata: {name: a}\ndata: {a: b, a: c}\n", "data.a", "given twice"),
        ("kind: ServiceAccount\napiVersion: v1\nmetadata: {nme: a}\n", "metadata.nme", "did you mean name?"),
        (
            "kind: PersistentVolumeClaim\napiVersion: v1\nmetadata: {name: a}\n"
            "spec: {accessModes: [ReadWriteAll], resources: {requests: {storage: 1Gi}}}\n",
            "spec.accessModes[0]",
            "ReadWriteMany",
        ),
        (
            "kind: PodMonitor\napiVersion: monitoring.coreos.com/v1\nmetadata: {name: a}\n"
            "spec: {selector: {}, podMetricsEndpoints: [{port: a, interval: often}]}\n",
            "spec.podMetricsEndpoints[0].interval",
            "must be written as",
        ),
        ("apiVersion: v1\nmetadata: {name: a}\n", "kind", "must be given"),
        ("kind: ConfigMap\n  a: [\n", None, "cannot be read as YAML"),
        ("kind: &a {b: *a}\n", None, "an alias may not contain itself"),
        (
            "kind: ConfigMap\napiVersion: v1\nmetadata: {name: a, labels: {7: a, yes: 2}}\n",
            "metadata.labels.true",
            "text",
        ),
        ("---\n", None, "no manifest"),
    ],
)
def test_other_manifests_are_checked_as_strictly(text: str, field: str | None, words: str) -> None:
    found = {problem.key: str(problem) for problem in check(text, "other.yaml").problems}
    assert field in found, found
    assert words in found[field]
    assert found[field].startswith("other.yaml")


def test_a_name_of_a_standing_cluster_may_be_a_little_longer() -> None:
    config = RunConfig.model_validate(realistic("kueue"))
    (cluster,) = render(config, kind="RayCluster")
    cluster["metadata"]["name"] = "a" * 53
    assert check(dump([cluster]), "c").problems == ()
    cluster["metadata"]["name"] = "a" * 54
    assert [problem.key for problem in check(dump([cluster]), "c").problems] == ["metadata.name"]


@pytest.mark.parametrize("entrypoint", ["bash -c 'python a.py && python b.py'", "python a.py '' 2>&1"])
def test_what_a_shell_reads_as_one_command_is_one(entrypoint: str) -> None:
    manifest = changed({"spec.entrypoint": entrypoint})
    assert check(dump([manifest]), "job.yaml").problems == ()


def test_validate_names_file_line_and_field_and_exits_with_two(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(dump([job()]), encoding="utf-8")
    text = dump([changed({f"{GROUP}.minReplicas": 4})])
    bad.write_text(text, encoding="utf-8")
    done = CliRunner().invoke(main, ["k8s", "validate", str(good), str(bad)])
    assert done.exit_code == 2
    assert done.stdout == f"OK {good}: RayJob spot-plus-on-demand\n"
    line = next(number for number, row in enumerate(text.splitlines(), 1) if "minReplicas: 4" in row)
    assert f"{bad}, line {line}: {GROUP}.minReplicas: 4\n  more than maxReplicas, 3" in done.stderr


def test_kinds_that_are_not_known_are_said_and_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n", encoding="utf-8")
    done = CliRunner().invoke(main, ["k8s", "validate", str(path)])
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "Secret a is of a kind that is not checked" in done.stderr


def test_without_jsonschema_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "jsonschema":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    done = CliRunner().invoke(main, ["k8s", "validate", "digits_on_kubernetes"])
    assert done.exit_code == 2
    assert "pip install 'groundswell[kubernetes]'" in done.stderr
