"""Gives an order from within a Ray cluster, by a job that takes no resources and lasts as long as the answer."""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.live import say
from launch.ray_jobs.head import ClusterError, answering, connect, head_address
from launch.ray_jobs.jobs import find
from launch.ray_jobs.log import said_by_the_job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_LOOK_EVERY_S = 0.5
_BEYOND_PATIENCE_S = 60.0  # for the head to begin the job, with the run's code, and to write down that it has ended


def give_there(
    run: str, arguments: Sequence[str], *, timeout_s: float, address: str, order: str, allow_unauthenticated: bool
) -> int:
    """Have ``groundswell control`` carried out by the head, print what it says, and return its exit code.

    ``run`` is a run that was submitted, which knows its folder and brings its code, or a folder as the cluster sees it;
    for that the head's ``python`` must have Groundswell installed. The job waits ``timeout_s`` for the answer, and is
    stopped where nobody waits for it any longer. Raises ``ClusterError``.
    """
    from ray.job_submission import JobStatus

    client = connect(head_address(address), allow_unauthenticated=allow_unauthenticated)
    with answering(client):
        folder, runtime_env = (run, None) if Path(run).is_absolute() else _as_submitted(client, run)
        try:
            job = client.submit_job(
                entrypoint=shlex.join(
                    ["python", "-m", "launch.cli", "control", folder, order, *arguments, f"--timeout={timeout_s:g}"]
                ),
                submission_id=f"groundswell-control-{order}-{secrets.token_hex(4)}",
                runtime_env=runtime_env,
                entrypoint_num_cpus=0,
            )
        except RuntimeError as error:
            raise ClusterError(f"the head at {client.get_address()} did not take the order: {error}") from error
        until_s = time.monotonic() + timeout_s + _BEYOND_PATIENCE_S
        try:
            while client.get_job_status(job) not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
                if time.monotonic() > until_s:
                    raise ClusterError(
                        f"{job}, which gives the order, has not ended {timeout_s + _BEYOND_PATIENCE_S:g} s after it "
                        "was submitted: the head may be too busy to begin it, or its disk or memory be full"
                    )
                time.sleep(_LOOK_EVERY_S)
        except (ClusterError, KeyboardInterrupt):
            client.stop_job(job)
            say(f"{job} is told to stop; whether the order was heard by then, the run's events say", error=True)
            raise
        info = client.get_job_info(job)
        say(said_by_the_job(client.get_job_logs(job)) or str(info.message))
    code = info.driver_exit_code
    return 1 if code is None else int(code)


def _as_submitted(client: JobSubmissionClient, run: str) -> tuple[str, dict[str, str] | None]:
    """Its folder, and its working directory, which may be what Groundswell is imported from."""
    job = find(client, run)
    if not job.goes_on:
        raise ClusterError(f"{run} is {job.state} on this cluster, as {job.submission_id}: nobody is there to be told")
    packed = (client.get_job_info(job.submission_id).runtime_env or {}).get("working_dir")
    return job.folder, None if packed is None else {"working_dir": packed}
