"""A config as text: read strictly, with the line of every key, and written so that it reads back equal.

Scalars follow YAML 1.2, where ``1e-3`` is a number and ``yes`` is text; PyYAML's own loader follows 1.1.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from orchestrator.config import Broken, RunConfig, nearest
from orchestrator.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
)
_COLON_ALONE = re.compile(r"\s*\w+:[^\s:]")
_PLAIN_TEXT = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*(:[A-Za-z0-9_.]+)?")

# What people coming from other tools write.
_SYNONYMS = {
    "amp": "train.precision",
    "batch_size": "batch.initial",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "clip_grad_norm": "train.max_grad_norm",
    "dataset": "task",
    "global_batch_size": "batch.initial",
    "grad_clip": "train.max_grad_norm",
    "gradient_accumulation_steps": "batch.micro_batch",
    "learning_rate": "optimizer.lr",
    "max_epochs": "train.epochs",
    "max_steps": "train.samples",
    "model": "task",
    "num_epochs": "train.epochs",
    "num_workers": "workers.initial",
    "scheduler": "schedule",
    "steps": "train.samples",
    "warmup": "schedule.warmup_samples",
    "warmup_steps": "schedule.warmup_samples",
    "wd": "optimizer.weight_decay",
    "world_size": "workers.initial",
}
_MAGNITUDES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "seconds": 1.0, "m": 60.0, "min": 60.0, "minutes": 60.0, "h": 3600.0}


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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``section.key=value`` overrides in order, and check everything.

    Raises ``ConfigError`` with every problem found: file, line, key, value, the rule, and what to write.
    """
    path = Path(path)
    source = _Source(str(path))
    data = source.read(_read_text(path))
    for text in overrides:
        source.override(data, text)
    if data.get("run") is None:
        data["run"] = {}
    if isinstance(data["run"], dict) and data["run"].get("name") is None:
        data["run"]["name"] = path.stem
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        source.explain(error)
        config = None
    if source.problems or config is None:
        raise ConfigError(*sorted(source.problems, key=lambda p: (p.source != str(path), p.line or 0)))
    return config


