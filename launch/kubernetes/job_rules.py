"""Which rules of the KubeRay operator (1.7) for a RayJob does neither a schema nor an API server know?"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from launch.kubernetes.cluster_rules import autoscales, manager_rules
from launch.kubernetes.findings import Finding, at, items, mapping
from launch.kubernetes.pod_rules import template_rules
from launch.kubernetes.yaml_text import Path

LONGEST_JOB_NAME = 47

_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_SELECTOR = "ray.io/cluster"


def job_rules(manifest: Any) -> Iterator[Finding]:
    """A RayJob's own spec; the cluster in it has rules of its own."""
    spec = mapping(manifest, "spec")
    yield from _lifecycle_rules(spec)
    yield from _selector_rules(spec)
    yield from _submission_rules(manifest, spec)
    yield from _deletion_rules(spec)
    yield from manager_rules(spec, ("spec",))
    if at(manifest, "metadata", "labels", "kueue.x-k8s.io/queue-name"):
        yield from _queue_rules(spec)


def _lifecycle_rules(spec: Any) -> Iterator[Finding]:
    shuts_down = spec.get("shutdownAfterJobFinishes") is True
    if spec.get("suspend") is True and not shuts_down:
        rule = "a job whose cluster stays cannot be suspended"
        yield Finding(path=("spec", "suspend"), value=True, rule=rule, fix="write shutdownAfterJobFinishes: true")
    ttl = spec.get("ttlSecondsAfterFinished", 0)
    if isinstance(ttl, int) and ttl < 0:
        yield Finding(path=("spec", "ttlSecondsAfterFinished"), value=ttl, rule="must be 0 or more")
    elif ttl and not shuts_down:
        rule = "nothing is taken away after it, since shutdownAfterJobFinishes is not true"
        fix = "write shutdownAfterJobFinishes: true"
        yield Finding(path=("spec", "ttlSecondsAfterFinished"), value=ttl, rule=rule, fix=fix)
    for key, least in (("activeDeadlineSeconds", 1), ("backoffLimit", 0)):
        value = spec.get(key)
        if isinstance(value, int) and value < least:
            yield Finding(path=("spec", key), value=value, rule=f"must be {least} or more")


def _selector_rules(spec: Any) -> Iterator[Finding]:
    selector, path = spec.get("clusterSelector"), ("spec", "clusterSelector")
    if not selector:
        if spec.get("rayClusterSpec") is None:
            rule = "a job needs a cluster: rayClusterSpec, or clusterSelector for one that stands"
            yield Finding(path=("spec", "rayClusterSpec"), rule=rule, fix="give one of the two")
        return
    if spec.get("rayClusterSpec") is not None:
        rule = "rayClusterSpec is given as well, and would not be used"
        yield Finding(path=path, value=selector, rule=rule, fix="keep one of the two")
    if not mapping(selector).get(_SELECTOR):
        yield Finding(path=(*path, _SELECTOR), rule="must name the cluster", fix=f"write {_SELECTOR}: NAME")
    if spec.get("suspend") is True:
        rule = "a job on a cluster that stands cannot be suspended"
        yield Finding(path=("spec", "suspend"), value=True, rule=rule, fix="remove it")


