"""Which rules of the KubeRay operator (1.7) for a Ray cluster does neither a schema nor an API server know?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from launch.kubernetes.findings import Finding, at, items, mapping
from launch.kubernetes.pod_rules import label_rules, template_rules
from launch.kubernetes.yaml_text import Path

LONGEST_CLUSTER_NAME = 53
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")

_TOKENS_SINCE = (2, 52)
_AUTOSCALER_VARIABLE = "RAY_enable_autoscaler_v2"
_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_MOST_QUEUED_GROUPS = 7


def object_name_rules(manifest: Any, longest: int) -> Iterator[Finding]:
    """The operator makes services and labels of a name, so it is shorter than other objects' names."""
    name = at(manifest, "metadata", "name")
    if isinstance(name, str) and not (len(name) <= longest and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)):
        rule = f"must be at most {longest} lower-case letters, digits and '-', and begin with a letter"
        value = f"{name} ({len(name)} characters)" if len(name) > longest else name
        yield Finding(path=("metadata", "name"), value=value, rule=rule, fix="shorten it")


def cluster_rules(manifest: Any, path: Path) -> Iterator[Finding]:
    """The cluster spec at ``path`` in ``manifest``."""
    spec = at(manifest, *path)
    yield from _group_rules(manifest, (*path, "headGroupSpec"))
    for index, _ in items(spec, "workerGroupSpecs"):
        yield from _group_rules(manifest, (*path, "workerGroupSpecs", index))
    yield from _size_rules(spec, path)
    yield from _autoscaler_rules(spec, path)
    yield from _token_rules(spec, path)
    yield from _redis_rules(manifest, spec, path)
    yield from manager_rules(spec, path)


def manager_rules(spec: Any, path: Path) -> Iterator[Finding]:
    """Who looks after the object whose spec stands at ``path``."""
    manager = at(spec, "managedBy")
    if manager not in (None, *_MANAGERS):
        rule = f"must be {' or '.join(_MANAGERS)}"
        yield Finding(path=(*path, "managedBy"), value=manager, rule=rule, fix="leave it out")


def queue_rules(manifest: Any, path: Path) -> Iterator[Finding]:
    """What Kueue asks of the cluster spec at ``path`` where a label puts the object into a queue."""
    if not at(manifest, "metadata", "labels", "kueue.x-k8s.io/queue-name"):
        return
    spec = at(manifest, *path)
    elastic = at(manifest, "metadata", "annotations", "kueue.x-k8s.io/elastic-job") == "true"
    if at(spec, "enableInTreeAutoscaling") is True and not elastic:
        rule = "Kueue admits no cluster that changes its size, unless it is elastic"
        fix = 'write the annotation kueue.x-k8s.io/elastic-job: "true", or false here'
        yield Finding(path=(*path, "enableInTreeAutoscaling"), value=True, rule=rule, fix=fix)
    groups = list(items(spec, "workerGroupSpecs"))
    if len(groups) > _MOST_QUEUED_GROUPS:
        rule = f"Kueue takes at most {_MOST_QUEUED_GROUPS} groups, and there are {len(groups)}"
        yield Finding(path=(*path, "workerGroupSpecs"), rule=rule, fix="merge some")
    for index, group in groups:
        if group.get("groupName") == "head":
            rule = "Kueue calls the head's own pods so"
            yield Finding(
                path=(*path, "workerGroupSpecs", index, "groupName"), value="head", rule=rule, fix="rename it"
            )


def autoscales(spec: Any) -> bool:
    """Whether the operator runs Ray's autoscaler for the cluster."""
    return at(spec, "enableInTreeAutoscaling") is True


def _group_rules(manifest: Any, path: Path) -> Iterator[Finding]:
    """What holds of the head's group and of each of the workers' alike."""
    group = mapping(manifest, *path)
    template = (*path, "template")
    if at(group, "template", "spec", "containers") in (None, []):
        rule = "needs at least one container, and the first is Ray's"
        yield Finding(path=(*template, "spec", "containers"), rule=rule, fix="add one with the image")
    yield from template_rules(manifest, template)
    params = mapping(group, "rayStartParams")
    if group.get("resources") and any(params.get(key) for key in _RESOURCES):
        rule = "rayStartParams names resources as well"
        yield Finding(path=(*path, "resources"), rule=rule, fix="keep one of the two")
    if "labels" in params:
        rule = "the operator does not take labels from here"
        fix = "write them under labels, beside rayStartParams"
        yield Finding(path=(*path, "rayStartParams", "labels"), value=params["labels"], rule=rule, fix=fix)
    yield from label_rules(manifest, (*path, "labels"))


def _size_rules(spec: Any, path: Path) -> Iterator[Finding]:
    names: set[str] = set()
    for index, group in items(spec, "workerGroupSpecs"):
        here = (*path, "workerGroupSpecs", index)
        name = group.get("groupName")
        if isinstance(name, str):
            if name in names:
                rule = "another group has this name"
                yield Finding(path=(*here, "groupName"), value=name, rule=rule, fix="rename one")
            elif not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name):
                rule = "must be lower-case letters, digits and '-', since pods are named by it"
                yield Finding(path=(*here, "groupName"), value=name, rule=rule)
            names.add(name)
        low, high, now = (_whole(group.get(key)) for key in ("minReplicas", "maxReplicas", "replicas"))
        for key, value in (("minReplicas", low), ("maxReplicas", high), ("replicas", now)):
            if value is not None and value < 0:
                yield Finding(path=(*here, key), value=value, rule="must be 0 or more")
        if low is not None and high is not None and low > high:
            rule = f"more than maxReplicas, {high}"
            yield Finding(path=(*here, "minReplicas"), value=low, rule=rule, fix="lower it, or raise maxReplicas")
        elif now is not None and low is not None and high is not None and not low <= now <= high:
            rule = f"outside minReplicas to maxReplicas, {low} to {high}"
            yield Finding(path=(*here, "replicas"), value=now, rule=rule, fix="write a number between them")
        if (hosts := _whole(group.get("numOfHosts"))) is not None and hosts < 1:
            yield Finding(path=(*here, "numOfHosts"), value=hosts, rule="must be 1 or more")