def to_yaml(config: RunConfig, comments: bool = True) -> str:
    """The resolved config as text that ``load_config`` reads back to an equal one; ``comments`` explains each key."""
    lines = [f"# The resolved configuration of run {config.run.name}."] if comments else []

    def comment(text: str, indent: str) -> None:
        if comments:
            lines.extend(textwrap.wrap(text, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "))

    for name, field in type(config).model_fields.items():
        section = getattr(config, name)
        if comments:
            lines.append("")
        if not isinstance(section, BaseModel):
            comment(field.description or "", "")
            lines.append(f"{name}: {_inline(section)}")
            continue
        comment((field.description or "").removeprefix("[section] "), "")
        lines.append(f"{name}:")
        for key, described in type(section).model_fields.items():
            value = getattr(section, key)
            if value is None and described.default_factory is not None:
                continue  # a key of another optimizer or schedule
            comment(described.description or "", "  ")
            lines.append(f"  {key}: {_inline(value)}")
    return "\n".join(lines) + "\n"


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        fix = "groundswell config list names the bundled configs"
        reason = "is a folder, not a file" if path.is_dir() else f"cannot be read: {error.strerror}"
        raise ConfigError(Problem(source=str(path), rule=reason, fix=fix)) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        rule = f"must be UTF-8 text, and byte 0x{raw[error.start]:02x} is not"
        raise ConfigError(Problem(source=str(path), line=line, rule=rule, fix="save the file as UTF-8")) from error


class _Source:
    """One file and the overrides on top of it: where each key was read, and what was wrong with it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self._lines: dict[KeyPath, int] = {}
        self._overrides: dict[KeyPath, str] = {}

    def read(self, text: str) -> dict[str, Any]:
        node = self._compose(text, self.path)
        fix = "begin from a bundled one: groundswell config show digits"
        if node is None:
            raise ConfigError(Problem(source=self.path, rule="the file is empty", fix=fix))
        if not isinstance(node, yaml.MappingNode):
            rule = "must hold sections such as task: and train:, each with its keys indented below it"
            raise ConfigError(Problem(source=self.path, line=1, rule=rule, fix=fix))
        data: dict[str, Any] = self._build(node, (), ())
        return data

    def override(self, data: dict[str, Any], text: str) -> None:
        """Set one key as ``--set`` asks; what is wrong with it is added to the problems."""
        label = f"--set {text}"
        dotted, equals, written = text.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            fix = "write section.key=value, such as optimizer.lr=0.1"
            self.problems.append(Problem(source=label, rule="is not section.key=value", fix=fix))
            return
        try:
            node = self._compose(written, label)
        except ConfigError as error:
            self.problems.extend(p for p in error.problems if isinstance(p, Problem))
            return
        self._overrides[keys] = label
        value = None if node is None else self._build(node, keys, ())
        inside = data
        for depth, key in enumerate(keys[:-1], start=1):
            if inside.get(key) is None:
                inside[key] = {}
            if not isinstance(inside[key], dict):
                held = ".".join(keys[:depth])
                rule = f"nothing lies below {held}, which is {_shown(inside[key])}"
                shown = _shown(value)
                self.problems.append(
                    Problem(source=label, key=dotted, value=shown, rule=rule, fix=f"set {held} itself")
                )
                return
            inside = inside[key]
        inside[keys[-1]] = value

    def explain(self, error: ValidationError) -> None:
        """Add a problem for each error, in the words of the config rather than of pydantic."""
        for item in error.errors(include_url=False):
            if item["type"] == "default_factory_not_called":
                continue  # follows from another error in its section
            if item["type"] == "rules":
                for broken in item["ctx"]["broken"]:
                    self._explain_rule(item["loc"], broken)
                continue
            loc: KeyPath = item["loc"]
            value = None if item["type"] == "missing" else _shown(item["input"])
            rule, fix = _wording(item["type"], loc, item["input"], item.get("ctx", {}), item["msg"])
            self._add([loc], value, rule, fix)

    def _explain_rule(self, loc: KeyPath, broken: Broken) -> None:
        paths = [loc + tuple(part for part in key.split(".") if part) for key in broken.keys] or [loc]
        value = None if broken.value is None else _shown(broken.value)
        self._add(paths, value, broken.rule, broken.fix)

    def _add(self, paths: list[KeyPath], value: str | None, rule: str, fix: str | None) -> None:
        source, line = self._where(paths)
        self.problems.append(Problem(source=source, line=line, key=_dotted(paths[0]), value=value, rule=rule, fix=fix))

    def _where(self, paths: list[KeyPath]) -> tuple[str, int | None]:
        """The override that set one of ``paths``, if there was one; else the file and the first line known."""
        for path in paths:
            for keys, label in self._overrides.items():
                if path[: len(keys)] == keys:
                    return label, None
        for path in paths:
            if path in self._lines:
                return self.path, self._lines[path]
        for end in range(len(paths[0]), 0, -1):
            if paths[0][:end] in self._lines:
                return self.path, self._lines[paths[0][:end]]
        return self.path, None

    def _compose(self, text: str, source: str) -> yaml.Node | None:
        loader = None
        try:
            loader = _Loader(text)
            return loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = None if mark is None or source != self.path else mark.line + 1
            raise ConfigError(_syntax_problem(source, line, text, str(error.problem or error.context))) from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1 if source == self.path else None
            rule = f"holds a character that YAML does not allow, {text[error.position]!r}"
            raise ConfigError(Problem(source=source, line=line, rule=rule, fix="remove it")) from error
        finally:
            if loader is not None:
                loader.dispose()

    def _build(self, node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...]) -> Any:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if node in above:
            self._refuse_node(node, path, "*alias", "an alias may not contain itself", "write the value out")
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, i), (*above, node)) for i, item in enumerate(node.value)]
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
                rule = f"is given twice, first on line {self._lines[here]}"
                shown = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
                self._refuse_node(key_node, here, shown, rule, "keep one of the two")
                continue
            self._note_line(here, key_node)
            built[key] = self._build(value_node, here, (*above, node))
        return built

    def _note_line(self, path: KeyPath, node: yaml.Node) -> None:
        if not any(path[: len(keys)] == keys for keys in self._overrides):
            self._lines[path] = node.start_mark.line + 1

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
            self._refuse_node(node, path, _shown(text), f"cannot be read as {kind}", "write it plainly")
            return None
        fix = "leave the tag out; the project imports code only by names such as package.module:attribute"
        self._refuse_node(node, path, f"{node.tag} {text}", "this YAML tag is not understood", fix)
        return None

    def _refuse_node(self, node: yaml.Node, path: KeyPath, value: str | None, rule: str, fix: str) -> None:
        label = next((label for keys, label in self._overrides.items() if path[: len(keys)] == keys), None)
        line = None if label else node.start_mark.line + 1
        self.problems.append(
            Problem(source=label or self.path, line=line, key=_dotted(path), value=value, rule=rule, fix=fix)
        )


def _syntax_problem(source: str, line: int | None, text: str, problem: str) -> Problem:
    lines = text.splitlines() or [""]
    last = len(lines) if line is None else min(line, len(lines))
    shown = text if line is None else lines[last - 1]
    fix = "check the indentation and the colons; put text with special signs in quotes"
    if "\\t" in problem or shown.lstrip(" ").startswith("\t"):
        fix = "indent with spaces, not with tabs"
    elif "could not find expected ':'" in problem or any(map(_COLON_ALONE.match, lines[max(0, last - 2) : last])):
        fix = "write key: value, with a space after the colon"
    elif "single document" in problem:
        fix = "keep one document: remove the --- that begins another"
    return Problem(source=source, line=line, rule=f"cannot be read as YAML: {problem}: {_quoted(shown)}", fix=fix)


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
        fix = "write a space after the colon" if isinstance(value, str) and _COLON_ALONE.match(value) else None
        return "must be a section, with its keys indented below it", fix or f"its keys are {keys}"
    if kind in ("int_type", "float_type"):
        whole = kind == "int_type"
        rule = f"must be a {'whole number' if whole else 'number'}{of_unit}"
        return rule, _number_hint(value, unit=unit, whole=whole, loc=loc)
    if kind == "bool_type":
        meant = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
        guess = meant.get(str(value).lower()) or nearest(str(value), ("true", "false"))
        return "must be true or false", f"write {guess}" if guess else None
    if kind == "string_type":
        fix = f'write it in quotes: "{_inline(value)}"' if not isinstance(value, (list, dict)) else "write one word"
        return "must be text", fix
    if kind in ("tuple_type", "too_long", "too_short"):
        return f"must be a list: {unit}", f"write [ ] around it, as in {_example(loc)}"
    if kind == "dict_type":
        return "must be a mapping, with its keys indented below it", about or None
    if kind == "literal_error":
        allowed = [str(a) for a in get_args(field.annotation)] if field else []
        guess = nearest(str(value), allowed)
        return f"must be one of {', '.join(allowed)}", f"did you mean {guess}?" if guess else None
    if kind == "finite_number":
        return f"must be a finite number{of_unit}", about or None
    if kind == "string_too_short":
        return "must not be empty", about or None
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for bound, words in bounds.items():
        if bound in ctx:
            return f"must be {words} {ctx[bound]:.15g}{of_unit}", _bound_hint(value, bound, ctx) or about
    return message, about or None


def _missing(loc: KeyPath, model: type[BaseModel] | None, unit: str, about: str) -> tuple[str, str | None]:
    if isinstance(loc[-1], int):
        return f"one is missing: {unit}", f"write as in {_example(loc)}"
    if model is not None:
        needed = ", ".join(f"{loc[0]}.{name}" for name, field in model.model_fields.items() if field.is_required())
        return "this section must be given", f"give {needed}" if needed else "give train.epochs or train.samples"
    return "must be given", f"it is {about} ({unit})"


def _unknown_key(loc: KeyPath) -> tuple[str, str | None]:
    _, model = _lookup(loc[:-1])
    siblings = list((model or RunConfig).model_fields)
    inside = _dotted(loc[:-1])
    rule = f"no such key in {inside}" if inside else "no such section"
    guess = _likely_key(str(loc[-1]), siblings, inside)
    return rule, f"did you mean {guess}?" if guess else f"the keys are {', '.join(siblings)}"


def _likely_key(word: str, siblings: list[str], inside: str) -> str | None:
    prefix = f"{inside}." if inside else ""
    by_leaf: dict[str, list[str]] = {}
    for name, field in RunConfig.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            by_leaf.setdefault(key, []).append(f"{name}.{key}")
    for known in (word, f"{word}_samples", f"{word}_s"):
        if known in siblings:
            return prefix + known
    if word in by_leaf:
        return " or ".join(by_leaf[word])
    if word in _SYNONYMS:
        return _SYNONYMS[word]
    if sibling := nearest(word, siblings):
        return prefix + sibling
    leaf = nearest(word, by_leaf)
    return " or ".join(by_leaf[leaf]) if leaf else None


def _number_hint(value: Any, *, unit: str, whole: bool, loc: KeyPath) -> str | None:
    if isinstance(value, bool):
        return "true and false are not numbers"
    if isinstance(value, float):
        return f"write {int(value)}" if math.isfinite(value) and value.is_integer() else "write it without a fraction"
    if not isinstance(value, str):
        return None
    found = re.fullmatch(r"\s*([-+]?[0-9][0-9_, ]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\s*(%|[A-Za-z-]*)\s*", value)
    if found is None:
        return "write digits only"
    if re.fullmatch(r"[-+]?[0-9]+,([0-9]{1,2}|[0-9]{4,})", found[1]):
        return f"the decimal sign is a point: write {found[1].replace(',', '.')}"
    number, suffix = float(re.sub(r"[_, ]", "", found[1])), found[2].lower()
    if loc[:2] == ("train", "samples") and suffix.startswith("epoch"):
        return f"write train.epochs: {number:.15g} instead"
    if suffix.startswith("step") and unit == "samples":
        return "this counts samples, not steps: multiply the steps by the batch"
    if suffix == "%":
        number /= 100
    elif unit == "s":
        number *= _SECONDS.get(suffix, 1.0)
    else:
        number *= _MAGNITUDES.get(suffix, 1.0)
    if whole and not number.is_integer():
        return f"write a whole number near {number:.15g}"
    return f"write {number:.15g}, without quotes, unit or separators"


def _bound_hint(value: Any, bound: str, ctx: dict[str, Any]) -> str | None:
    if bound in ("le", "lt") and ctx[bound] == 1 and isinstance(value, (int, float)) and 1 < value <= 100:
        return f"it is a fraction: for {value:g} % write {value / 100:g}"
    return None


def _example(loc: KeyPath) -> str:
    return {
        "betas": "betas: [0.9, 0.999]",
        "milestones_samples": "milestones_samples: [20000, 40000]",
        "ramp": "ramp: [[20000, 64], [40000, 128]]",
    }.get(str(next((part for part in loc[1:] if isinstance(part, str)), "")), "[1, 2]")


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
        inner = field.annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    return field, model


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def _shown(value: Any) -> str:
    text = _inline(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _inline(value: Any) -> str:
    """A value on one line; lists and mappings in brackets."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return _quoted(value) if not _PLAIN_TEXT.fullmatch(value) or _is_word_of_yaml(value) else value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_inline(k)}: {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_inline(v) for v in value) + "]"
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


def _quoted(text: str) -> str:
    """``text`` in double quotes; whatever cannot be printed, line ends among it, as an escape."""

    def escape(char: str) -> str:
        if char.isprintable():
            return char
        code = ord(char)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return '"' + "".join(map(escape, text.replace("\\", "\\\\").replace('"', '\\"'))) + '"'
