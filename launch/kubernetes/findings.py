"""What is wrong with a manifest: which field, what was seen, which rule it breaks, what to do?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.kubernetes.yaml_text import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule that a manifest breaks; ``path`` leads from the manifest's top to the field to blame."""

    path: Path
    value: Any = None
    rule: str
    fix: str | None = None


def field_name(path: Path) -> str:
    """``path`` as kubectl writes it; a key with points, such as a label's, stands in brackets."""
    text = ""
    for part in path:
        if isinstance(part, int) or not re.fullmatch(r"[\w-]+", part):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def at(tree: Any, *path: str | int) -> Any:
    """What lies at ``path`` below ``tree``, or ``None``; nothing is assumed of the shapes on the way."""
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


def mapping(tree: Any, *path: str | int) -> dict[str, Any]:
    """The mapping at ``path``, empty where there is none."""
    found = at(tree, *path)
    return found if isinstance(found, dict) else {}


def items(tree: Any, *path: str | int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The mappings of the list at ``path`` with their positions."""
    found = at(tree, *path)
    return ((i, item) for i, item in enumerate(found if isinstance(found, list) else []) if isinstance(item, dict))
