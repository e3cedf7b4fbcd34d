"""Training as the command line sees it: a job in the background that can be waited for, stopped and ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Any, final

from orchestrator.config import RunConfig
from orchestrator.errors import GroundswellError, SessionError

_SHUTDOWN_PATIENCE_S = 10.0
HEAD_PATIENCE_S = 45.0  # less than Ray's own minute, after which it ends this process
_LOOK_FOR_HEAD_EVERY_S = 1.0


@final
class Job:
    """Training in a background thread, and what came of it; ``tell`` is given what the run's folder cannot hold."""

    def __init__(
        self,
        config: RunConfig,
        *,
        runtime: str,
        resume: bool,
        address: str,
        tell: Callable[[str], None],
        head_patience_s: float = HEAD_PATIENCE_S,
    ) -> None:
        self.error: BaseException | None = None
        self.head_is_lost = False
        self._head_patience_s = head_patience_s
        self._config, self._resume, self._address, self._tell = config, resume, address, tell
        self._kill: Callable[[], None] = _end_children
        start = {"local": self._local, "torchrun": self._torchrun, "ray": self._ray}[runtime]
        self._thread = threading.Thread(target=self._run, args=(start,), name="training", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """A job whose head is lost is over, although what waits for the head may never end."""
        return self._thread.is_alive() and not self.head_is_lost

    @property
    def failure(self) -> str:
        """Where and why it failed; an error of ours says all there is to say by itself."""
        assert self.error is not None, "asked of a job that failed"
        if isinstance(self.error, (GroundswellError, WorkersError)):
            return str(self.error)
        return "".join(traceback.format_exception(self.error)).rstrip()

    def kill(self) -> None:
        """End all processes of the job now. The thread itself ends with this process."""
        self._kill()

    def _run(self, start: Callable[[], None]) -> None:
        # Processes that begin here inherit the mask: Ctrl-C is for the main thread, and they finish their step.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            start()
        except BaseException as error:  # shown by the main thread
            self.error = self.error or error

    def _local(self) -> None:
        from orchestrator.runtime.worker import local_worker
        from orchestrator.train import train

        train(self._config, replace(local_worker(self._config), own_process=True), resume=self._resume)

    def _torchrun(self) -> None:
        from launch.spawn import spawn

        def can_end(kill: Callable[[], None]) -> None:
            self._kill = kill

        spawn(self._config, resume=self._resume, on_start=can_end, tell=self._tell)

    def _ray(self) -> None:
        from launch.doctor import unreachable
        from launch.ray_cluster import fit

        self._kill = _shut_ray_down
        over = threading.Event()
        head: list[str] = []

        def started(gcs: str) -> None:
            head.append(gcs)
            threading.Thread(target=self._watch_head, args=(gcs, over), name="head", daemon=True).start()

        try:
            fit(self._config, resume=self._resume, address=self._address, on_start=started)
        except Exception as error:
            # What Ray says when its head goes away has many words, and not these.
            if head and not isinstance(error, GroundswellError) and unreachable(head[0]) is not None:
                raise _lost(head[0]) from error
            raise
        finally:
            over.set()

    def _watch_head(self, head: str, over: threading.Event) -> None:
        """Ray itself waits for a head that died for a minute, and then ends the process without a word."""
        from launch.doctor import unreachable

        heard_s = time.monotonic()
        while not over.wait(_LOOK_FOR_HEAD_EVERY_S):
            if unreachable(head) is None:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s >= self._head_patience_s and not over.is_set():
                self.error, self.head_is_lost = _lost(head), True
                return


def _lost(head: str) -> SessionError:
    return SessionError(
        f"the head of the Ray cluster at {head} is gone, and with it the run's controller; start a head again, and go "
        "on from the newest checkpoint (its workers end by themselves within a minute or two)"
    )


class WorkersError(Exception):
    """Worker processes ended with an error that is not one of ours; the message holds what they said."""


@final
class Interrupts:
    """Counts Ctrl-C and the polite signals to end, instead of dying of them. For the main thread."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # What the parent told us to ignore (nohup) stays ignored.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def quiet_libraries() -> None:
    """Keep what libraries have to say to their own developers off the user's terminal; call it before they load.

    Warnings raised in the user's own modules are shown, and all of them when Python was asked for warnings (-W).
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The warnings of this project are events of the run, and shown as such.
    logging.getLogger("orchestrator").addHandler(logging.NullHandler())
    if not sys.warnoptions:
        libraries = "torch|ray|tensorboard|google|sklearn|scipy|numpy|pydantic|multiprocessing|orchestrator|launch"
        warnings.filterwarnings("ignore", module=rf"({libraries})(\.|$)")


def _end_children() -> None:
    """End the loader processes of this one: they would notice only seconds later."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()


def _shut_ray_down() -> None:
    ray = sys.modules.get("ray")
    if ray is None:
        return
    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(_SHUTDOWN_PATIENCE_S)
