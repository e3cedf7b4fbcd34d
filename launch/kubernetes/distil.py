"""What of KubeRay's resource definitions is structure: types, names, bounds and choices, without descriptions.

    python -m launch.kubernetes.distil FOLDER-WITH-THE-DEFINITIONS

writes the file that ``schemas`` reads. Its contents are derived from KubeRay v1.7.0 (Apache-2.0). Whatever stands in
it more than once is written once, which makes 30 kB of the 2.3 MB.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KUBERAY_VERSION = "v1.7.0"
FILE = Path(__file__).with_name(f"kuberay-{KUBERAY_VERSION}.json")
NOTICE = f"Derived from the custom resource definitions of KubeRay {KUBERAY_VERSION}, Apache-2.0."

_DEFINITIONS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
_BOUNDS = ("enum", "minimum", "maximum", "minLength", "maxLength", "minItems", "pattern", "format", "nullable")
_OPEN = ("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields")
_STRUCTURE = {"type", "properties", "required", "items", "additionalProperties", "anyOf", *_BOUNDS, *_OPEN}
_WORTH_SHARING = 60  # characters; a reference takes some twenty


def distil(folder: Path) -> dict[str, Any]:
    """The structural schemas of version v1 by kind, and under ``$defs`` what they have in common."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    kinds = {}
    for kind, name in sorted(_DEFINITIONS.items()):
        definition = yaml.load((folder / name).read_text(encoding="utf-8"), Loader=loader)
        (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
        schema = _structure(version["schema"]["openAPIV3Schema"])
        del schema["properties"]["status"]  # the operator writes it, and nobody else
        kinds[kind] = schema
    return {"notice": NOTICE, **_shared(kinds)}


def as_text(schemas: dict[str, Any]) -> str:
    """One definition a line, so that an upgrade's difference can be read."""

    def line(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    definitions = ",\n".join(f"  {line(name)}: {line(value)}" for name, value in schemas["$defs"].items())
    rest = "".join(f",\n {line(name)}: {line(value)}" for name, value in schemas.items() if name != "$defs")
    return f'{{"$defs": {{\n{definitions}\n }}{rest}\n}}\n'


def _structure(schema: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key not in _STRUCTURE:
            continue
        if key == "properties":
            kept[key] = {name: _structure(inner) for name, inner in value.items()}
        elif key == "anyOf":
            kept[key] = [_structure(inner) for inner in value]
        elif isinstance(value, dict):
            kept[key] = _structure(value)
        else:
            kept[key] = value
    return kept


def _shared(kinds: dict[str, Any]) -> dict[str, Any]:
    """``kinds`` with references to ``$defs`` in the place of schemas that occur more than once."""
    seen: Counter[str] = Counter()

    def count(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                count(item)
        elif isinstance(value, dict):
            text = json.dumps(value, sort_keys=True)
            seen[text] += 1
            if seen[text] == 1:
                for item in value.values():
                    count(item)

    def refer(value: Any) -> Any:
        if isinstance(value, list):
            return [refer(item) for item in value]
        if not isinstance(value, dict):
            return value
        text = json.dumps(value, sort_keys=True)
        # A mapping of properties may hold one that is called type; only a schema's own type is text.
        is_schema = isinstance(value.get("type"), str) or isinstance(value.get("anyOf"), list)
        if seen[text] == 1 or len(text) < _WORTH_SHARING or not is_schema:
            return {key: refer(item) for key, item in value.items()}
        if text not in names:
            names[text] = f"d{len(names)}"
            definitions[names[text]] = {key: refer(item) for key, item in value.items()}
        return {"$ref": f"#/$defs/{names[text]}"}

    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}
    count(kinds)
    return {"$defs": definitions, **refer(kinds)}


if __name__ == "__main__":
    FILE.write_text(as_text(distil(Path(sys.argv[1]))), encoding="utf-8")