def _autoscaler_rules(spec: Any, path: Path) -> Iterator[Finding]:
    version = at(spec, "autoscalerOptions", "version")
    variable = next((v for v in _head_variables(spec) if v.get("name") == _AUTOSCALER_VARIABLE), None)
    by_variable = variable is not None and str(variable.get("value")) in ("1", "true")
    head_env = (*path, "headGroupSpec", "template", "spec", "containers", 0, "env")
    options = (*path, "autoscalerOptions")
    if not autoscales(spec):
        if by_variable:
            rule = f"{_AUTOSCALER_VARIABLE} is set, and enableInTreeAutoscaling is not true"
            yield Finding(path=head_env, rule=rule, fix="remove it, or turn autoscaling on")
        if at(spec, "autoscalerOptions") is not None:
            rule = "nothing uses them, since enableInTreeAutoscaling is not true"
            yield Finding(path=options, rule=rule, fix="remove them, or write enableInTreeAutoscaling: true")
        return
    if version is not None and variable is not None:
        rule = f"{_AUTOSCALER_VARIABLE} says the same as autoscalerOptions.version"
        yield Finding(path=head_env, rule=rule, fix="remove the variable")
    second = version == "v2" or by_variable
    groups = [((*path, "headGroupSpec"), mapping(spec, "headGroupSpec"))]
    groups += [((*path, "workerGroupSpecs", index), group) for index, group in items(spec, "workerGroupSpecs")]
    for here, group in groups:
        policy = at(group, "template", "spec", "restartPolicy")
        if second and policy not in (None, "Never"):
            rule = "autoscaler v2 replaces pods, and none may restart in its place"
            where = (*here, "template", "spec", "restartPolicy")
            yield Finding(path=where, value=policy, rule=rule, fix="write Never, or leave it out")
        if group.get("suspend") is True:
            rule = "a group cannot be suspended while the autoscaler decides its size"
            yield Finding(path=(*here, "suspend"), value=True, rule=rule, fix="remove it")
        for key in ("priority", "idleTimeoutSeconds"):
            if group.get(key) and not second:
                rule = "only autoscaler v2 reads it"
                yield Finding(path=(*here, key), value=group[key], rule=rule, fix="write autoscalerOptions.version: v2")
    patience_s = _whole(at(spec, "autoscalerOptions", "idleTimeoutSeconds"))
    if patience_s is not None and patience_s < 0:
        yield Finding(path=(*options, "idleTimeoutSeconds"), value=patience_s, rule="must be 0 or more")


def _token_rules(spec: Any, path: Path) -> Iterator[Finding]:
    auth = at(spec, "authOptions")
    if not isinstance(auth, dict) or auth.get("mode", "token") != "token":
        return
    version, here = at(spec, "rayVersion"), (*path, "rayVersion")
    fix = "write the version of Ray that is in the image"
    if not version:
        yield Finding(path=here, rule="must be given where authOptions.mode is token", fix=fix)
        return
    found = re.match(r"v?(\d+)\.(\d+)(\.\d+)?", str(version))
    if found is None:
        yield Finding(path=here, value=version, rule="is no version, and authOptions.mode is token", fix=fix)
    elif (int(found[1]), int(found[2])) < _TOKENS_SINCE:
        rule = "authOptions.mode token needs Ray 2.52 or newer"
        yield Finding(path=here, value=version, rule=rule, fix="use a newer image")


def _redis_rules(manifest: Any, spec: Any, path: Path) -> Iterator[Finding]:
    """Fault tolerance of the head's state is asked for in one place."""
    here = (*path, "gcsFaultToleranceOptions")
    names = {variable.get("name") for variable in _head_variables(spec)}
    params = mapping(spec, "headGroupSpec", "rayStartParams")
    enabled = at(spec, "gcsFaultToleranceOptions") is not None
    annotations = mapping(manifest, "metadata", "annotations")
    if "ray.io/ft-enabled" in annotations and enabled:
        rule = "gcsFaultToleranceOptions is given as well"
        yield Finding(path=("metadata", "annotations", "ray.io/ft-enabled"), rule=rule, fix="remove the annotation")
    if "RAY_REDIS_ADDRESS" in names and not enabled and annotations.get("ray.io/ft-enabled") != "true":
        rule = "the head's env has RAY_REDIS_ADDRESS, which asks for fault tolerance by the way"
        yield Finding(path=here, rule=rule, fix="give gcsFaultToleranceOptions.redisAddress, and remove the variable")
    taken = {"redis-password": "redisPassword", "redis-username": "redisUsername"}
    for param, field in taken.items():
        if params.get(param) and (enabled or param == "redis-username"):
            rule = f"belongs in gcsFaultToleranceOptions.{field}"
            where = (*path, "headGroupSpec", "rayStartParams", param)
            yield Finding(path=where, rule=rule, fix="move it there")
    for name, field in (("REDIS_PASSWORD", "redisPassword"), ("RAY_REDIS_ADDRESS", "redisAddress")):
        if name in names and enabled:
            rule = f"the head's env has {name} as well"
            yield Finding(path=(*here, field), rule=rule, fix="remove the variable")


def _head_variables(spec: Any) -> list[dict[str, Any]]:
    return [item for _, item in items(spec, "headGroupSpec", "template", "spec", "containers", 0, "env")]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
