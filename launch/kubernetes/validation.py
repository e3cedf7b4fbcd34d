"""What would a cluster with KubeRay refuse of these manifests, found without asking one?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from launch.kubernetes import schemas
from launch.kubernetes.cluster_rules import LONGEST_CLUSTER_NAME, cluster_rules, object_name_rules, queue_rules
from launch.kubernetes.findings import Finding, at, field_name
from launch.kubernetes.job_rules import LONGEST_JOB_NAME, job_rules
from launch.kubernetes.pod_rules import config_map_rules, metadata_rules
from launch.kubernetes.yaml_text import Document, Path, load
from orchestrator.config.suggestions import nearest
from orchestrator.errors import GroundswellError, Problem

_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text, in quotes where it looks like something else",
    "boolean": "true or false",
    "object": "a mapping",
    "array": "a list",
    "null": "null",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found in one text: its problems, which manifests were checked, and which are of no kind known here."""

    problems: tuple[Problem, ...]
    checked: tuple[str, ...]
    unknown: tuple[str, ...]


def check(text: str, source: str) -> Report:
    """Check all manifests in ``text``, read from ``source``. Raises ``GroundswellError`` without jsonschema."""
    try:
        documents = load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        rule = f"cannot be read as YAML: {getattr(error, 'problem', None) or error}"
        return Report(problems=(Problem(source=source, line=line, rule=rule),), checked=(), unknown=())
    if not documents:
        return Report(problems=(Problem(source=source, rule="holds no manifest"),), checked=(), unknown=())
    problems, checked, unknown = [], [], []
    for document in documents:
        kind = at(document.data, "kind")
        name = f"{kind} {at(document.data, 'metadata', 'name')}"
        if not isinstance(kind, str):
            fix = "write what it is, such as RayJob"
            problems.append(
                Problem(source=source, line=document.line_of(()), key="kind", rule="must be given", fix=fix)
            )
        elif kind not in schemas.API_VERSIONS:
            unknown.append(name)
        else:
            checked.append(name)
            problems += [_problem(finding, document, source) for finding in _first_of_each_field(document)]
    return Report(problems=tuple(problems), checked=tuple(checked), unknown=tuple(unknown))


def _first_of_each_field(document: Document) -> Iterator[Finding]:
    seen = set()
    for finding in _findings(document):
        if finding.path not in seen:
            seen.add(finding.path)
            yield finding


def _findings(document: Document) -> Iterator[Finding]:
    manifest, kind = document.data, document.data["kind"]
    for path in document.twice:
        rule = "is given twice, and only the last one counts"
        yield Finding(path=path, rule=rule, fix="keep one")
    yield from _schema_findings(manifest, kind)
    yield from metadata_rules(manifest)
    if kind == "ConfigMap":
        yield from config_map_rules(manifest)
    elif kind == "RayCluster":
        yield from object_name_rules(manifest, LONGEST_CLUSTER_NAME)
        yield from cluster_rules(manifest, ("spec",))
        yield from queue_rules(manifest, ("spec",))
    elif kind == "RayJob":
        yield from object_name_rules(manifest, LONGEST_JOB_NAME)
        yield from job_rules(manifest)
        if at(manifest, "spec", "rayClusterSpec") is not None:
            yield from cluster_rules(manifest, ("spec", "rayClusterSpec"))
            yield from queue_rules(manifest, ("spec", "rayClusterSpec"))


def _schema_findings(manifest: Any, kind: str) -> Iterator[Finding]:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise GroundswellError("checking manifests needs jsonschema: pip install 'groundswell[kubernetes]'") from error
    for broken in Draft202012Validator(schemas.schema_of(kind)).iter_errors(manifest):
        yield from _schema_finding(broken, tuple(broken.absolute_path))


def _schema_finding(broken: Any, path: Path) -> Iterator[Finding]:
    """What jsonschema found, in the words of the config's own errors."""
    allowed, seen = broken.validator_value, broken.instance
    match broken.validator:
        case "additionalProperties":
            known = list(broken.schema.get("properties", ()))
            for key in seen.keys() - set(known):
                guess = nearest(str(key), known)
                fix = f"did you mean {guess}?" if guess else f"the fields are {', '.join(known)}"
                yield Finding(path=(*path, key), value=seen[key], rule="there is no such field", fix=fix)
        case "required":
            for key in allowed:
                if key not in seen:
                    yield Finding(path=(*path, key), rule="must be given")
        case "type":
            wanted = [allowed] if isinstance(allowed, str) else allowed
            rule = f"must be {' or '.join(_TYPES[each] for each in wanted)}"
            yield Finding(path=path, value=seen, rule=rule)
        case "anyOf":
            yield Finding(path=path, value=seen, rule="must be a whole number or text")
        case "enum":
            yield Finding(path=path, value=seen, rule=f"must be one of {', '.join(map(str, allowed))}")
        case "const":
            yield Finding(path=path, value=seen, rule=f"must be {allowed}")
        case "pattern":
            yield Finding(path=path, value=seen, rule=f"must be written as {allowed}")
        case "minimum" | "maximum":
            words = "at least" if broken.validator == "minimum" else "at most"
            yield Finding(path=path, value=seen, rule=f"must be {words} {allowed}")
        case _:
            yield Finding(path=path, value=seen, rule=broken.message)


def _problem(finding: Finding, document: Document, source: str) -> Problem:
    shown = None
    if finding.value is not None:
        shown = finding.value if isinstance(finding.value, str) else json.dumps(finding.value, default=str)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
    key = field_name(finding.path)
    line = document.line_of(finding.path)
    return Problem(source=source, line=line, key=key, value=shown, rule=finding.rule, fix=finding.fix)
