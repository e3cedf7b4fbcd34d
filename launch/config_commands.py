"""``groundswell config``: look at a config without starting anything; needs neither torch nor ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from launch import options
from launch.bundled import describe, list_configs, read_config
from orchestrator.config import RunConfig, to_yaml
from orchestrator.errors import ConfigError


@click.group(name="config", short_help="Check, print or list configs.")
def config_group() -> None:
    """Check, print or list configs; nothing is started."""


def _config_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("name_or_path", metavar="CONFIG")(options.overrides(options.no_plugins(command)))


@config_group.command()
@_config_arguments
def validate(name_or_path: str, overrides: tuple[str, ...], no_plugins: bool) -> None:
    """Check CONFIG, a file or the name of a bundled config, and say in a line what it would do."""
    run = _read_or_exit(name_or_path, overrides, plugins=not no_plugins)
    length = f"{run.train.samples} samples" if run.train.samples is not None else f"{run.train.epochs} epochs"
    batch = f"batch {run.batch.initial} to {run.batch.max}"
    if run.controller.mode == "advise":
        batch = f"batch {run.batch.initial} (advise only)"
    elif run.batch.max == run.batch.initial or run.controller.policy == "fixed":
        batch = f"batch {run.batch.initial}"
    click.echo(f"OK {run.run.name}: task {run.task.name}, {length}, {batch}")


@config_group.command()
@_config_arguments
@click.option("--comments/--no-comments", default=True, help="With or without what each key means.")
def show(name_or_path: str, overrides: tuple[str, ...], no_plugins: bool, comments: bool) -> None:
    """Print CONFIG as a run would see it: every key with its value, its unit and its meaning."""
    click.echo(to_yaml(_read_or_exit(name_or_path, overrides, plugins=not no_plugins), comments=comments), nl=False)


@config_group.command(name="list")
def list_bundled() -> None:
    """Name the bundled configs."""
    configs = list_configs()
    width = max((len(path.stem) for path in configs), default=0)
    for path in configs:
        click.echo(f"{path.stem:<{width}}  {describe(path)}".rstrip())


def _read_or_exit(name_or_path: str, overrides: tuple[str, ...], *, plugins: bool) -> RunConfig:
    """The config, or its problems on stderr and exit code 2."""
    try:
        return read_config(name_or_path, overrides, plugins=plugins)
    except ConfigError as error:
        click.echo(str(error), err=True)
        raise click.exceptions.Exit(2) from error
