"""``groundswell checkpoints``: which checkpoints has a run, are they whole, and its weights as a file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from orchestrator.errors import CheckpointError, GroundswellError
from orchestrator.runtime.checkpoint_files import choose, found_within, read_manifest, read_meta, verify

_RUN = click.argument("run", type=click.Path(path_type=Path))
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@click.group("checkpoints", short_help="List, verify or export checkpoints.")
def checkpoints_group() -> None:
    """Look into the checkpoints of a run; nothing is changed."""


def _refusing(command: Callable[..., int]) -> Callable[..., None]:
    """Turn what is refused into exit code 2."""

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        try:
            code = command(**arguments)
        except GroundswellError as error:
            click.echo(str(error), err=True)
            code = 2
        sys.exit(code)

    return wrapped


@checkpoints_group.command("ls")
@_RUN
@click.option("--verify", "hashed", is_flag=True, help="Compare checksums too, which reads every byte.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
@_refusing
def list_command(run: Path, hashed: bool, as_json: bool) -> int:
    """List the checkpoints of RUN, the newest first.

    RUN is a run's folder, or that of one checkpoint. A checkpoint whose files do not have the sizes that were written
    is torn; that the others are good is known with --verify.
    """
    rows = [_described(step, path, hashed=hashed) for step, path in _checkpoints(run)]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "samples", "written", "size", "workers"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state")
    for row in rows:
        table.add_row(
            str(row["step"]),
            "" if row["samples_seen"] is None else f"{row['samples_seen']:,}",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["written"])),
            "" if row["bytes"] is None else _size(row["bytes"]),
            "" if row["world_size"] is None else str(row["world_size"]),
            row["state"] if row["why"] is None else f"torn: {row['why']}",
        )
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a line each, however long a reason is
        console = Console(highlight=False, markup=False, width=10_000)
    console.print(table)
    return 0


@checkpoints_group.command("verify")
@_RUN
@_refusing
def verify_command(run: Path) -> int:
    """Compare all files of the checkpoints of RUN with their checksums; exit code 1 where one is torn."""
    bad = 0
    for _, path in _checkpoints(run):
        why = verify(path)
        bad += why is not None
        click.echo(f"{path.name}: {'good' if why is None else f'torn: {why}'}")
    return int(bad > 0)


@checkpoints_group.command("export")
@_RUN
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="The checkpoint of this step; the newest whole.")
@click.option(
    "--to",
    "file",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A .pt or .safetensors file.",
)
@click.option("--ema", is_flag=True, help="The averaged weights of train.ema_half_life_samples.")
@_refusing
def export_command(run: Path, step: int | None, file: Path, ema: bool) -> int:
    """Write the model's weights in a checkpoint of RUN to FILE, as a plain state_dict.

    \b
    .pt           read it with torch.load(FILE, weights_only=True)
    .safetensors  read it with safetensors.torch.load_file(FILE)
    """
    if file.suffix not in (".pt", ".safetensors"):
        raise click.BadParameter(f"the file must end in .pt or .safetensors, got {file}", param_hint="--to")
    candidates = _checkpoints(run)
    if step is not None:
        known = ", ".join(str(number) for number, _ in candidates)
        candidates = [(number, path) for number, path in candidates if number == step]
        if not candidates:
            raise CheckpointError(f"{run} has no checkpoint of step {step}: there are those of step {known}")
    chosen, faults = choose(candidates)
    for fault in faults:
        click.echo(f"passed over {fault.path}: {fault.why}", err=True)
    if chosen is None:
        raise CheckpointError(f"no checkpoint of {run} that was asked for is whole; groundswell checkpoints ls {run}")
    from orchestrator.runtime.export import export_weights

    try:
        count = export_weights(chosen, file, averaged=ema)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "safetensors":
            raise
        click.echo("this needs safetensors: pip install 'groundswell[safetensors]', or export to a .pt file", err=True)
        return 2
    click.echo(f"{file}: {count} tensors of {chosen}")
    return 0


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    found = found_within(run)
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint: name a run's folder, such as runs/digits")
    return found


def _described(step: int, path: Path, *, hashed: bool) -> dict[str, Any]:
    """A row of ``ls``; ``None`` for what a torn checkpoint does not say."""
    why = verify(path, checksums=hashed)
    size, meta = None, {}
    try:
        size = sum(number for number, _ in read_manifest(path).values())
        meta = read_meta(path)
    except (OSError, ValueError, TypeError):
        why = why or "its metadata cannot be read"
    return {
        "step": step,
        "samples_seen": meta.get("samples_seen"),
        "written": path.stat().st_mtime,
        "bytes": size,
        "world_size": meta.get("world_size"),
        "state": "torn" if why is not None else "good" if hashed else "whole",
        "why": why,
        "path": str(path),
    }


def _size(number: float) -> str:
    unit = 0
    while number >= 1024 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.0f} B" if unit == 0 else f"{number:.1f} {_UNITS[unit]}"
