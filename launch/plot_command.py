"""``groundswell plot``: one picture that explains a run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from launch.remote_runs import at_hand
from orchestrator.config.places import is_url
from orchestrator.errors import GroundswellError


@click.command("plot", short_help="Draw a run.")
@click.argument("run")
@click.option("-o", "output", type=click.Path(path_type=Path), help="An .svg or .png file (RUN/picture.svg).")
def plot_command(run: str, output: Path | None) -> None:
    """Draw the run RUN: batch and noise scale, workers, learning rate, loss and held-out metric.

    RUN is a folder, or a URL, whose picture is put into the current folder.
    """
    from orchestrator.report import picture, story

    own = Path(f"{run.rstrip('/').rpartition('/')[2]}.svg") if is_url(run) else Path(run) / "picture.svg"
    path = own if output is None else output
    if path.suffix.lower() not in picture.FORMATS:
        raise click.BadParameter(f"the file must end in {' or '.join(picture.FORMATS)}, got {path}", param_hint="-o")
    try:
        with at_hand(run) as folder:
            picture.save(story.read(folder), path)
    except GroundswellError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        click.echo("drawing needs matplotlib: pip install 'groundswell[plots]'", err=True)
        sys.exit(2)
    click.echo(str(path))
