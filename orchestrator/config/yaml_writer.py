"""How is a config, or one value of it, written as YAML that reads back equal?

The text is plain to readers of YAML 1.1 and 1.2 alike.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from orchestrator.config.run_config import RunConfig

_PLAIN_TEXT = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*(:[A-Za-z0-9_.]+)?")


def to_yaml(config: RunConfig, comments: bool = True) -> str:
    """The resolved config as text that ``load_config`` reads back to an equal one; ``comments`` explains each key."""
    lines = [f"# The resolved configuration of run {config.run.name}."] if comments else []

    for name, field in type(config).model_fields.items():
        section = getattr(config, name)
        if comments:
            lines.append("")
            lines.extend(_comment((field.description or "").removeprefix("[section] "), ""))
        if isinstance(section, BaseModel):
            lines.append(f"{name}:")
            lines.extend(_section(section, "  ", comments))
        else:
            lines.append(f"{name}: {inline(section)}")
    return "\n".join(lines) + "\n"


def _section(section: BaseModel, indent: str, comments: bool) -> Iterator[str]:
    """The keys of a section, and of the sections in it; in a list each of them has a dash of its own."""
    for key, described in type(section).model_fields.items():
        value = getattr(section, key)
        if value is None and described.default_factory is not None:
            continue  # a key of another optimizer or schedule
        if comments:
            yield from _comment(described.description or "", indent)
        if isinstance(value, BaseModel):
            yield f"{indent}{key}:"
            yield from _section(value, indent + "  ", comments)
        elif isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            yield f"{indent}{key}:"
            for item in value:
                yield f"{indent}  -"
                yield from _section(item, indent + "    ", comments)
        else:
            yield f"{indent}{key}: {inline(value)}"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def excerpt(value: Any) -> str:
    """``inline``, cut where it is too long for a message."""
    text = inline(value)
    return text if len(text) <= 80 else text[:77] + "..."


def inline(value: Any) -> str:
    """A value on one line; lists and mappings in brackets."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return quoted(value) if not _PLAIN_TEXT.fullmatch(value) or _is_word_of_yaml(value) else value
    if isinstance(value, BaseModel):
        return inline({key: getattr(value, key) for key in type(value).model_fields})
    if isinstance(value, dict):
        return "{" + ", ".join(f"{inline(k)}: {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(inline(v) for v in value) + "]"
    return str(value)


def _is_word_of_yaml(text: str) -> bool:
    """Whether a reader of YAML, 1.1 ones included, would take plain ``text`` for something else."""
    return text.lower() in ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


def _float(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    digits, exponent, power = repr(value).partition("e")
    # Readers of YAML 1.1 want the point: to them 1e-08 is text.
    return f"{digits}.0e{power}" if exponent and "." not in digits else repr(value)


def quoted(text: str) -> str:
    """``text`` in double quotes; whatever cannot be printed, line ends among it, as an escape."""

    def escape(char: str) -> str:
        if char.isprintable():
            return char
        code = ord(char)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return '"' + "".join(map(escape, text.replace("\\", "\\\\").replace('"', '\\"'))) + '"'
