"""``groundswell control``: say to a running job what to do, and print what it answered.

The job's rank zero finds the request in the run's folder. Where that folder cannot be seen from here, a small job on
the cluster gives the same order from there.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import click

from launch import options
from launch.live import say
from launch.order_desks import FolderDesk, UrlDesk
from orchestrator.config.places import is_url
from orchestrator.errors import GroundswellError, RunFolderError
from orchestrator.runtime import folder
from orchestrator.runtime.control_requests import Order

_EXIT_REFUSED = 1


class _Cap(click.ParamType):
    name = "N|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "none":
            return "none"
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"{value} is neither a whole number from 1 on nor none", param, ctx)
        return number


@click.command("control", short_help="Give an order to a running job.")
@click.argument("run")
@click.argument("order", type=click.Choice(["hold", "release", "cap", "checkpoint", "stop"]))
@click.option("--max-batch", type=_Cap(), help="For cap: the batch in samples; none lifts the cap.")
@click.option("--max-workers", type=_Cap(), help="For cap: the workers; none lifts the cap.")
@click.option("--run-dir", default="runs", show_default=True, metavar="DIR", help="Where RUN is, if it is a name.")
@click.option(
    "--timeout", "timeout_s", default=60.0, show_default=True, metavar="S", help="How long to wait for the answer."
)
@click.option(
    "--address", metavar="URL", help="Give the order on the Ray cluster that RUN was submitted to: http://HOST:8265."
)
@options.allow_unauthenticated
def control_command(
    run: str,
    order: Order,
    max_batch: int | str | None,
    max_workers: int | str | None,
    run_dir: str,
    timeout_s: float,
    address: str | None,
    allow_unauthenticated: bool,
) -> None:
    """Operate RUN, the folder, URL or name of a running job; with --address, of one that was submitted.

    \b
    hold        the batch stays, and no other number of workers is asked for
    release     ends the hold; a cap is lifted by cap --max-batch none
    cap         no larger batch, no more workers than given
    checkpoint  saves after the step at hand, and says where
    stop        saves and ends with exit code 0; run --resume goes on
    \b
    Exit codes: 0 done, 1 refused or no answer, 2 not understood.
    """
    caps = {
        key: None if value == "none" else cast(int, value)
        for key, value in (("max_batch", max_batch), ("max_workers", max_workers))
        if value is not None
    }
    if (order == "cap") != bool(caps):
        raise click.UsageError(
            "cap needs --max-batch, --max-workers or both" if order == "cap" else f"{order} takes no caps"
        )
    try:
        if address is not None:
            from launch.ray_jobs.errand import give_there

            arguments = []
            for key, value in caps.items():
                arguments += [f"--{key.replace('_', '-')}", "none" if value is None else str(value)]
            code = give_there(
                run,
                arguments,
                timeout_s=timeout_s,
                address=address,
                order=order,
                allow_unauthenticated=allow_unauthenticated,
            )
            sys.exit(code)
        with _desk_of(run, run_dir) as desk:
            code = _give(desk, order, caps, timeout_s=timeout_s)
        sys.exit(code)
    except GroundswellError as error:
        say(str(error), error=True)
        sys.exit(_EXIT_REFUSED)


@contextmanager
def _desk_of(run: str, run_dir: str) -> Iterator[FolderDesk | UrlDesk]:
    for url in (run, f"{run_dir.rstrip('/')}/{run}"):
        if is_url(url):
            with UrlDesk.at(url) as desk:
                yield desk
            return
    yield FolderDesk(_folder_of(run, run_dir))


def _folder_of(run: str, run_dir: str) -> Path:
    below = Path(run_dir).expanduser() / run
    for path in (Path(run), below):
        if folder.exists(path) or (path / folder.LAUNCHER_LOCK).exists():  # begun, or about to begin
            return path
    seen = f"{run} is not" if Path(run).is_absolute() else f"neither {run} nor {below} is"
    raise RunFolderError(
        f"{seen} the folder of a run; give the folder, or say with --run-dir where the run of that name is"
    )


def _give(desk: FolderDesk | UrlDesk, order: Order, caps: Mapping[str, int | None], *, timeout_s: float) -> int:
    ended = _ended(desk)
    if ended is not None:
        raise RunFolderError(f"{desk.name} is not running: it has {ended}")
    if desk.is_written() is False:
        say(f"no worker of {desk.name} trains at the moment; workers that begin within {timeout_s:g} s will answer")
    withdrawn = False
    with _signals_unwind():
        request = desk.put(order, caps=caps, timeout_s=timeout_s)
        try:
            until_s = time.monotonic() + timeout_s
            while (answer := _answer(desk, request)) is None and time.monotonic() < until_s:
                time.sleep(desk.look_every_s)
        finally:
            withdrawn = desk.withdraw(request)
    answer = answer or _answer(desk, request)
    if answer is None:
        running = {
            True: "it is running, and may be in a long step or evaluation",
            False: "it is not running",
            None: "whether it is running is not known, for its storage knows no locks",
        }[desk.is_written()]
        became = "the order was withdrawn" if withdrawn else "the order was taken, and is not done yet"
        raise RunFolderError(f"no answer from {desk.name} within {timeout_s:g} s: {running}; {became}")
    at = f"step {answer['step']}, {answer['samples_seen']:,} samples"
    say(f"{order}{'' if answer['accepted'] else ' refused'} ({at}): {answer['reason']}", error=not answer["accepted"])
    return 0 if answer["accepted"] else _EXIT_REFUSED


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """A signal that ends this process withdraws the order first, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answer(desk: FolderDesk | UrlDesk, request: str) -> dict[str, Any] | None:
    for row in desk.events():
        if row["kind"] == "control" and row["request"] == request:
            return row
    return None


def _ended(desk: FolderDesk | UrlDesk) -> str | None:
    """How the run has ended, if nobody goes on with it."""
    kinds = [row["kind"] for row in desk.events()]
    last = next((kind for kind in reversed(kinds) if kind in ("started", "resumed", "finished", "stopped")), None)
    return last if last in ("finished", "stopped") and not desk.is_written() else None
