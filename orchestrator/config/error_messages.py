"""What does a user read when a value is refused: which rule it breaks, and what to write instead?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from orchestrator.config.run_config import RunConfig
from orchestrator.config.section import Broken
from orchestrator.config.suggestions import bound_hint, likely_key, nearest, number_hint
from orchestrator.config.yaml_reader import COLON_ALONE, KeyPath, Source, dotted
from orchestrator.config.yaml_writer import excerpt, inline


def explain(error: ValidationError, source: Source) -> None:
    """Add a problem to ``source`` for each error, in the words of the config rather than of pydantic."""
    for item in error.errors(include_url=False):
        if item["type"] == "default_factory_not_called":
            continue  # follows from another error in its section
        if item["type"] == "rules":
            for broken in item["ctx"]["broken"]:
                _explain_rule(item["loc"], broken, source)
            continue
        loc: KeyPath = item["loc"]
        value = None if item["type"] == "missing" else excerpt(item["input"])
        rule, fix = _wording(item["type"], loc, item["input"], item.get("ctx", {}), item["msg"])
        source.add_problem([loc], value, rule, fix)


def _explain_rule(loc: KeyPath, broken: Broken, source: Source) -> None:
    paths = [loc + _parts(key) for key in broken.keys] or [loc]
    value = None if broken.value is None else excerpt(broken.value)
    source.add_problem(paths, value, broken.rule, broken.fix)


def _parts(key: str) -> KeyPath:
    """``cluster.worker_groups[0].name`` as a path."""
    return tuple(int(part[1:-1]) if part[0] == "[" else part for part in re.findall(r"\[\d+\]|[^.[]+|\[", key))


def _wording(kind: str, loc: KeyPath, value: Any, ctx: dict[str, Any], message: str) -> tuple[str, str | None]:
    """The rule that was broken, and what to write instead."""
    field, model = _lookup(loc)
    unit, _, about = ((field.description if field else None) or "").lstrip("[").partition("] ")
    of_unit = f" ({unit})" if unit not in ("", "number") else ""
    if kind == "missing":
        return _missing(loc, model, unit, about)
    if kind == "extra_forbidden":
        return _unknown_key(loc)
    if kind in ("model_type", "model_attributes_type"):
        keys = ", ".join(model.model_fields) if model else ""
        fix = "write a space after the colon" if isinstance(value, str) and COLON_ALONE.match(value) else None
        return "must be a section, with its keys indented below it", fix or f"its keys are {keys}"
    if kind in ("int_type", "float_type"):
        whole = kind == "int_type"
        rule = f"must be a {'whole number' if whole else 'number'}{of_unit}"
        return rule, number_hint(value, unit=unit, whole=whole, loc=loc)
    if kind == "bool_type":
        meant = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
        guess = meant.get(str(value).lower()) or nearest(str(value), ("true", "false"))
        return "must be true or false", f"write {guess}" if guess else None
    if kind == "string_type":
        fix = f'write it in quotes: "{inline(value)}"' if not isinstance(value, (list, dict)) else "write one word"
        return "must be text", fix
    if kind in ("tuple_type", "too_long", "too_short"):
        return f"must be a list: {unit}", f"write [ ] around it, as in {_example(loc)}"
    if kind == "dict_type":
        return "must be a mapping, with its keys indented below it", about or None
    if kind == "literal_error":
        allowed = list(_words_of(field.annotation)) if field else []
        guess = nearest(str(value), allowed)
        return f"must be one of {', '.join(allowed)}", f"did you mean {guess}?" if guess else None
    if kind == "finite_number":
        return f"must be a finite number{of_unit}", about or None
    if kind == "string_too_short":
        return "must not be empty", about or None
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for bound, words in bounds.items():
        if bound in ctx:
            return f"must be {words} {ctx[bound]:.15g}{of_unit}", bound_hint(value, bound, ctx) or about
    return message, about or None


def _words_of(annotation: Any) -> Iterator[str]:
    """The words that a ``Literal`` allows, wherever in the annotation it stands: by itself, in a list, beside None."""
    for inner in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield str(inner)
        else:
            yield from _words_of(inner)


def _missing(loc: KeyPath, model: type[BaseModel] | None, unit: str, about: str) -> tuple[str, str | None]:
    if isinstance(loc[-1], int):
        return f"one is missing: {unit}", f"write as in {_example(loc)}"
    if model is not None:
        needed = ", ".join(f"{dotted(loc)}.{name}" for name, field in model.model_fields.items() if field.is_required())
        choice = "train.epochs or train.samples" if loc == ("train",) else f"one of {', '.join(model.model_fields)}"
        return "this section must be given", f"give {needed or choice}"
    return "must be given", f"it is {about} ({unit})"


def _unknown_key(loc: KeyPath) -> tuple[str, str | None]:
    _, model = _lookup(loc[:-1])
    siblings = list((model or RunConfig).model_fields)
    inside = dotted(loc[:-1])
    rule = f"no such key in {inside}" if inside else "no such section"
    sections = {name: getattr(model_in(f.annotation), "model_fields", {}) for name, f in RunConfig.model_fields.items()}
    guess = likely_key(str(loc[-1]), siblings, inside, sections)
    return rule, f"did you mean {guess}?" if guess else f"the keys are {', '.join(siblings)}"


def _example(loc: KeyPath) -> str:
    examples = {
        "betas": "betas: [0.9, 0.999]",
        "milestones_samples": "milestones_samples: [20000, 40000]",
        "ramp": "ramp: [[20000, 64], [40000, 128]]",
        "worker_groups": "worker_groups: [{name: pods, memory_gib: 16}]",
        "tolerations": "tolerations: [{key: spot}]",
        "image_pull_secrets": "image_pull_secrets: [my-registry]",
    }
    return next((examples[str(part)] for part in reversed(loc) if part in examples), "[1, 2]")


def _lookup(loc: KeyPath) -> tuple[FieldInfo | None, type[BaseModel] | None]:
    """The field at ``loc``, and the section that it holds, if it is one; positions in lists are passed over."""
    model: type[BaseModel] | None = RunConfig
    field: FieldInfo | None = None
    for part in loc:
        if isinstance(part, int):
            continue
        found = model.model_fields.get(part) if model is not None else None
        if found is None:
            return field if model is None else None, None
        field = found
        model = model_in(field.annotation)
    return field, model


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation: itself, or the one that may be null, stands in a list or under names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := model_in(inner))), None)
