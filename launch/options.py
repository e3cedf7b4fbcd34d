"""Options that several commands share, worded once."""

from __future__ import annotations

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
