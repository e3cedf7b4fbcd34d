"""The configs that come with the project, found alike in a checkout and in an installed wheel.

In a checkout they are ``configs/`` beside this package; the wheel holds the same files as ``launch/_configs``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from orchestrator.config import RunConfig, load_config
from orchestrator.errors import ConfigError, Problem

_SUFFIXES = (".yaml", ".yml")


def find_config(name_or_path: str | Path) -> Path:
    """The file meant by a path, or by the name of a bundled config.

    Whatever has a suffix ``.yaml`` or ``.yml``, or names a folder, is a path. Raises ``ConfigError`` when there is
    no such file, naming the nearest bundled config.
    """
    text = str(name_or_path)
    path = Path(text)
    bundled = {config.stem: config for config in list_configs()}
    if path.name == text and path.suffix not in _SUFFIXES:
        if text in bundled:
            return bundled[text]
        if path.is_file():
            return path
        rule = f"is neither a bundled config ({', '.join(bundled)}) nor a file in this folder"
    elif path.is_file():
        return path
    elif path.is_dir():
        rule = "is a folder, not a config file"
    else:
        rule = "there is no such file"
    raise ConfigError(Problem(source=text, rule=rule, fix=_suggestion(path, list(bundled))))


def read_config(
    name_or_path: str, overrides: Sequence[str] = (), *, run_dir: str | None = None, plugins: bool = True
) -> RunConfig:
    """The checked config that a command was given, with what its options override. Raises ``ConfigError``."""
    # Quoted, so that YAML reads any path as text.
    where = [] if run_dir is None else [f"run.dir={json.dumps(run_dir, ensure_ascii=False)}"]
    return load_config(find_config(name_or_path), [*overrides, *where], plugins=plugins)


def list_configs() -> tuple[Path, ...]:
    """The bundled configs, in the order of their names."""
    return tuple(sorted(path for path in _folder().glob("*.yaml") if path.is_file()))


def describe(config: Path) -> str:
    """What a config says of itself: the comment on its first line, or nothing."""
    with config.open(encoding="utf-8") as lines:
        first = lines.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""


def _folder() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _suggestion(path: Path, names: list[str]) -> str:
    near = [str(path.with_suffix(suffix)) for suffix in _SUFFIXES if path.with_suffix(suffix).is_file()]
    near += difflib.get_close_matches(path.stem, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "groundswell config list names the bundled ones"