def _submission_rules(manifest: Any, spec: Any) -> Iterator[Finding]:
    mode, path = spec.get("submissionMode", "K8sJobMode"), ("spec", "submissionMode")
    entrypoint = spec.get("entrypoint")
    if mode not in _MODES:
        yield Finding(path=path, value=mode, rule=f"must be one of {', '.join(_MODES)}")
    if mode != "InteractiveMode" and not (isinstance(entrypoint, str) and entrypoint.strip()):
        yield Finding(path=("spec", "entrypoint"), value=entrypoint, rule="must be the command that the job runs")
    elif mode in ("K8sJobMode", "SidecarMode") and isinstance(entrypoint, str):
        yield from _entrypoint_rules(entrypoint)
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        rule = "a job that is submitted by hand is not tried again"
        yield Finding(path=("spec", "backoffLimit"), value=spec["backoffLimit"], rule=rule, fix="remove it")
    if mode == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig"):
            if spec.get(key) is not None:
                rule = "the head's pod submits in SidecarMode"
                yield Finding(path=("spec", key), rule=rule, fix="remove it, or write submissionMode: K8sJobMode")
        if spec.get("clusterSelector"):
            rule = "a cluster that stands has no sidecar"
            yield Finding(path=path, value=mode, rule=rule, fix="write K8sJobMode or HTTPMode")
        where = ("rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
        if at(spec, *where) not in (None, "Never"):
            rule = "the head may not restart in its place in SidecarMode"
            yield Finding(path=("spec", *where), value=at(spec, *where), rule=rule, fix="write Never")
    if spec.get("submitterPodTemplate") is not None:
        yield from _submitter_rules(manifest, spec)
    yield from _environment_rules(spec.get("runtimeEnvYAML"))


def _submitter_rules(manifest: Any, spec: Any) -> Iterator[Finding]:
    path = ("spec", "submitterPodTemplate")
    yield from template_rules(manifest, path)
    if at(spec, "submitterPodTemplate", "spec", "containers") in (None, []):
        yield Finding(path=(*path, "spec", "containers"), rule="needs a container that submits")
    if at(spec, "submitterPodTemplate", "spec", "restartPolicy") not in ("Never", "OnFailure"):
        value = at(spec, "submitterPodTemplate", "spec", "restartPolicy")
        rule = "the pod of a Kubernetes Job must say Never or OnFailure"
        yield Finding(path=(*path, "spec", "restartPolicy"), value=value, rule=rule, fix="write Never")


def _entrypoint_rules(entrypoint: str) -> Iterator[Finding]:
    """The operator puts the entrypoint into a shell's line as it is."""
    path = ("spec", "entrypoint")
    lexer = shlex.shlex(entrypoint, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError as error:
        yield Finding(
            path=path, value=entrypoint, rule=f"a shell cannot read it: {error}".lower(), fix="close the quotes"
        )
        return
    if ended := next((word for word in words if word in (";", "&&", "||", "|")), None):
        rule = f"what follows {ended} would be run by the pod that submits, and not by the job"
        yield Finding(path=path, value=entrypoint, rule=rule, fix="write bash -c '...' around it")


def _environment_rules(text: Any) -> Iterator[Finding]:
    if not isinstance(text, str):
        return
    try:
        readable = isinstance(yaml.safe_load(text), (dict, type(None)))
    except yaml.YAMLError:
        readable = False
    if not readable:
        rule = "must be YAML of a runtime environment: env_vars, working_dir, ..."
        yield Finding(path=("spec", "runtimeEnvYAML"), value=text, rule=rule)


def _deletion_rules(spec: Any) -> Iterator[Finding]:
    strategy, path = spec.get("deletionStrategy"), ("spec", "deletionStrategy")
    if not isinstance(strategy, dict):
        return
    rules, legacy = strategy.get("deletionRules"), {key: strategy.get(key) for key in ("onSuccess", "onFailure")}
    old = [key for key, value in legacy.items() if value is not None]
    if rules and old:
        rule = f"{old[0]} is given as well"
        yield Finding(path=(*path, "deletionRules"), rule=rule, fix=f"remove {' and '.join(old)}")
    elif not rules and len(old) < 2:
        rule = "needs deletionRules, or both onSuccess and onFailure"
        yield Finding(path=path, value=strategy, rule=rule, fix="give deletionRules")
    if rules and spec.get("shutdownAfterJobFinishes") is True:
        rule = "shutdownAfterJobFinishes says what is deleted as well"
        fix = "remove shutdownAfterJobFinishes and ttlSecondsAfterFinished, or the rules"
        yield Finding(path=(*path, "deletionRules"), rule=rule, fix=fix)
    scales = autoscales(spec.get("rayClusterSpec"))
    policies: list[tuple[Path, Any]] = [((*path, key, "policy"), at(strategy, key, "policy")) for key in old]
    policies += [
        ((*path, "deletionRules", i, "policy"), each.get("policy")) for i, each in items(strategy, "deletionRules")
    ]
    for where, policy in policies:
        if policy is None:
            yield Finding(path=where, rule="must be given", fix=f"write one of {', '.join(_ORDER)}, DeleteNone")
        if spec.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
            rule = "a job on a cluster that stands does not delete it"
            yield Finding(path=where, value=policy, rule=rule, fix="write DeleteSelf or DeleteNone")
        elif scales and policy == "DeleteWorkers":
            rule = "the autoscaler would bring the workers back"
            yield Finding(path=where, value=policy, rule=rule, fix="write DeleteCluster")
        elif policy == "DeleteNone" and where[2] in old and spec.get("shutdownAfterJobFinishes") is True:
            rule = "shutdownAfterJobFinishes deletes the cluster"
            yield Finding(path=where, value=policy, rule=rule, fix="remove one of the two")
    yield from _order_rules(strategy)


def _order_rules(strategy: Any) -> Iterator[Finding]:
    """Of one outcome, workers go first, then the cluster, then the job itself, and each once."""
    path = ("spec", "deletionStrategy", "deletionRules")
    seen: dict[tuple[str, str], int] = {}
    for index, each in items(strategy, "deletionRules"):
        condition, policy = mapping(each, "condition"), str(each.get("policy"))
        outcomes = [key for key in ("jobStatus", "jobDeploymentStatus") if condition.get(key)]
        if len(outcomes) != 1:
            rule = "needs one of jobStatus and jobDeploymentStatus"
            yield Finding(path=(*path, index, "condition"), value=condition or None, rule=rule)
            continue
        outcome, ttl = str(condition[outcomes[0]]), condition.get("ttlSeconds", 0)
        if (outcome, policy) in seen:
            rule = f"another rule says when {policy} comes after {outcome}"
            yield Finding(path=(*path, index, "policy"), value=policy, rule=rule, fix="remove one")
        seen[outcome, policy] = ttl if isinstance(ttl, int) else 0
        if policy not in _ORDER:
            continue
        for other in _ORDER:
            if (first := seen.get((outcome, other))) is None or other == policy:
                continue
            own = seen[outcome, policy]
            if (first > own) if _ORDER.index(other) < _ORDER.index(policy) else (first < own):
                rule = (
                    f"workers go before the cluster, the cluster before the job: {other} has {first} s after {outcome}"
                )
                yield Finding(path=(*path, index, "condition", "ttlSeconds"), value=own, rule=rule, fix="order them so")


def _queue_rules(spec: Any) -> Iterator[Finding]:
    if spec.get("shutdownAfterJobFinishes") is not True:
        rule = "a job in a queue of Kueue must give its cluster back"
        value = spec.get("shutdownAfterJobFinishes")
        yield Finding(path=("spec", "shutdownAfterJobFinishes"), value=value, rule=rule, fix="write true")
    if spec.get("clusterSelector"):
        rule = "Kueue does not manage a job on a cluster that stands"
        yield Finding(path=("spec", "clusterSelector"), rule=rule, fix="remove it, or the queue's label")
