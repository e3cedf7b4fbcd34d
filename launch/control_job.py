"""Gives an order from within a Ray cluster, by a job that takes no resources and lasts as long as the answer."""

from __future__ import annotations

import secrets
import time

from launch.live import say
from orchestrator.errors import SessionError

_LOOK_EVERY_S = 0.5


def run_there(command: str, address: str, *, order: str) -> int:
    """Run ``command`` on the head, print what it says, and return its exit code. Raises ``SessionError``.

    The head's ``python`` must have Groundswell installed. A token is taken from where Ray's own client takes it
    (``RAY_AUTH_MODE`` and ``RAY_AUTH_TOKEN_PATH``).
    """
    try:
        from ray.job_submission import JobStatus, JobSubmissionClient
    except ImportError as error:
        raise SessionError(
            f"orders to a cluster go through Ray's job client, which is not installed ({error}): "
            "pip install 'groundswell[cluster]'"
        ) from error
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=command,
            submission_id=f"groundswell-control-{order}-{secrets.token_hex(4)}",
            entrypoint_num_cpus=0,
        )
        while client.get_job_status(job) not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
            time.sleep(_LOOK_EVERY_S)
        info = client.get_job_info(job)
        say(client.get_job_logs(job).rstrip() or str(info.message))
    except (ConnectionError, RuntimeError) as error:
        raise SessionError(f"the job server at {address} did not take the order: {error}") from error
    code = info.driver_exit_code
    return 1 if code is None else int(code)
