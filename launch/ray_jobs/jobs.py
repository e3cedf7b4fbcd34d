"""What is a run on a cluster: which of Ray's jobs are its attempts, how they are named, and what came of them?

Ray keeps the jobs; all that is added to one is its name and its metadata, which every command here reads again.
"""

from __future__ import annotations

import difflib
import hashlib
import shlex
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.outcome import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED
from launch.ray_jobs.head import ClusterError
from orchestrator.config import RunConfig, to_yaml

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_RUN, _ATTEMPT, _FOLDER = "groundswell_run", "groundswell_submission", "groundswell_folder"
_CONFIG, _VERSION, _REVISION = "groundswell_config_sha256", "groundswell_version", "git_revision"
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # how long Ray's supervisor waits between SIGTERM and SIGKILL
_RAYS_STOP_WAIT_S = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunJob:
    """One submission of a run, as its cluster knows it."""

    run: str
    number: int  # counted from 1
    submission_id: str
    state: str  # pending, running, finished, stopped, failed
    message: str
    began_s: float | None  # Unix time
    ended_s: float | None
    folder: str
    config_sha256: str
    revision: str
    stop_patience_s: int
    exit_code: int | None  # what the command that follows it exits with; None while it goes on

    @property
    def goes_on(self) -> bool:
        return self.exit_code is None


def all_jobs(client: JobSubmissionClient) -> list[RunJob]:
    """Every submission of every run, the newest first."""
    found = [_job(details) for details in client.list_jobs() if _RUN in (details.metadata or {})]
    return sorted(found, key=lambda job: (job.began_s or 0.0, job.number), reverse=True)


def find(client: JobSubmissionClient, run: str) -> RunJob:
    """The newest submission of the run of that name, or the one of that id. Raises ``ClusterError``."""
    jobs = all_jobs(client)
    named = [job for job in jobs if run in (job.run, job.submission_id)]
    if named:
        return max(named, key=lambda job: job.number)
    names = sorted({job.run for job in jobs})
    near = difflib.get_close_matches(run, names, n=1)
    fix = f"did you mean {near[0]}?" if near else "groundswell list names those there are"
    raise ClusterError(f"no run {run} was submitted to the cluster at {client.get_address()}; {fix}")


def refresh(client: JobSubmissionClient, job: RunJob) -> RunJob:
    """What the cluster knows of it now."""
    return _job(client.get_job_info(job.submission_id))


def next_number(client: JobSubmissionClient, name: str) -> int:
    """Of the run's next submission. Raises ``ClusterError`` where one goes on already, for a run has one writer."""
    before = [job for job in all_jobs(client) if job.run == name]
    for job in before:
        if job.goes_on:
            raise ClusterError(
                f"{name} is {job.state} on this cluster as {job.submission_id}: groundswell logs {name} --follow shows "
                f"it, groundswell stop {name} stops it; another run needs another run.name"
            )
    return 1 + max((job.number for job in before), default=0)


def submit(
    client: JobSubmissionClient,
    config: RunConfig,
    *,
    number: int,
    package: Path,
    config_path: str,
    stop_patience_s: int,
) -> RunJob:
    """Submit a run, which begins it or goes on with it; ``package`` holds the config at ``config_path``."""
    name = config.run.name
    submission_id = f"groundswell-{name}-{number}"
    # exec: the supervisor's SIGTERM goes to the command itself, once, and not to a shell as well.
    command = ["python", "-m", "launch.cli", "run", config_path, "--address", "auto", "--auto-resume"]
    try:
        client.submit_job(
            entrypoint=f"exec {shlex.join([*command, '--log-format', 'json'])}",
            submission_id=submission_id,
            runtime_env={"working_dir": str(package), "env_vars": {_STOP_WAIT: str(stop_patience_s)}},
            metadata={"job_name": name, _RUN: name, _ATTEMPT: str(number), **_origin(config)},
            entrypoint_num_cpus=0,
        )
    except RuntimeError as error:
        if "already exists" in str(error):
            raise ClusterError(
                f"{submission_id} was submitted by somebody else at this moment: groundswell logs {name} --follow"
            ) from error
        raise ClusterError(f"the cluster at {client.get_address()} did not take the job: {error}") from error
    return _job(client.get_job_info(submission_id))


def _origin(config: RunConfig) -> dict[str, str]:
    """From what a job was made."""
    try:
        version = metadata.version("groundswell")
    except metadata.PackageNotFoundError:
        version = "of a checkout"
    return {
        _FOLDER: f"{config.run.dir.rstrip('/')}/{config.run.name}",
        _CONFIG: hashlib.sha256(to_yaml(config, comments=False).encode()).hexdigest(),
        _VERSION: version,
        _REVISION: git_revision(Path.cwd()),
    }


def git_revision(directory: Path) -> str:
    """The commit that ``directory`` is at, with ``-dirty`` for changes beyond it; ``none`` outside of Git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return done.stdout.strip() or "none"


def _job(details: Any) -> RunJob:
    known: dict[str, str] = details.metadata or {}
    status, code = str(details.status.value), details.driver_exit_code
    state = {"PENDING": "pending", "RUNNING": "running", "SUCCEEDED": "finished", "STOPPED": "stopped"}.get(
        status, "stopped" if code == EXIT_STOPPED else "failed"
    )
    failed = EXIT_REFUSED if code == EXIT_REFUSED else EXIT_FAILED
    codes = {"finished": 0, "stopped": EXIT_STOPPED, "failed": failed}
    environment = (details.runtime_env or {}).get("env_vars") or {}
    patience = str(environment.get(_STOP_WAIT, ""))
    return RunJob(
        run=known.get(_RUN, ""),
        number=int(known.get(_ATTEMPT, "0")),
        submission_id=details.submission_id,
        state=state,
        message=details.message or "",
        began_s=None if details.start_time is None else details.start_time / 1000,
        ended_s=None if not details.end_time else details.end_time / 1000,
        folder=known.get(_FOLDER, "?"),
        config_sha256=known.get(_CONFIG, "?"),
        revision=known.get(_REVISION, "?"),
        stop_patience_s=int(patience) if patience.isdecimal() else _RAYS_STOP_WAIT_S,
        exit_code=codes.get(state),
    )
