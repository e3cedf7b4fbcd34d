"""Which text does a Kubernetes cluster accept as a name, a label, an image or a path? Nothing is asked of a cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator

from orchestrator.config.section import Broken, refuse

LONGEST_JOB_NAME = 47  # KubeRay appends to a RayJob's name, and what it makes of it is a label of at most 63

_LABEL_VALUE = r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"
_LABEL_KEY = r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY_RULE = "a key is at most 63 letters, digits, '.', '_' and '-', after a domain and / if wanted"
_OBJECT_NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
_OBJECT_RULE = "must be the name of a Kubernetes object: lower-case letters, digits, '-' and '.'"
_IMAGE = r"[a-z0-9][A-Za-z0-9._-]*(:[0-9]+/)?[A-Za-z0-9._/-]*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?(@sha256:[0-9a-f]{64})?"
_GROUP_NAME = r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?"


def is_job_name(name: str) -> bool:
    """Whether a RayJob may be called so: a label of RFC 1035 that leaves room for what KubeRay appends."""
    return len(name) <= LONGEST_JOB_NAME and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) is not None


def _matching(pattern: str, rule: str, fix: str) -> AfterValidator:
    """A check that the whole of a text matches."""

    def check(value: str) -> str:
        refuse([] if re.fullmatch(pattern, value) else [Broken(keys=(), value=value, rule=rule, fix=fix)])
        return value

    return AfterValidator(check)


def _keys_matching(pattern: str, rule: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A check of the keys of a mapping."""

    def check(given: dict[str, Any]) -> dict[str, Any]:
        refuse([Broken(keys=(), value=key, rule=rule) for key in given if not re.fullmatch(pattern, key)])
        return given

    return check


def _label_values(given: dict[str, str]) -> dict[str, str]:
    rule = "a label's value is at most 63 letters, digits, '.', '_' and '-', the last three not at its ends"
    refuse([Broken(keys=(), value=v, rule=rule) for v in given.values() if not re.fullmatch(_LABEL_VALUE, v)])
    return given


def _job_name(name: str) -> str:
    rule = f"must be at most {LONGEST_JOB_NAME} lower-case letters, digits and '-', and begin with a letter"
    refuse([] if is_job_name(name) else [Broken(keys=(), value=name, rule=rule, fix="write a name such as digits-2")])
    return name


def _image(name: str) -> str:
    rule, fix = None, "write registry/name:version"
    if not re.fullmatch(_IMAGE, name):
        rule = "must be an image: registry/name:tag, or registry/name@sha256:..."
    elif "@" not in name and name.rpartition("/")[2].partition(":")[2] in ("", "latest"):
        rule = "must name a version, else another pod or the next attempt may get another image"
    refuse([] if rule is None else [Broken(keys=(), value=name, rule=rule, fix=fix)])
    return name


def _mount_path(path: str) -> str:
    rule, fix = "must be an absolute path of plain names, and not one of the system's", "write /mnt/groundswell"
    plain = re.fullmatch(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+", path)
    taken = path.split("/")[1:2] in (["etc"], ["proc"], ["sys"], ["dev"], ["usr"], ["bin"], ["lib"], ["tmp"])
    refuse([Broken(keys=(), value=path, rule=rule, fix=fix)] if not plain or taken else [])
    return path


ObjectName = Annotated[str, _matching(_OBJECT_NAME, _OBJECT_RULE, "kubectl get prints the names there are")]
JobName = Annotated[str, AfterValidator(_job_name)]
GroupName = Annotated[
    str,
    _matching(
        f"(?!(head|submitter)$){_GROUP_NAME}",
        "must be at most 30 lower-case letters, digits and '-', begin with a letter, and be neither head nor submitter",
        "write a name such as spot",
    ),
]
Namespace = Annotated[
    str,
    _matching(
        r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
        "must be at most 63 lower-case letters, digits and '-'",
        "kubectl get namespaces prints the names there are",
    ),
]
LabelKey = Annotated[str, _matching(_LABEL_KEY, _KEY_RULE, "kubectl describe node shows labels and taints")]
LabelValue = Annotated[
    str,
    _matching(
        _LABEL_VALUE, "must be at most 63 letters, digits, '.', '_' and '-'", "kubectl describe node shows the values"
    ),
]
Labels = Annotated[dict[str, str], AfterValidator(_keys_matching(_LABEL_KEY, _KEY_RULE)), AfterValidator(_label_values)]
Annotations = Annotated[dict[str, str], AfterValidator(_keys_matching(_LABEL_KEY, _KEY_RULE))]
ResourceName = Annotated[
    str,
    _matching(
        f"(?=.*/){_LABEL_KEY}",
        "must be a resource that nodes announce: domain/name",
        "nvidia.com/gpu and amd.com/gpu are usual",
    ),
]
SecretKey = Annotated[
    str, _matching(r"[A-Za-z0-9._-]{1,253}", "must be a key of a Secret", "kubectl describe secret shows the keys")
]
VARIABLE_NAMES = AfterValidator(
    _keys_matching(r"[A-Za-z_][A-Za-z0-9_]*", "a variable is named by letters, digits and '_', not a digit first")
)
Image = Annotated[str, AfterValidator(_image)]
MountPath = Annotated[str, AfterValidator(_mount_path)]
ObjectPath = Annotated[
    str,
    _matching(
        r"(s3|gs)://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9][A-Za-z0-9._=-]*)*",
        "must be a path in an object store",
        "write s3://bucket/folder or gs://bucket/folder",
    ),
]
