"""The torchrun entry: ``torchrun --nproc-per-node=2 -m launch.torchrun CONFIG`` runs a config in a process group.

The group is fixed while this process lives. Where nodes may come and go (``groundswell torchrun``), the agents end it
and begin another at each change, which goes on from what this one saved.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from launch import options
from launch.bundled import read_config
from launch.jobs import quiet_libraries
from launch.launched import Group, belongs_to, goes_on, write_note
from launch.live import say, show_plain
from launch.notice import Notice
from launch.outcome import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, planned_end, summary
from launch.process_group import join, own_gpu
from launch.progress import Progress
from launch.ray_cluster import add_working_directory
from launch.sources import FolderRows
from launch.spawn import OTHERS, OURS, said_line
from orchestrator.config import RunConfig, to_yaml
from orchestrator.errors import ConfigError, GroundswellError, RunFolderError, SessionError
from orchestrator.runtime import folder
from orchestrator.runtime.preparation import claimed, run_folder, write_config
from orchestrator.runtime.tracking import check_libraries

_LOCK_PATIENCE_S = 120.0  # NFS keeps the lock of a node that crashed for 90 s
_OWN_NOTICE_PATIENCE_S = 3.0  # where nodes come, each agent sees it within some tenths of a second
_LOST_PEER = re.compile(r"Connection (closed|reset) by|Broken pipe|remote process exited")  # as gloo and NCCL say it


@click.command()
@click.argument("config")
@options.overrides
@options.no_plugins
@click.option("--run-dir", metavar="DIR", help="Keep the run in DIR/<run.name> instead of under run.dir.")
@click.option("--resume", is_flag=True, help="Go on with a run that exists.")
@click.option("--auto-resume", is_flag=True, help="Go on with the run if it exists, else begin it.")
@click.option("--elastic", is_flag=True, hidden=True, help="A stop may be that a node comes or goes.")
@click.option("--refusal", type=click.Path(path_type=Path), hidden=True, help="Write there why none may begin; exit 0.")
@click.option("--for-process", type=int, hidden=True, help="Say nothing, and stop when that process is gone.")
def main(
    config: str,
    overrides: tuple[str, ...],
    no_plugins: bool,
    run_dir: str | None,
    resume: bool,
    auto_resume: bool,
    elastic: bool,
    for_process: int | None,
    refusal: Path | None,
) -> None:
    """Train CONFIG in the processes that torchrun started."""
    if "RANK" not in os.environ:
        raise click.UsageError(
            "torchrun starts this: torchrun --nproc-per-node=2 -m launch.torchrun CONFIG; "
            "or let groundswell run CONFIG --runtime torchrun, or groundswell torchrun CONFIG, do it"
        )
    rank = int(os.environ["RANK"])
    add_working_directory()
    quiet_libraries()
    try:
        settings = read_config(config, overrides, run_dir=run_dir, plugins=not no_plugins)
        code = _train(
            settings,
            rank=rank,
            resume=resume,
            auto_resume=auto_resume,
            elastic=elastic,
            for_process=for_process,
            refusal=refusal,
        )
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
    sys.exit(code)


def _train(
    settings: RunConfig,
    *,
    rank: int,
    resume: bool,
    auto_resume: bool,
    elastic: bool,
    for_process: int | None,
    refusal: Path | None,
) -> int:
    """Train in the group that torchrun formed; the exit code is for the agent, which begins again at any but 0."""
    import torch
    import torch.distributed as dist

    from orchestrator.runtime.worker import local_worker
    from orchestrator.train import train

    if refusal is not None:
        refusal.unlink(missing_ok=True)  # of a group before this one
    path = run_folder(settings)
    device = own_gpu(torch.cuda.device_count())
    group: Group | None = None
    refused: str | None = None
    if rank == 0:
        try:
            group = _prepare(settings, path, resume=resume, auto_resume=auto_resume, patient=for_process is None)
        except GroundswellError as error:  # shared, so that all end alike, and no agent tries again
            refused = str(error)
    if device is not None:
        torch.cuda.set_device(device)
    join("gloo" if device is None else "nccl")
    worker = replace(local_worker(settings), folder_ready=True, own_process=True)
    group, first_config, refused = worker.collective.share((group, to_yaml(settings), refused))
    if group is None:
        del worker
        dist.destroy_process_group()
        return _refuse(str(refused), rank=rank, refusal=refusal)
    if first_config != to_yaml(settings):
        raise SessionError(
            f"rank {rank} on {os.uname().nodename} reads another config than rank 0: give every node the same file and "
            "the same --set and --run-dir"
        )
    # Not sooner: until all have met there is nothing to save, and waiting for the others would only be drawn out.
    notice = Notice(path, is_current=partial(group.is_current, path))
    notice.listen()
    over = threading.Event()
    progress = Progress(FolderRows(path))
    watch = _watch(path, progress, over=over, for_process=for_process) if rank == 0 else None
    finished = False
    try:
        finished = train(settings, worker, resume=resume)
    except RunFolderError as error:  # raised on all ranks, before the first step
        refused = str(error)
    finally:
        notice.training_is_over()
        over.set()
        if watch is not None:
            watch.join()
    noticed = not finished and refused is None and worker.collective.sum([float(notice.given)])[0] > 0
    if rank == 0 and for_process is None and refused is None:
        _say_how_it_ended(path, progress, pauses=noticed and elastic)
    # Only after success: a group that lost a member may never end. DDP's cycles keep the group, and a thread of it that
    # still runs while Python ends brings the process down (seen with torch 2.13: terminate called without an active
    # exception), so they go first.
    del worker
    gc.collect()
    dist.destroy_process_group()
    if refused is not None:
        return _refuse(refused, rank=rank, refusal=refusal)
    if not noticed or os.environ.get("GROUP_WORLD_SIZE") == "1" or notice.wait(_OWN_NOTICE_PATIENCE_S):
        return 0
    # Another node leaves, and its agent ends. Ours takes an exit with 0 for the run's end; at any other it meets with
    # the agents that are left.
    return EXIT_STOPPED


def _prepare(settings: RunConfig, path: Path, *, resume: bool, auto_resume: bool, patient: bool) -> Group:
    """Rank zero: make the run's folder, or check the one to go on with, and note whose group trains there."""
    from orchestrator.runtime.at_url import bring_lines

    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if launch == "none":  # what torchrun calls every launch that was given no id
        launch += f" {os.getppid()}"
    check_libraries(settings)
    bring_lines(settings)
    ours = belongs_to(path, launch)
    resume = goes_on(path, launch=launch, resume=resume, auto_resume=auto_resume)
    # The rank zero before this one may be on another node, and still be dying.
    patience_s = _LOCK_PATIENCE_S if patient and (resume or ours) else folder.PATIENCE_S
    if not ours and folder.is_written(path):
        say(f"{path} is being written by another process: waiting up to {patience_s:g} s for it to end")
    with claimed(settings, patience_s=patience_s):
        goes_on(path, launch=launch, resume=resume, auto_resume=auto_resume)  # a run may have begun meanwhile
        write_config(settings, path)
        return write_note(path, launch=launch)


