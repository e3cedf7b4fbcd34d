"""How do a config file and the overrides on top of it become one checked config?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.config.error_messages import explain
from orchestrator.config.plugins import refuse_plugins
from orchestrator.config.run_config import RunConfig
from orchestrator.config.yaml_reader import Source
from orchestrator.config.yaml_writer import excerpt
from orchestrator.errors import ConfigError, Problem


def load_config(path: str | Path, overrides: Sequence[str] = (), *, plugins: bool = True) -> RunConfig:
    """Read ``path``, apply ``section.key=value`` overrides in order, and check everything.

    ``plugins=False`` refuses names of code to import, so that a config from elsewhere runs only what is built in.

    Raises ``ConfigError`` with every problem found: file, line, key, value, the rule, and what to write.
    """
    path = Path(path)
    source = Source(str(path))
    data = _read_sections(_read_text(path), source)
    for text in overrides:
        _override(data, text, source)
    if data.get("run") is None:
        data["run"] = {}
    if isinstance(data["run"], dict) and data["run"].get("name") is None:
        data["run"]["name"] = path.stem
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        explain(error, source)
        config = None
    if config is not None and not plugins:
        refuse_plugins(config, source)
    if source.problems or config is None:
        raise ConfigError(*sorted(source.problems, key=lambda p: (p.source != str(path), p.line or 0)))
    return config


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


def _read_sections(text: str, source: Source) -> dict[str, Any]:
    node = source.compose(text, source.path)
    fix = "begin from a bundled one: groundswell config show digits"
    if node is None:
        raise ConfigError(Problem(source=source.path, rule="the file is empty", fix=fix))
    if not isinstance(node, yaml.MappingNode):
        rule = "must hold sections such as task: and train:, each with its keys indented below it"
        raise ConfigError(Problem(source=source.path, line=1, rule=rule, fix=fix))
    data: dict[str, Any] = source.build(node, ())
    return data


def _override(data: dict[str, Any], text: str, source: Source) -> None:
    """Set one key as ``--set`` asks; what is wrong with it is added to the problems."""
    label = f"--set {text}"
    dotted, equals, written = text.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        fix = "write section.key=value, such as optimizer.lr=0.1"
        source.problems.append(Problem(source=label, rule="is not section.key=value", fix=fix))
        return
    try:
        node = source.compose(written, label)
    except ConfigError as error:
        source.problems.extend(p for p in error.problems if isinstance(p, Problem))
        return
    source.overrides[keys] = label
    value = None if node is None else source.build(node, keys)
    inside = data
    for depth, key in enumerate(keys[:-1], start=1):
        if inside.get(key) is None:
            inside[key] = {}
        if not isinstance(inside[key], dict):
            held = ".".join(keys[:depth])
            rule = f"nothing lies below {held}, which is {excerpt(inside[key])}"
            shown = excerpt(value)
            source.problems.append(Problem(source=label, key=dotted, value=shown, rule=rule, fix=f"set {held} itself"))
            return
        inside = inside[key]
    inside[keys[-1]] = value
