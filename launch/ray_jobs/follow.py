"""Shows a job of the cluster as ``groundswell run`` shows a run, and leaves it alone when the reader goes."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, final

from launch.jobs import Interrupts
from launch.live import say, show, show_plain
from launch.outcome import EXIT_FAILED
from launch.progress import Progress
from launch.ray_jobs.head import ClusterError
from launch.ray_jobs.jobs import RunJob, refresh
from launch.ray_jobs.log import LogRows, LogText

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXIT_DETACHED = 3
_SILENCE_S = 60.0  # then the stream is opened anew: one that died without a word looks like this
_BREAK_PATIENCE_S = 300.0
_BETWEEN_ATTEMPTS_S = 2.0
_NOT_INSTALLED = "No module named 'launch'"
_HOW_TO_INSTALL = (
    "The python of the cluster's head has no Groundswell: put it into the image (docker/), or submit from a checkout "
    "of it, which then travels as the working directory and needs its dependencies there."
)


@final
class Attachment:
    """A thread that reads a job's log to its end, through streams that break; ``rows`` are what it has read.

    ``lost`` is there when the cluster could not be reached for minutes.
    """

    def __init__(self, client: JobSubmissionClient, job: RunJob) -> None:
        self.rows = LogRows(job.run, live=True)
        self.lost: str | None = None
        self._client, self._job = client, job
        self._text = LogText()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._read()), name="attachment", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    async def _read(self) -> None:
        broken_since_s: float | None = None
        while True:
            try:
                await self._stream()
                over = not (await asyncio.to_thread(refresh, self._client, self._job)).goes_on
                broken_since_s = None
            except Exception as error:  # aiohttp's, requests' and Ray's have no common base
                over = False
                if broken_since_s is None:
                    broken_since_s = time.monotonic()
                    self.rows.add([f"the connection to the cluster broke ({error}); trying again ..."])
                elif time.monotonic() - broken_since_s > _BREAK_PATIENCE_S:
                    self.lost = str(error)
                    return
            self._text.begin_again()
            if over:
                break
            await asyncio.sleep(_BETWEEN_ATTEMPTS_S)
        # The stream of a job that ends quickly may end before its last lines.
        try:
            self.rows.add(self._text.take(await asyncio.to_thread(read_log, self._client, self._job)))
        except UnreadableLogError as error:
            self.rows.add([str(error)])
        self.rows.add(self._text.last())

    async def _stream(self) -> None:
        stream = self._client.tail_job_logs(self._job.submission_id)
        while True:
            try:
                piece = await asyncio.wait_for(anext(stream), _SILENCE_S)
            except (StopAsyncIteration, asyncio.TimeoutError):
                return
            self.rows.add(self._text.take(piece))


def follow(client: JobSubmissionClient, job: RunJob) -> int:
    """Show a job until it ends; its exit code, or ``EXIT_DETACHED`` after Ctrl-C, which leaves it running."""
    attachment = Attachment(client, job)
    rows = attachment.rows
    with Interrupts() as interrupts:

        def tick() -> None:
            if interrupts.count:
                raise _DetachedError

        try:
            show(Progress(rows, clock=rows.clock), going=lambda: attachment.running or rows.behind, tick=tick)
        except _DetachedError:
            say(
                f"Detached; {job.run} goes on.\n  groundswell logs {job.run} --follow   shows it again\n"
                f"  groundswell stop {job.run}            saves and stops it",
                error=True,
            )
            return EXIT_DETACHED
    if attachment.lost is not None:
        say(
            f"The cluster was not reached for {_BREAK_PATIENCE_S / 60:g} minutes ({attachment.lost}); "
            f"groundswell logs {job.run} --follow tries again.",
            error=True,
        )
        return EXIT_FAILED
    return conclude(client, refresh(client, job))


class _DetachedError(Exception):
    pass


def show_log(client: JobSubmissionClient, job: RunJob, *, raw: bool) -> None:
    """Print what a job has said so far, as ``groundswell run`` would have, or ``raw``."""
    text = read_log(client, job)
    if raw:
        say(text.removesuffix("\n"))
        return
    rows = LogRows(job.run, live=False)
    rows.add(text.splitlines())
    show_plain(Progress(rows, clock=rows.clock), going=lambda: rows.behind)


def conclude(client: JobSubmissionClient, job: RunJob) -> int:
    """Say how a job ended, where its own last lines do not, and give its exit code."""
    if job.exit_code is None:
        raise ClusterError(f"{job.submission_id} is {job.state} on the cluster, though its log has ended")
    if job.state == "stopped":
        try:
            reached = newest(client, job)
        except UnreadableLogError as error:
            reached = None
            say(str(error), error=True)
        saved = None if reached is None else reached.saved_samples
        how = "was ended" if saved is None else f"stopped at {saved:,} samples, saved in {job.folder}"
        say(f"{job.run} {how}; submitting it again goes on from the last checkpoint.", error=True)
    elif job.state == "failed":
        try:
            log = read_log(client, job)
        except UnreadableLogError as error:
            log = str(error)
            say(log, error=True)
        if _NOT_INSTALLED in log:
            say(_HOW_TO_INSTALL, error=True)
        elif "last available logs" not in job.message:  # else the log was shown
            say(job.message, error=True)
        say(f"{job.submission_id} failed; submitting it again goes on from the last checkpoint, if any.", error=True)
    return job.exit_code


def newest(client: JobSubmissionClient, job: RunJob) -> Progress | None:
    """What the job's log says of the run by now; ``None`` before it began. Raises ``UnreadableLogError``."""
    rows = LogRows(job.run, live=False)
    rows.add(read_log(client, job).splitlines())
    progress = Progress(rows, clock=rows.clock)
    while rows.behind:
        progress.update()
    return None if progress.start is None else progress


class UnreadableLogError(ClusterError):
    """A log that says nothing, which is not a log that says that nothing happened."""


def read_log(client: JobSubmissionClient, job: RunJob) -> str:
    """All that the job has printed. Raises ``UnreadableLogError``, as where its node is gone."""
    try:
        return client.get_job_logs(job.submission_id)
    except (RuntimeError, OSError) as error:  # Ray's word for every answer but 200; no answer
        raise UnreadableLogError(
            f"the log of {job.submission_id} cannot be read, perhaps since its node is gone: {job.folder} says what "
            "came of the run"
        ) from error
