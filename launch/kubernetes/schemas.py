"""What shape has a manifest of each kind, strictly: a field that a cluster would drop or refuse is an error here?

The shapes of RayJob and RayCluster are KubeRay's own (see ``distil``); those of the few other kinds that are rendered
are written here, with the fields that a run has use for.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from launch.kubernetes.distil import FILE

Schema = dict[str, Any]

_INTEGERS = {"int32": 2**31, "int64": 2**63}
_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "object", "additionalProperties": _TEXT}
_METADATA: Schema = {
    "type": "object",
    "properties": {"name": _TEXT, "namespace": _TEXT, "labels": _TEXTS, "annotations": _TEXTS},
    "required": ["name"],
}
_SELECTOR: Schema = {
    "type": "object",
    "properties": {
        "matchLabels": _TEXTS,
        "matchExpressions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "key": _TEXT,
                    "operator": {"type": "string", "enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
                    "values": {"type": "array", "items": _TEXT},
                },
                "required": ["key", "operator"],
            },
        },
    },
}
_QUANTITY: Schema = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$",
}
_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|[smhdwy]))+$"}

OWN_KINDS: dict[str, tuple[str, Schema]] = {
    "ConfigMap": (
        "v1",
        {
            "type": "object",
            "properties": {"data": _TEXTS, "binaryData": _TEXTS, "immutable": {"type": "boolean"}},
        },
    ),
    "PersistentVolumeClaim": (
        "v1",
        {
            "type": "object",
            "properties": {
                "spec": {
                    "type": "object",
                    "properties": {
                        "accessModes": {
                            "type": "array",
                            "minItems": 1,
                            "items": {
                                "type": "string",
                                "enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"],
                            },
                        },
                        "resources": {
                            "type": "object",
                            "properties": {
                                "requests": {
                                    "type": "object",
                                    "properties": {"storage": _QUANTITY},
                                    "required": ["storage"],
                                },
                                "limits": {"type": "object", "properties": {"storage": _QUANTITY}},
                            },
                            "required": ["requests"],
                        },
                        "selector": _SELECTOR,
                        "storageClassName": _TEXT,
                        "volumeMode": {"type": "string", "enum": ["Filesystem", "Block"]},
                        "volumeName": _TEXT,
                    },
                    "required": ["accessModes", "resources"],
                }
            },
            "required": ["spec"],
        },
    ),
    "ServiceAccount": (
        "v1",
        {
            "type": "object",
            "properties": {
                "automountServiceAccountToken": {"type": "boolean"},
                "imagePullSecrets": {"type": "array", "items": {"type": "object", "properties": {"name": _TEXT}}},
            },
        },
    ),
    "PodMonitor": (
        "monitoring.coreos.com/v1",
        {
            "type": "object",
            "properties": {
                "spec": {
                    "type": "object",
                    "properties": {
                        "jobLabel": _TEXT,
                        "namespaceSelector": {
                            "type": "object",
                            "properties": {
                                "any": {"type": "boolean"},
                                "matchNames": {"type": "array", "items": _TEXT},
                            },
                        },
                        "podMetricsEndpoints": {
                            "type": "array",
                            "minItems": 1,
                            "items": {
                                "type": "object",
                                "properties": {
                                    "port": _TEXT,
                                    "path": _TEXT,
                                    "scheme": {"type": "string", "enum": ["http", "https"]},
                                    "interval": _DURATION,
                                    "scrapeTimeout": _DURATION,
                                    "honorLabels": {"type": "boolean"},
                                },
                            },
                        },
                        "podTargetLabels": {"type": "array", "items": _TEXT},
                        "selector": _SELECTOR,
                    },
                    "required": ["selector", "podMetricsEndpoints"],
                }
            },
            "required": ["spec"],
        },
    ),
}
API_VERSIONS = {
    "RayJob": "ray.io/v1",
    "RayCluster": "ray.io/v1",
    **{kind: version for kind, (version, _) in OWN_KINDS.items()},
}


@functools.cache
def schema_of(kind: str) -> Schema:
    """The strict JSON Schema of a manifest; ``KeyError`` for a kind that is not in ``API_VERSIONS``."""
    if kind in OWN_KINDS:
        whole, definitions = OWN_KINDS[kind][1], {}
    else:
        distilled = json.loads(FILE.read_text(encoding="utf-8"))
        whole, definitions = distilled[kind], distilled["$defs"]
    own = {"apiVersion": {"const": API_VERSIONS[kind]}, "kind": {"const": kind}, "metadata": _METADATA}
    properties = {**whole["properties"], **own}
    required = ["apiVersion", "kind", "metadata", *whole.get("required", ())]
    if "spec" in whole["properties"] and "spec" not in required:
        required.append("spec")
    return {
        **strict({**whole, "properties": properties, "required": required}),
        "$defs": {name: strict(definition) for name, definition in definitions.items()},
    }


def strict(schema: Schema) -> Schema:
    """A structural schema of Kubernetes as JSON Schema in which fields that are not named are refused.

    Whole numbers get the bounds of their format; a number of a format that has none is any.
    """
    if "$ref" in schema:
        return schema
    tightened: Schema = {}
    for key, value in schema.items():
        if key == "properties":
            tightened[key] = {name: strict(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            tightened[key] = strict(value)
        elif not key.startswith("x-kubernetes-") and key not in ("format", "nullable"):
            tightened[key] = value
    if (bound := _INTEGERS.get(schema.get("format", ""))) is not None:
        tightened["minimum"] = max(-bound, schema.get("minimum", -bound))
        tightened["maximum"] = min(bound - 1, schema.get("maximum", bound - 1))
    if schema.get("nullable") and "type" in schema:
        tightened["type"] = [schema["type"], "null"]
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not is_open:
        tightened["additionalProperties"] = False
    return tightened
