"""Which rules of a Kubernetes API server for pods, names and labels does a schema not know?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from launch.kubernetes.findings import Finding, at, items, mapping
from launch.kubernetes.yaml_text import Path

_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_CONTAINER = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_QUANTITY = re.compile(r"([+-]?[0-9.]+)(?:([KMGTPE]i|[numkMGTPE])|[eE]([+-]?[0-9]+))?")
_POWERS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_LARGEST_CONFIG_MAP = 2**20  # bytes


def metadata_rules(manifest: Any) -> Iterator[Finding]:
    """Name and labels of any object."""
    name = at(manifest, "metadata", "name")
    if isinstance(name, str) and not (len(name) <= 253 and _SUBDOMAIN.fullmatch(name)):
        rule = "must be lower-case letters, digits, '-' and '.', at most 253"
        yield Finding(path=("metadata", "name"), value=name, rule=rule)
    yield from label_rules(manifest, ("metadata", "labels"))


def label_rules(manifest: Any, path: Path) -> Iterator[Finding]:
    """Labels at ``path``: what a key and what a value may be."""
    for key, value in mapping(manifest, *path).items():
        if not _LABEL_KEY.fullmatch(key):
            yield Finding(path=(*path, key), value=value, rule="is no label: [domain/]name with a name of at most 63")
        elif isinstance(value, str) and not _LABEL_VALUE.fullmatch(value):
            rule = "a label's value is at most 63 letters, digits, '.', '_' and '-', not at its ends"
            yield Finding(path=(*path, key), value=value, rule=rule)


def config_map_rules(manifest: Any) -> Iterator[Finding]:
    """A ConfigMap's keys are file names, and it is small."""
    data = mapping(manifest, "data")
    for key in data:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", key):
            yield Finding(path=("data", key), rule="is no file name: letters, digits, '.', '_' and '-'")
    size = sum(len(value.encode()) for value in data.values() if isinstance(value, str))
    if size > _LARGEST_CONFIG_MAP:
        yield Finding(path=("data",), rule=f"holds {size} bytes, and a ConfigMap at most {_LARGEST_CONFIG_MAP}")


def template_rules(manifest: Any, path: Path) -> Iterator[Finding]:
    """The pod template at ``path``."""
    yield from label_rules(manifest, (*path, "metadata", "labels"))
    spec = (*path, "spec")
    policy = at(manifest, *spec, "restartPolicy")
    if policy not in (None, "Always", "OnFailure", "Never"):
        rule = "must be Always, OnFailure or Never"
        yield Finding(path=(*spec, "restartPolicy"), value=policy, rule=rule)
    volumes = {volume.get("name") for _, volume in items(manifest, *spec, "volumes")}
    names: set[str] = set()
    for index, container in items(manifest, *spec, "containers"):
        here = (*spec, "containers", index)
        name = container.get("name")
        if isinstance(name, str):
            if name in names or not _CONTAINER.fullmatch(name):
                rule = "another container has this name" if name in names else "must be lower-case letters, digits, '-'"
                yield Finding(path=(*here, "name"), value=name, rule=rule)
            names.add(name)
        if not container.get("image"):
            yield Finding(path=(*here, "image"), rule="must be given: the operator knows no default")
        yield from _mount_rules(container, here, volumes)
        yield from _variable_rules(container, here)
        yield from _resource_rules(container, here)


def _mount_rules(container: Any, here: Path, volumes: set[Any]) -> Iterator[Finding]:
    places = set()
    for index, mount in items(container, "volumeMounts"):
        path = (*here, "volumeMounts", index)
        if mount.get("name") not in volumes:
            known = ", ".join(sorted(str(name) for name in volumes)) or "none"
            fix = f"the volumes of this pod: {known}"
            yield Finding(path=(*path, "name"), value=mount.get("name"), rule="no volume has this name", fix=fix)
        if mount.get("mountPath") in places:
            rule = "another volume is mounted there"
            yield Finding(path=(*path, "mountPath"), value=mount["mountPath"], rule=rule)
        places.add(mount.get("mountPath"))


def _variable_rules(container: Any, here: Path) -> Iterator[Finding]:
    names = set()
    for index, variable in items(container, "env"):
        path, name = (*here, "env", index), variable.get("name")
        if name in names:
            rule, fix = "is given twice, and only the last one counts", "remove one"
            yield Finding(path=(*path, "name"), value=name, rule=rule, fix=fix)
        names.add(name)
        if variable.get("value") and variable.get("valueFrom"):
            yield Finding(path=(*path, "valueFrom"), rule="value is given as well", fix="keep one")


def _resource_rules(container: Any, here: Path) -> Iterator[Finding]:
    limits, requests = mapping(container, "resources", "limits"), mapping(container, "resources", "requests")
    for name, wanted in requests.items():
        path = (*here, "resources", "requests", name)
        most, least = quantity(limits.get(name)), quantity(wanted)
        if least is None:
            continue
        if most is not None and least > most:
            rule = f"more than resources.limits has of it, {limits[name]}"
            yield Finding(path=path, value=wanted, rule=rule, fix="write the same number twice")
        elif "/" in name and least != most:
            rule = "devices are not shared: requests and limits must be equal"
            yield Finding(path=path, value=wanted, rule=rule, fix="write the same number under limits")


def quantity(value: Any) -> float | None:
    """A Kubernetes quantity as a number, or ``None`` for what is none: ``500m`` is 0.5, ``8Gi`` 8 x 2^30."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    found = _QUANTITY.fullmatch(str(value))
    if found is None:
        return None
    number, suffix, exponent = found.groups()
    try:
        return float(number) * (10.0 ** int(exponent) if exponent else {**_POWERS, **_BINARY}.get(suffix or "", 1.0))
    except ValueError:
        return None
