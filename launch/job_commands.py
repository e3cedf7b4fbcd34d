"""``groundswell status``, ``logs``, ``stop`` and ``list``: the runs that were submitted to a Ray cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from launch import options
from launch.live import batch_text, duration, noise_text, number, say
from launch.outcome import EXIT_FAILED, EXIT_REFUSED
from launch.progress import Progress, counted
from launch.submit_command import ADDRESS
from orchestrator.errors import GroundswellError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from launch.ray_jobs.jobs import RunJob

_LOOK_EVERY_S = 0.5
_BEYOND_PATIENCE_S = 20.0  # for Ray to notice and to write down that a job has ended


def _on_a_cluster(command: Callable[..., int]) -> Callable[..., None]:
    """Give a command Ray's client of the head, and turn what is refused into exit code 2."""

    @ADDRESS
    @options.allow_unauthenticated
    @wraps(command)
    def wrapped(*, address: str | None, allow_unauthenticated: bool, **rest: Any) -> None:
        from launch.ray_jobs.head import answering, connect, head_address

        try:
            client = connect(head_address(address), allow_unauthenticated=allow_unauthenticated)
            with answering(client):
                code = command(client, **rest)
        except GroundswellError as error:
            say(str(error), error=True)
            code = EXIT_REFUSED
        sys.exit(code)

    return wrapped


@click.command("status", short_help="Say where a submitted run is.")
@click.argument("run")
@_on_a_cluster
def status_command(client: JobSubmissionClient, *, run: str) -> int:
    """Say where RUN is, the name of a run or of a submission: its state, and its newest numbers."""
    from launch.ray_jobs.follow import UnreadableLogError, newest
    from launch.ray_jobs.jobs import find

    job = find(client, run)
    since = "for" if job.goes_on else "after"
    say(f"{job.run}: {job.state} {since} {duration(_took_s(job))} as {job.submission_id}")
    try:
        progress = newest(client, job)
        if progress is None or progress.now is None:
            say("  no step was taken yet" if job.goes_on else "  no step was taken")
        else:
            for line in _numbers(progress, speed=job.goes_on):
                say(f"  {line}")
            if progress.ended is not None and progress.ended["kind"] == "stopped":
                say(f"  stopped: {progress.ended['reason']}")
    except UnreadableLogError as error:
        say(f"  {error}")
    say(f"  folder {job.folder}; config {job.config_sha256[:12]}, revision {job.revision[:12]}{_dirty(job)}")
    return 0


@click.command("logs", short_help="Show what a submitted run says.")
@click.argument("run")
@click.option("--follow", "follow_it", is_flag=True, help="Go on until the run ends; Ctrl-C leaves it running.")
@click.option("--raw", is_flag=True, help="Print the job's log as it is.")
@_on_a_cluster
def logs_command(client: JobSubmissionClient, *, run: str, follow_it: bool, raw: bool) -> int:
    """Print what RUN has said since it was submitted last, or what the submission of that name has said.

    With --follow the exit code is the job's: 0 finished, 130 stopped, 1 failed; 3 left running by Ctrl-C.
    """
    from launch.ray_jobs.follow import follow, show_log
    from launch.ray_jobs.jobs import find

    if follow_it and raw:
        raise click.UsageError("--raw prints what there is, and --follow shows what comes: give one of them")
    job = find(client, run)
    if follow_it:
        return follow(client, job)
    show_log(client, job, raw=raw)
    return 0


@click.command("stop", short_help="Save and stop a submitted run.")
@click.argument("run")
@_on_a_cluster
def stop_command(client: JobSubmissionClient, *, run: str) -> int:
    """Stop RUN after the step at hand, with a checkpoint; submitting it again goes on from there."""
    from launch.ray_jobs.follow import UnreadableLogError, newest
    from launch.ray_jobs.jobs import find, refresh

    job = find(client, run)
    if not job.goes_on:
        say(f"{job.run} does not run: {job.submission_id} is {job.state}")
        return 0
    client.stop_job(job.submission_id)
    say(f"asked {job.submission_id} to save and stop; it has {counted(job.stop_patience_s, 'second')} ...")
    until_s = time.monotonic() + job.stop_patience_s + _BEYOND_PATIENCE_S
    while job.goes_on and time.monotonic() < until_s:
        time.sleep(_LOOK_EVERY_S)
        job = refresh(client, job)
    if job.goes_on:
        say(f"{job.submission_id} is still {job.state}; groundswell logs {job.run} shows what it does", error=True)
        return EXIT_FAILED
    try:
        progress = newest(client, job)
    except UnreadableLogError as error:
        say(f"{job.run} is {job.state}, and whether it saved is not known: {error}", error=True)
        return EXIT_FAILED
    if progress is None:
        say(f"{job.run} stopped before it had begun")
    elif progress.saved_samples is not None:  # the run says no end where it is stopped in the middle of a resize
        how = "stopped" if progress.ended is None else progress.ended["kind"]
        say(f"{job.run} {how} at {progress.saved_samples:,} samples, saved in {job.folder}")
    else:
        say(
            f"{job.run} was ended before it could save; the steps since its last checkpoint will be taken again. "
            "Submit it with a longer --stop-patience",
            error=True,
        )
        return EXIT_FAILED
    return 0


@click.command("list", short_help="List the runs that were submitted.")
@_on_a_cluster
def list_command(client: JobSubmissionClient) -> int:
    """List the runs that were submitted to a cluster, the newest first."""
    from rich.console import Console
    from rich.table import Table

    from launch.ray_jobs.jobs import all_jobs

    jobs = all_jobs(client)
    if not jobs:
        say(f"No run was submitted to {client.get_address()}.")
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in ("RUN", "STATE", "SUBMISSION", "SINCE", "TOOK", "REVISION", "FOLDER"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for job in jobs:
        began = "" if job.began_s is None else f"{datetime.fromtimestamp(job.began_s):%Y-%m-%d %H:%M}"
        revision = f"{job.revision[:7]}{'+' if _dirty(job) else ''}"
        took = duration(_took_s(job))
        table.add_row(job.run, job.state, job.submission_id, began, took, revision, job.folder)
    console = Console()
    # Into a file or another program goes everything.
    (console if console.is_terminal else Console(width=1000)).print(table)
    return 0


def _numbers(progress: Progress, *, speed: bool) -> list[str]:
    row, total = progress.now, progress.total_samples
    assert row is not None, "asked of a run that took a step"
    of = "" if total is None else f" of {total:,} ({row['samples_seen'] / total:.0%})"
    rate = f", {number(progress.samples_per_s)} samples/s" if speed else ""
    return [
        f"{row['samples_seen']:,}{of} samples seen, loss {row['loss']:.4f}{rate}",
        f"noise scale {noise_text(row)}, batch {batch_text(row)}, {counted(row['world_size'], 'worker')}",
    ]


def _took_s(job: RunJob) -> float | None:
    if job.began_s is None:
        return None
    return (time.time() if job.ended_s is None else job.ended_s) - job.began_s


def _dirty(job: RunJob) -> str:
    return " with changes" if job.revision.endswith("-dirty") else ""
