"""``groundswell plot``: one picture that explains a run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from orchestrator.errors import GroundswellError


@click.command("plot", short_help="Draw a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "output", type=click.Path(path_type=Path), help="An .svg or .png file (RUN/picture.svg).")
def plot_command(run: Path, output: Path | None) -> None:
    """Draw the run in the folder RUN: batch and noise scale, workers, learning rate, loss and held-out metric."""
    from orchestrator.report import picture, story

    path = run / "picture.svg" if output is None else output
    if path.suffix.lower() not in picture.FORMATS:
        raise click.BadParameter(f"the file must end in {' or '.join(picture.FORMATS)}, got {path}", param_hint="-o")
    try:
        picture.save(story.read(run), path)
    except GroundswellError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        click.echo("drawing needs matplotlib: pip install 'groundswell[plots]'", err=True)
        sys.exit(2)
    click.echo(str(path))
