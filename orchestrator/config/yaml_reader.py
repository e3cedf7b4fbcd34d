"""How does YAML text become plain data, and on which line does each key stand?

Scalars follow YAML 1.2, where ``1e-3`` is a number and ``yes`` is text; PyYAML's own loader follows 1.1.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from orchestrator.config.yaml_writer import excerpt, quoted
from orchestrator.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
)
COLON_ALONE = re.compile(r"\s*\w+:[^\s:]")


class _Loader(yaml.SafeLoader):
    """Composes nodes whose scalars are resolved by the core schema of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}

_CORE_SCHEMA = (
    ("bool", re.compile("true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("null", re.compile("~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
)
for _kind, _pattern, _first in _CORE_SCHEMA:
    # PyYAML asks ``match``, so the end must be in the pattern.
    _anchored = re.compile(f"(?:{_pattern.pattern})\\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _anchored, list(_first))


class Source:
    """One file and the overrides on top of it: where each key was read, and what was wrong with it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self.lines: dict[KeyPath, int] = {}
        self.overrides: dict[KeyPath, str] = {}  # the argument of --set by what it set

    def compose(self, text: str, label: str) -> yaml.Node | None:
        """The one document in ``text``, which is an override where ``label`` is not the file's path."""
        loader = None
        try:
            loader = _Loader(text)
            return loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = None if mark is None or label != self.path else mark.line + 1
            raise ConfigError(_syntax_problem(label, line, text, str(error.problem or error.context))) from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1 if label == self.path else None
            rule = f"holds a character that YAML does not allow, {text[error.position]!r}"
            raise ConfigError(Problem(source=label, line=line, rule=rule, fix="remove it")) from error
        finally:
            if loader is not None:
                loader.dispose()

    def build(self, node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...] = ()) -> Any:
        """The data of ``node``, which stands at ``path`` inside the nodes ``above``."""
        self.lines.setdefault(path, node.start_mark.line + 1)
        if node in above:
            self._refuse_node(node, path, "*alias", "an alias may not contain itself", "write the value out")
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i), (*above, node)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above)
        assert isinstance(node, yaml.ScalarNode), "YAML has three kinds of nodes"
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag != "tag:yaml.org,2002:str":
                shown = "(a list or mapping)" if key is None else key
                fix = "write a word" if key is None else f'write "{key}" in quotes if it is a name'
                self._refuse_node(key_node, (*path, shown), None, "a key must be text", fix)
                continue
            here = (*path, key)
            if key in built:
                rule = f"is given twice, first on line {self.lines[here]}"
                shown = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
                self._refuse_node(key_node, here, shown, rule, "keep one of the two")
                continue
            self._note_line(here, key_node.start_mark.line + 1)
            built[key] = self.build(value_node, here, (*above, node))
        return built

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        try:
            if kind == "str":
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            if kind == "float":
                return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        except (KeyError, ValueError):
            self._refuse_node(node, path, excerpt(text), f"cannot be read as {kind}", "write it plainly")
            return None
        fix = "leave the tag out; the project imports code only by names such as package.module:attribute"
        self._refuse_node(node, path, f"{node.tag} {text}", "this YAML tag is not understood", fix)
        return None

    def _refuse_node(self, node: yaml.Node, path: KeyPath, value: str | None, rule: str, fix: str) -> None:
        label = self._override_of(path)
        line = None if label else node.start_mark.line + 1
        self.problems.append(
            Problem(source=label or self.path, line=line, key=dotted(path), value=value, rule=rule, fix=fix)
        )

    def _note_line(self, path: KeyPath, line: int) -> None:
        """The key at ``path`` stands on ``line`` of the file, unless an override set it."""
        if self._override_of(path) is None:
            self.lines[path] = line

    def _override_of(self, path: KeyPath) -> str | None:
        """The override that set ``path``, or a section around it."""
        return next((label for keys, label in self.overrides.items() if path[: len(keys)] == keys), None)

    def add_problem(self, paths: list[KeyPath], value: str | None, rule: str, fix: str | None) -> None:
        """Something is wrong with the first of ``paths``, and the others have to do with it."""
        source, line = self._where(paths)
        self.problems.append(Problem(source=source, line=line, key=dotted(paths[0]), value=value, rule=rule, fix=fix))

    def _where(self, paths: list[KeyPath]) -> tuple[str, int | None]:
        """The override that set one of ``paths``, if there was one; else the file and the first line known."""
        for path in paths:
            if label := self._override_of(path):
                return label, None
        for path in paths:
            if path in self.lines:
                return self.path, self.lines[path]
        for end in range(len(paths[0]), 0, -1):
            if paths[0][:end] in self.lines:
                return self.path, self.lines[paths[0][:end]]
        return self.path, None


def dotted(path: KeyPath) -> str:
    """``path`` as people write it: ``controller.ramp[0]``."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def _syntax_problem(source: str, line: int | None, text: str, problem: str) -> Problem:
    lines = text.splitlines() or [""]
    last = len(lines) if line is None else min(line, len(lines))
    shown = text if line is None else lines[last - 1]
    fix = "check the indentation and the colons; put text with special signs in quotes"
    if "\\t" in problem or shown.lstrip(" ").startswith("\t"):
        fix = "indent with spaces, not with tabs"
    elif "could not find expected ':'" in problem or any(map(COLON_ALONE.match, lines[max(0, last - 2) : last])):
        fix = "write key: value, with a space after the colon"
    elif "single document" in problem:
        fix = "keep one document: remove the --- that begins another"
    return Problem(source=source, line=line, rule=f"cannot be read as YAML: {problem}: {quoted(shown)}", fix=fix)
