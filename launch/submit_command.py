"""``groundswell submit``: check a config, send it with the working directory to a Ray cluster, and start it there."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch import options
from launch.bundled import read_config
from launch.live import say
from launch.outcome import EXIT_REFUSED
from orchestrator.config import RunConfig
from orchestrator.config.places import is_url
from orchestrator.errors import ConfigError, GroundswellError, Problem

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from launch.ray_jobs.jobs import RunJob

_BEGIN_PATIENCE_S = 20.0
_LOOK_EVERY_S = 0.5

ADDRESS = click.option(
    "--address",
    metavar="URL",
    help="The head's, such as http://head:8265; else what RAY_API_SERVER_ADDRESS or RAY_ADDRESS names by http, else "
    "http://127.0.0.1:8265.",
)


@click.command("submit", short_help="Train as a job of a Ray cluster.")
@click.argument("config")
@options.overrides
@options.no_plugins
@click.option("--run-dir", metavar="DIR", help="Keep the run in DIR/<run.name>, on storage that all nodes share.")
@ADDRESS
@click.option("--follow", is_flag=True, help="Show the run until it ends; Ctrl-C leaves it running.")
@click.option(
    "--stop-patience",
    "stop_patience_s",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="How long a stop waits for the checkpoint before the job is killed.",
)
@options.allow_unauthenticated
def submit_command(
    config: str,
    overrides: tuple[str, ...],
    no_plugins: bool,
    run_dir: str | None,
    address: str | None,
    follow: bool,
    stop_patience_s: int,
    allow_unauthenticated: bool,
) -> None:
    """Train CONFIG as a job of a Ray cluster, with this directory as its working directory.

    \b
    A run that exists there goes on from its newest whole checkpoint.
    Exit codes:
      0    submitted; with --follow finished, or ended as planned
      130  stopped
      1    failed
      2    refused
      3    left running by Ctrl-C
    """
    try:
        settings = read_config(config, overrides, run_dir=run_dir, plugins=not no_plugins)
        _refuse_folder_of_the_job(settings)
        code = _submit(
            settings,
            address=address,
            follow_it=follow,
            stop_patience_s=stop_patience_s,
            allow_unauthenticated=allow_unauthenticated,
        )
    except GroundswellError as error:
        say(str(error), error=True)
        code = EXIT_REFUSED
    sys.exit(code)


def _refuse_folder_of_the_job(settings: RunConfig) -> None:
    """A relative folder would lie in the job's working directory, which Ray deletes with the job."""
    where = settings.run.dir
    if where.startswith("/") or is_url(where):
        return
    rule = "is relative, and a job's working directory is gone when the job is: a run on a cluster would be lost"
    if where.startswith("~"):
        rule = "is in the home of whoever asks, and on the cluster that is another one"
    fix = "write a folder that all nodes share, such as --run-dir /mnt/shared/runs, or a URL"
    raise ConfigError(Problem(source=None, key="run.dir", value=where, rule=rule, fix=fix))


def _submit(
    settings: RunConfig, *, address: str | None, follow_it: bool, stop_patience_s: int, allow_unauthenticated: bool
) -> int:
    from launch.ray_jobs import jobs, package
    from launch.ray_jobs.follow import follow
    from launch.ray_jobs.head import answering, check_versions, connect, head_address

    url = head_address(address)
    client = connect(url, allow_unauthenticated=allow_unauthenticated)
    import ray

    note = check_versions(client, ray_version=ray.__version__)
    if note is not None:
        say(note)
    with answering(client):
        number = jobs.next_number(client, settings.run.name)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / f"{settings.run.name}.zip"
        found = package.contents(Path.cwd())
        for line in package.left_behind(found):
            say(line)
        packed = package.pack(Path.cwd(), settings, found=found, target=target)
        say(f"{Path.cwd()}: {packed.num_files} files, {package.in_bytes(target.stat().st_size)} to send")
        with answering(client):
            job = jobs.submit(
                client,
                settings,
                number=number,
                package=target,
                config_path=packed.config_path,
                stop_patience_s=stop_patience_s,
            )
    say(f"{settings.run.name} was submitted to {url} as {job.submission_id}; it is kept in {job.folder}")
    with answering(client):
        return follow(client, job) if follow_it else _watch_it_begin(client, job)


def _watch_it_begin(client: JobSubmissionClient, job: RunJob) -> int:
    """A head without what the job needs fails it at once, and that is better said now."""
    from launch.ray_jobs.follow import UnreadableLogError, conclude, read_log
    from launch.ray_jobs.jobs import refresh

    until_s = time.monotonic() + _BEGIN_PATIENCE_S
    while time.monotonic() < until_s:
        job = refresh(client, job)
        try:
            log = read_log(client, job)
        except UnreadableLogError:  # said at the job's end
            log = ""
        if not job.goes_on and job.exit_code != 0:
            say(log.rstrip(), error=True)
            return conclude(client, job)
        if not job.goes_on or '"groundswell": "' in log:
            break
        time.sleep(_LOOK_EVERY_S)
    say(f"It is {job.state}: groundswell logs {job.run} --follow shows it, groundswell stop {job.run} stops it")
    return 0