def _refuse(why: str, *, rank: int, refusal: Path | None) -> int:
    """Say on every node why none begins; an agent that reads it there is told to leave it at that."""
    if refusal is None:
        if rank == 0:
            _report(rank, OURS, why)
        return EXIT_REFUSED
    if os.environ["LOCAL_RANK"] == "0":
        refusal.write_text(why, encoding="utf-8")
    return 0


def _watch(path: Path, progress: Progress, *, over: threading.Event, for_process: int | None) -> threading.Thread:
    """Show the run in plain lines, or, when another process does, stop once that is gone."""

    def lines() -> None:
        show_plain(progress, going=lambda: not over.is_set())

    def guard() -> None:
        while not over.wait(1.0):
            if for_process is not None and not _lives(for_process):
                (path / folder.STOP_REQUEST).touch()
                return

    thread = threading.Thread(target=lines if for_process is None else guard, name="watch", daemon=True)
    thread.start()
    return thread


def _say_how_it_ended(path: Path, progress: Progress, *, pauses: bool) -> None:
    ended = None if progress.ended is None else progress.ended["kind"]
    if ended == "finished":
        say(summary(path, took_s=progress.running_s))
    elif ended == "stopped" and (planned := planned_end(path)) is not None:
        say(f"{planned}\n{summary(path)}")
    elif ended == "stopped" and pauses:
        say("Saved: a node comes or goes; those that stay go on from here.")
    elif ended == "stopped":
        say(f"Stopped and saved in {path}; the same command with --resume goes on.")


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
