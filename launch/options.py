"""Options that several commands share, worded once."""

from __future__ import annotations

import json

import click

overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one key, such as optimizer.lr=0.1; may be given again.",
)
no_plugins = click.option(
    "--no-plugins",
    is_flag=True,
    help="Refuse a config that names code of its own (module:attribute), for configs that you did not write.",
)
allow_unauthenticated = click.option(
    "--allow-unauthenticated", is_flag=True, help="Also use a head on another machine that asks for no token."
)


def run_dir_override(run_dir: str | None) -> list[str]:
    """``--run-dir`` as an override of the config; quoted, so that YAML reads any path as text."""
    return [] if run_dir is None else [f"run.dir={json.dumps(run_dir, ensure_ascii=False)}"]
