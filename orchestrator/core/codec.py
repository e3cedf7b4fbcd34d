"""Frozen values to plain JSON data and back, exactly: the controller's state travels and is saved this way.

Floats survive because Python writes the shortest text that reads back as the same number. A class is known by its
name among those passed to ``decode``; an unknown name or field is refused, so a changed state is never half read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

_TAG = "$"


def encode(value: Any) -> Any:
    """Data that ``json.dumps`` takes: dataclasses and enums are tagged with their class name, tuples become lists."""
    if isinstance(value, Enum):
        return {_TAG: type(value).__name__, "value": value.value}
    if is_dataclass(value) and not isinstance(value, type):
        return {_TAG: type(value).__name__} | {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot encode {type(value).__name__}: a state holds numbers, text, tuples and dataclasses only")


def decode(data: Any, known: Mapping[str, type]) -> Any:
    """The value that ``encode`` was given. Raises ``ValueError`` for a class or a field that is not known."""
    if isinstance(data, list):
        return tuple(decode(item, known) for item in data)
    if not isinstance(data, dict):
        return data
    name = str(data.get(_TAG))
    if name not in known:
        raise ValueError(f"unknown type {name!r} in a saved state; known: {', '.join(sorted(known))}")
    content = {key: decode(item, known) for key, item in data.items() if key != _TAG}
    try:
        return known[name](**content)
    except TypeError as error:
        raise ValueError(f"a saved {name} does not fit this version: {error}") from error
