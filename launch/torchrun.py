"""The torchrun entry: ``torchrun --nproc-per-node=2 -m launch.torchrun CONFIG`` runs a config in a fixed group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from launch.bundled import find_config
from launch.ray_cluster import add_working_directory
from orchestrator.config import RunConfig
from orchestrator.config_file import load_config, to_yaml
from orchestrator.errors import GroundswellError, SessionError

_LAUNCHED_BY = "launched.by"


@click.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key: section.key=value.")
@click.option("--resume", is_flag=True, help="Go on with a run that exists.")
def main(config: str, overrides: tuple[str, ...], resume: bool) -> None:
    """Train CONFIG in the processes that torchrun started."""
    try:
        settings = load_config(find_config(config), list(overrides))
        _train(settings, resume=resume)
    except GroundswellError as error:
        click.echo(f"rank {os.environ['RANK']}: {error}", err=True)
        sys.exit(1)


def _train(settings: RunConfig, *, resume: bool) -> None:
    import torch
    import torch.distributed as dist

    from orchestrator.runtime import folder
    from orchestrator.runtime.history import prepare, run_folder
    from orchestrator.runtime.worker import local_worker
    from orchestrator.train import train

    add_working_directory()
    path = run_folder(settings)
    if os.environ["RANK"] == "0":
        _prepare_once(settings, path, prepare, resume=resume)
    # Whoever ends us gives notice with SIGTERM; the file reaches rank zero, which stops all ranks together.
    signal.signal(signal.SIGTERM, lambda *_: (path / folder.STOP_REQUEST).touch())
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        train(settings, replace(local_worker(settings), folder_ready=True), resume=resume)
    finally:
        dist.destroy_process_group()


def _prepare_once(settings: RunConfig, path: Path, prepare: Callable[..., Path], *, resume: bool) -> None:
    """Make the folder, but when the same torchrun agent starts its workers again, go on with the run.

    Torchrun's restart count does not tell: it stays the same when a worker joins.
    """
    agent = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {os.getppid()}"
    note = path / _LAUNCHED_BY
    again = note.exists() and note.read_text() == agent
    prepare(settings, resume=resume or again)
    note.write_text(agent)


def spawn(config: RunConfig, *, resume: bool, on_start: Callable[[Callable[[], None]], None]) -> None:
    """Run ``workers.initial`` processes of this entry on this machine, in a process group of their own.

    ``on_start`` is given a function that ends them. Raises ``SessionError`` with the last of what they said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={config.workers.initial}", "-m", "launch.torchrun"]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as said:
        path = Path(scratch) / f"{config.run.name}.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        command += [str(path), *(["--resume"] if resume else [])]
        # A session of its own: Ctrl-C is for the parent, which lets the workers finish their step.
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        on_start(lambda: os.killpg(process.pid, signal.SIGTERM))
        code = process.wait()
        if code != 0:
            said.seek(0)
            lines = [line.rstrip() for line in said if line.strip()]
            own = [line for line in lines if line.startswith("rank ")]
            raise SessionError(f"torchrun ended with exit code {code}: " + "\n".join(own or lines[-15:]))


if __name__ == "__main__":
    main()
