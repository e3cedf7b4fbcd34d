"""Which names in a config are code of the user's, and how are they refused where none may run?"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import AfterValidator

from orchestrator.config.run_config import RunConfig
from orchestrator.config.section import NameOf
from orchestrator.config.yaml_reader import Source

KEYS: tuple[tuple[str, str], ...] = tuple(
    (section, key)
    for section, about in RunConfig.model_fields.items()
    for key, field in getattr(about.annotation, "model_fields", {}).items()
    if any(isinstance(mark, AfterValidator) and isinstance(mark.func, NameOf) for mark in field.metadata)
)


def plugins(config: RunConfig) -> Iterator[tuple[tuple[str, str], str]]:
    """``((section, key), "module:attribute")`` of each."""
    for section, key in KEYS:
        name = getattr(getattr(config, section), key)
        if ":" in name:
            yield (section, key), name


def refuse_plugins(config: RunConfig, source: Source) -> None:
    """Add a problem to ``source`` for each."""
    for path, name in plugins(config):
        rule = "names code to import, and --no-plugins lets a config run none but what is built in"
        source.add_problem([path], name, rule, "name a built-in one, or leave --no-plugins out if you trust the config")
