"""How do manifests become YAML, and YAML become manifests that know on which line each field stands?

Kubernetes reads YAML as a mixture of the versions 1.1 and 1.2, so text that either takes for something else is quoted.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

Path = tuple[str | int, ...]

# Numbers of YAML 1.2 that PyYAML, which follows 1.1, would write without quotes: 1e3, 0o17.
_NUMBER = re.compile(r"[-+]?(\.?[0-9][0-9_.]*([eE][-+]?[0-9]+)?|0[oxb][0-9a-fA-F_]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One manifest as it was read, and the line of each of its fields, counted from 1."""

    data: Any
    lines: dict[Path, int]
    twice: tuple[Path, ...]  # keys that are given more than once

    def line_of(self, path: Path) -> int | None:
        """Where ``path`` stands, or what is around it."""
        return next((self.lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.lines), None)


class _Dumper(yaml.SafeDumper):
    """Block style, lists indented below their key, nothing folded."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """Dates stay text, as they do for Kubernetes."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    odd = not text.replace("\n", "").isprintable()  # other line ends among them, which a block would not keep
    plain = dumper.resolve(yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str"
    style = '"' if odd or not plain or _NUMBER.fullmatch(text) else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(documents: list[dict[str, Any]], reason: Callable[[str, Path], str | None] | None = None) -> str:
    """The manifests as one YAML text, in their order; ``reason`` of a kind and a field becomes a comment above it.

    A reason is given where it first applies in a manifest, and not again.
    """
    texts = []
    for data in documents:
        text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
        texts.append(text if reason is None else _explained(text, data["kind"], reason))
    return "---\n".join(texts)


def load(text: str) -> list[Document]:
    """The manifests in ``text``; empty ones are left out. Raises ``yaml.YAMLError`` where it is no YAML."""
    documents = []
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None, "check_node said that there is one"
            lines: dict[Path, int] = {}
            twice: list[Path] = []
            for path, key in _fields(node):
                if path in lines:
                    twice.append(path)
                lines[path] = key.start_mark.line + 1
            lines.setdefault((), node.start_mark.line + 1)
            data = _with_text_keys(loader.construct_document(node))
            if data is not None:
                documents.append(Document(data=data, lines=lines, twice=tuple(twice)))
    finally:
        loader.dispose()
    return documents


def _with_text_keys(data: Any) -> Any:
    """``data`` as JSON has it, whose keys are text: Kubernetes reads YAML by way of it."""
    if isinstance(data, dict):
        return {str(key).lower() if isinstance(key, bool) else str(key): _with_text_keys(v) for key, v in data.items()}
    return [_with_text_keys(item) for item in data] if isinstance(data, list) else data


def _fields(node: yaml.Node, path: Path = (), above: tuple[yaml.Node, ...] = ()) -> Iterator[tuple[Path, yaml.Node]]:
    """Every field below ``node`` with the node of its key; items of lists stand for themselves."""
    if any(node is outer for outer in above):
        raise yaml.MarkedYAMLError(problem="an alias may not contain itself", problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            yield here, key
            yield from _fields(value, here, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item
            yield from _fields(item, (*path, index), (*above, node))


def _explained(text: str, kind: str, reason: Callable[[str, Path], str | None]) -> str:
    comments: dict[int, list[str]] = {}
    given = set()
    lines = text.splitlines(keepends=True)
    whole = yaml.compose(text, Loader=_Loader)
    assert whole is not None, "a manifest has fields"
    for path, key in _fields(whole):
        why = reason(kind, path) if isinstance(path[-1], str) else None
        if why is None or why in given:
            continue
        given.add(why)
        line = lines[key.start_mark.line]
        indent = " " * (len(line) - len(line.lstrip()))
        comments[key.start_mark.line] = textwrap.wrap(
            why, 120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
    return "".join(
        "".join(f"{comment}\n" for comment in comments.get(number, ())) + line for number, line in enumerate(lines)
    )
