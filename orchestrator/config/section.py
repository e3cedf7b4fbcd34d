"""What have all sections in common: how they refuse a value, and how a ``name`` in them decides which keys belong?

Sections are frozen and refuse nonsense where they are built. Rules between two keys are collected, so that one refusal
lists all of them; they are tried once every key is right by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.config.suggestions import import_hint, nearest

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A rule that a value breaks: dotted keys below the section it was found in, the first one to blame."""

    keys: tuple[str, ...]
    value: Any
    rule: str
    fix: str | None = None


def refuse(broken: list[Broken]) -> None:
    """Raise what pydantic turns into one error that carries all of ``broken``; nothing where there is none."""
    if broken:
        text = "; ".join(f"{'.'.join(b.keys[:1])}: {b.rule}" for b in broken)
        raise PydanticCustomError("rules", "{text}", {"text": text, "broken": tuple(broken)})


class Section(BaseModel):
    """Frozen and strict; a known key that is ``None`` counts as not given."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}


def is_import_path(name: str) -> bool:
    """Whether ``name`` reads as ``package.module:attribute``; nothing is imported."""
    return _IMPORT_PATH.fullmatch(name) is not None and not name.partition(":")[0].endswith(".py")


@dataclass(frozen=True, slots=True)
class NameOf:
    """A check for fields that name something built in or something to import."""

    known: Collection[str]
    what: str

    def __call__(self, name: str) -> str:
        if name in self.known or is_import_path(name):
            return name
        fix = import_hint(name)
        if fix is None and (guess := nearest(name, self.known)):
            fix = f"did you mean {guess}?"
        rule = f"must be one of {', '.join(self.known)}, or package.module:attribute for {self.what} of your own"
        refuse([Broken(keys=(), value=name, rule=rule, fix=fix)])
        return name


def default_of(by_name: Mapping[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """A default that depends on the section's ``name``; ``None`` where the key does not belong to it."""
    return lambda given: by_name.get(given.get("name", ""))


def foreign_keys(
    section: BaseModel, what: str, keys: Mapping[str, frozenset[str]], *, common: frozenset[str]
) -> list[Broken]:
    """The keys of ``section`` that are given and belong to other names than its own."""
    name: str = section.name  # type: ignore[attr-defined]  # only sections with a name are checked
    if name not in keys:
        return []
    broken = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        if value is None or key in keys[name] or key in common:
            continue
        users = [user for user in keys if key in keys[user]]
        fix = f"remove it, or choose {what} that uses it: {', '.join(users)}"
        broken.append(Broken(keys=(key, "name"), value=value, rule=f"{what} {name} does not use it", fix=fix))
    return broken


def given_keys(section: BaseModel, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The section's keys that have a value."""
    values = {key: getattr(section, key) for key in type(section).model_fields if key not in without}
    return {key: value for key, value in values.items() if value is not None}
