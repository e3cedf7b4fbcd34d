"""The torchrun entry: ``torchrun --nproc-per-node=2 -m launch.torchrun CONFIG`` runs a config in a fixed group."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click

from launch import options
from launch.bundled import find_config
from launch.jobs import quiet_libraries
from launch.live import say, show_plain
from launch.progress import Progress
from launch.ray_cluster import add_working_directory
from launch.run_command import EXIT_FAILED, EXIT_REFUSED, run_dir_override, summary
from launch.sources import FolderRows
from launch.spawn import OTHERS, OURS, said_line
from orchestrator.config import RunConfig, load_config
from orchestrator.errors import ConfigError, GroundswellError, SessionError
from orchestrator.runtime import folder

_LAUNCHED_BY = "launched.by"
_LOST_PEER = re.compile(r"Connection (closed|reset) by|Broken pipe|remote process exited")  # as gloo and NCCL say it


@click.command()
@click.argument("config")
@options.overrides
@options.no_plugins
@click.option("--run-dir", metavar="DIR", help="Keep the run in DIR/<run.name> instead of under run.dir.")
@click.option("--resume", is_flag=True, help="Go on with a run that exists.")
@click.option("--for-process", type=int, hidden=True, help="Say nothing, and stop when that process is gone.")
def main(
    config: str,
    overrides: tuple[str, ...],
    no_plugins: bool,
    run_dir: str | None,
    resume: bool,
    for_process: int | None,
) -> None:
    """Train CONFIG in the processes that torchrun started."""
    if "RANK" not in os.environ:
        raise click.UsageError(
            "torchrun starts this: torchrun --nproc-per-node=2 -m launch.torchrun CONFIG; "
            "or let groundswell run CONFIG --runtime torchrun do it"
        )
    rank = int(os.environ["RANK"])
    add_working_directory()
    quiet_libraries()
    try:
        settings = load_config(find_config(config), [*overrides, *run_dir_override(run_dir)], plugins=not no_plugins)
        _train(settings, rank=rank, resume=resume, for_process=for_process)
    except ConfigError as error:
        if rank == 0:  # all ranks read the same
            _report(rank, OURS, str(error))
        sys.exit(EXIT_REFUSED)
    except GroundswellError as error:
        _report(rank, OURS, str(error))
        sys.exit(EXIT_FAILED)
    except Exception as error:
        lost = _LOST_PEER.search(str(error)) is not None
        _report(rank, OTHERS, f"lost another worker: {error}" if lost else traceback.format_exc())
        sys.exit(EXIT_FAILED)


def _train(settings: RunConfig, *, rank: int, resume: bool, for_process: int | None) -> None:
    import torch
    import torch.distributed as dist

    from orchestrator.runtime.history import prepare, run_folder
    from orchestrator.runtime.worker import local_worker
    from orchestrator.train import train

    path = run_folder(settings)
    device = _device(torch.cuda.device_count())
    if rank == 0:
        _prepare_once(settings, path, prepare, resume=resume)
    if device is not None:
        torch.cuda.set_device(device)
    _join("gloo" if device is None else "nccl")
    # Not sooner: until all have met there is nothing to save, and waiting for the others would only be drawn out.
    signal.signal(signal.SIGTERM, lambda *_: _stop_or_end(path))
    over = threading.Event()
    watch = _watch(path, over=over, for_process=for_process) if rank == 0 else None
    try:
        train(settings, replace(local_worker(settings), folder_ready=True), resume=resume)
    finally:
        over.set()
        if watch is not None:
            watch.join()
    # Only after success: a group that lost a member may never end. DDP's cycles keep the group, and a thread of it that
    # still runs while Python ends brings the process down (seen with torch 2.13: terminate called without an active
    # exception), so they go first.
    gc.collect()
    dist.destroy_process_group()


def _join(backend: str) -> None:
    """Form the process group.

    On one machine with a store of our own making: torchrun keeps one store for all restarts, in which a worker that
    was started again may find the address of one that is dead (seen with torch 2.13: connection refused). The
    restart count tells them apart, but only within one agent: those of several machines count for themselves.
    """
    import torch.distributed as dist

    env = os.environ
    if env.get("GROUP_WORLD_SIZE") != "1" or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    kept = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]  # C++
    store = dist.PrefixStore(f"groundswell/{env['TORCHELASTIC_RESTART_COUNT']}", kept)  # type: ignore[attr-defined]  # C++
    dist.init_process_group(backend, store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))


def _device(num_gpus: int) -> int | None:
    """The GPU of this process, or ``None`` for the CPU."""
    here, local = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if 0 < num_gpus < here:
        raise SessionError(
            f"{here} processes on a machine with {num_gpus} GPUs: a GPU serves one process; start at most {num_gpus} "
            "(workers.initial, or --nproc-per-node), or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    return local if num_gpus else None


def _prepare_once(settings: RunConfig, path: Path, prepare: Callable[..., Path], *, resume: bool) -> None:
    """Make the folder, but when the same torchrun agent starts its workers again, go on with the run.

    Torchrun's restart count does not tell: it stays the same when a worker joins.
    """
    agent = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {os.getppid()}"
    note = path / _LAUNCHED_BY
    again = note.exists() and note.read_text() == agent
    prepare(settings, resume=resume or again)
    note.write_text(agent)


def _stop_or_end(path: Path) -> None:
    """Whoever ends us gives notice with SIGTERM: the file reaches rank zero, which stops all ranks together.

    Who has been asked already ends now.
    """
    request = path / folder.STOP_REQUEST
    if request.exists() and time.time() - request.stat().st_mtime > 0.5:  # younger: another rank's, of the same notice
        os._exit(128 + signal.SIGTERM)
    with suppress(OSError):
        request.touch()


def _watch(path: Path, *, over: threading.Event, for_process: int | None) -> threading.Thread:
    """Show the run in plain lines, or, when another process does, stop once that is gone."""

    def lines() -> None:
        progress = Progress(FolderRows(path))
        show_plain(progress, going=lambda: not over.is_set())
        ended = None if progress.ended is None else progress.ended["kind"]
        if ended == "finished":
            say(summary(path, took_s=progress.running_s))
        elif ended == "stopped":
            say(f"Stopped and saved in {path}; the same command with --resume goes on.")

    def guard() -> None:
        while not over.wait(1.0):
            if for_process is not None and not _lives(for_process):
                (path / folder.STOP_REQUEST).touch()
                return

    thread = threading.Thread(target=lines if for_process is None else guard, name="watch", daemon=True)
    thread.start()
    return thread


def _report(rank: int, mark: str, text: str) -> None:
    say("\n".join(said_line(rank, mark, line) for line in text.strip().splitlines()), error=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    main()
