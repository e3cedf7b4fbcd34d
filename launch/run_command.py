"""``groundswell run``: start training in the chosen runtime, show it, and stop it cleanly.

Training runs in a background thread or in child processes; this one shows what the run's folder says. Ctrl-C asks for
a stop through that folder, which reaches rank zero wherever it is; a second one ends at once.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from launch import options
from launch.bundled import read_config
from launch.doctor import unreachable
from launch.jobs import HEAD_PATIENCE_S, Interrupts, Job, quiet_libraries
from launch.json_rows import JsonRows, show_json
from launch.live import say, show
from launch.outcome import (
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    advice_lines,
    ended_as_planned,
    nothing_to_do,
    summary,
)
from launch.progress import Progress
from launch.ray_cluster import add_working_directory
from launch.remote_runs import StopAsker, UrlRows, rows_of
from launch.sources import Source
from orchestrator.config import RunConfig
from orchestrator.errors import GroundswellError, RunFolderError
from orchestrator.runtime import folder
from orchestrator.runtime.preparation import refuse_changed_config, run_folder, run_url
from orchestrator.runtime.tracking import check_libraries

_LOCAL_CLUSTER = "local"
_OTHERS_END_S = 180.0
_QUIET_S = 30.0  # where the storage knows no locks, a run that wrote nothing for so long is taken for ended


@click.command("run", short_help="Train a config.")
@click.argument("config")
@options.overrides
@options.no_plugins
@click.option(
    "--runtime",
    type=click.Choice(["ray", "torchrun", "local"]),
    default="ray",
    show_default=True,
    help="Ray Train, with workers that come and go; torchrun, with workers.initial processes; or this process alone.",
)
@click.option("--run-dir", metavar="DIR", help="Keep the run in DIR/<run.name> instead of under run.dir.")
@click.option("--resume", is_flag=True, help="Go on with a run that exists, from its newest whole checkpoint.")
@click.option(
    "--auto-resume",
    is_flag=True,
    help="Go on with the run if it exists, else begin it: for jobs that are started again.",
)
@click.option(
    "--address",
    default=_LOCAL_CLUSTER,
    show_default=True,
    metavar="ADDRESS",
    help="Ray cluster to use; local starts one.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What is printed: for people, or a JSON object a line for programs that follow.",
)
@click.option(
    "--head-patience",
    "head_patience_s",
    default=HEAD_PATIENCE_S,
    show_default=True,
    metavar="S",
    help="How long a head of the Ray cluster that answers nobody is waited for.",
)
def run_command(
    config: str,
    overrides: tuple[str, ...],
    no_plugins: bool,
    runtime: str,
    run_dir: str | None,
    resume: bool,
    auto_resume: bool,
    address: str,
    log_format: str,
    head_patience_s: float,
) -> None:
    """Train CONFIG: a path, or the name of a bundled config (groundswell config list).

    \b
    Ctrl-C finishes the step, saves, and prints the command that goes on.
    Exit codes:
      0    finished, or ended as planned: by its budget or by order
      130  stopped by a signal; --resume goes on
      1    failed
      2    refused before it started
    """
    if runtime != "ray" and address != _LOCAL_CLUSTER:
        raise click.UsageError(f"--address names a Ray cluster, which --runtime {runtime} does not use")
    add_working_directory()
    command = ["groundswell", "run", config, *(part for override in overrides for part in ("--set", override))]
    command += ["--no-plugins"] if no_plugins else []
    command += [] if runtime == "ray" else ["--runtime", runtime]
    command += [] if run_dir is None else ["--run-dir", run_dir]
    command += [] if address == _LOCAL_CLUSTER else ["--address", address]
    try:
        settings = read_config(config, overrides, run_dir=run_dir, plugins=not no_plugins)
        path = _bring(settings)
        if auto_resume:
            resume = resume or folder.exists(path)
        code = run(
            settings,
            runtime=runtime,
            resume=resume,
            address=address,
            command=shlex.join(command) if log_format == "text" else None,
            log_format=log_format,
            head_patience_s=head_patience_s,
            waits_for_others=auto_resume,
        )
    except GroundswellError as error:
        say(str(error), error=True)
        code = EXIT_REFUSED
    if code == EXIT_STOPPED:
        # A training thread may still be inside torch, where an orderly exit of the interpreter crashes.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def run(
    settings: RunConfig,
    *,
    runtime: str,
    resume: bool,
    address: str,
    command: str | None,
    log_format: str = "text",
    head_patience_s: float = HEAD_PATIENCE_S,
    waits_for_others: bool = False,
) -> int:
    """Train ``settings`` and return the exit code.

    ``command`` is the one that was typed, without ``--resume``; ``None`` where who reads this knows another.

    Raises ``RunFolderError`` and ``ConfigError`` before anything heavy is imported.
    """
    path = run_folder(settings)
    folder.check(path, resume=resume)
    refuse_changed_config(settings, path)
    check_libraries(settings)
    source = rows_of(settings, runtime=runtime)
    rows = JsonRows(source) if log_format == "json" else None
    speak = say if rows is None else rows.tell
    done = nothing_to_do(settings, path) if resume else None
    if done is not None:
        speak(done)
        return 0
    silence = unreachable(address)
    if silence is not None:
        say(f"{silence}; start a head with ray start --head, or name its address", error=True)
        return EXIT_REFUSED
    with folder.launching(path):
        if waits_for_others:
            _wait_for_others(path)
        return _train(
            settings,
            path,
            runtime=runtime,
            resume=resume,
            address=address,
            command=command,
            source=source,
            rows=rows,
            head_patience_s=head_patience_s,
        )


def _train(
    settings: RunConfig,
    path: Path,
    *,
    runtime: str,
    resume: bool,
    address: str,
    command: str | None,
    source: Source,
    rows: JsonRows | None,
    head_patience_s: float,
) -> int:
    speak = say if rows is None else rows.tell
    place = f"folder {path}" if run_url(settings) is None else f"at {run_url(settings)}"
    speak(f"{settings.run.name}: task {settings.task.name}, runtime {runtime}, {place}")
    if runtime == "local" and settings.workers.initial > 1:
        speak(f"workers.initial is {settings.workers.initial}; --runtime local trains with this process alone")
    quiet_libraries()
    progress = Progress(source if rows is None else rows)
    stop = StopAsker(settings, runtime=runtime)
    tell = progress.tell if rows is None else rows.tell
    with Interrupts() as interrupts:
        job = Job(
            settings,
            runtime=runtime,
            resume=resume,
            address=address,
            tell=tell,
            head_patience_s=head_patience_s,
        )
        asked = False

        def going() -> bool:
            running = job.running
            if not running and isinstance(source, UrlRows):
                source.look_now()
            return running

        def tick() -> None:
            nonlocal asked
            started = progress.start is not None
            if interrupts.count >= 2 or (interrupts.count == 1 and not started):
                raise _EndNowError
            if interrupts.count == 0:
                return
            stop.ask()
            if not asked:
                asked = True
                again = " (Ctrl-C again to stop at once)" if rows is None else ""
                tell(f"stopping after this step, with a checkpoint{again} ...")

        try:
            if rows is None:
                show(progress, going=going, tick=tick)
            else:
                show_json(progress, rows, going=going, tick=tick)
        except _EndNowError:
            job.kill()
            say(f"Stopped {'at once' if progress.start is not None else 'before the first step'}.", error=True)
            _say_resume(path, command)
            return EXIT_STOPPED
        except BaseException:
            job.kill()
            raise
    stop.take_back()
    if run_url(settings) is not None and job.error is None:
        _bring(settings)  # another node may have written it
    code = _conclude(path, job, progress, command=command, speak=speak)
    if job.head_is_lost:
        # Threads wait for a head that is not there, and so would an orderly end of the interpreter.
        sys.stdout.flush()
        os._exit(code)
    return code


def _bring(settings: RunConfig) -> Path:
    """The run's folder, with its history where that is kept at a URL."""
    if run_url(settings) is not None:
        from orchestrator.runtime.at_url import bring_lines  # brings torch

        bring_lines(settings)
    return run_folder(settings)


class _EndNowError(Exception):
    pass


def _conclude(path: Path, job: Job, progress: Progress, *, command: str | None, speak: Callable[[str], None]) -> int:
    if job.error is not None:
        if isinstance(job.error, GroundswellError) and progress.start is None and not job.head_is_lost:
            raise job.error
        *trace, why = job.failure.split("\n") if job.failure.startswith("Traceback") else [job.failure]
        say("\n".join([*trace, f"The run failed: {why}"]), error=True)
        _say_resume(path, command)
        return EXIT_FAILED
    if progress.ended is not None and ended_as_planned(progress.ended):
        speak(f"Ended at {progress.ended['samples_seen']:,} samples: {progress.ended['reason']}.\n{summary(path)}")
        if progress.ended.get("ordered"):
            _say_resume(path, command)
        return 0
    if progress.ended is None or progress.ended["kind"] != "finished":
        if progress.ended is not None:
            say(f"Stopped at {progress.ended['samples_seen']:,} samples, saved in {path}.", error=True)
            for line in advice_lines(path):
                say(line, error=True)
        _say_resume(path, command)
        return EXIT_STOPPED
    speak(summary(path, took_s=progress.running_s))
    return 0


def _wait_for_others(path: Path) -> None:
    """Let workers of an attempt that was cut off from its head come to their end, which takes them a minute or two."""
    if not seems_written(path):
        return
    say(f"{path} is still being written, perhaps by workers whose cluster died: waiting up to {_OTHERS_END_S:g} s")
    until_s = time.monotonic() + _OTHERS_END_S
    while seems_written(path) and time.monotonic() < until_s:
        time.sleep(1.0)


def seems_written(path: Path) -> bool:
    """Whether a process writes the run, by its lock, or by its last line where the storage knows no locks."""
    written = folder.is_written(path)
    return folder.quiet_s(path) < _QUIET_S if written is None else written


def _say_resume(path: Path, command: str | None) -> None:
    if command is None:
        return
    saved = any((path / "checkpoints").glob("step-*"))
    try:
        folder.check(path, resume=True)
        command += " --resume"
    except RunFolderError:
        pass  # no run was begun
    what = "To go on from the last checkpoint" if saved else "Nothing was saved yet; to begin again"
    say(f"{what}:\n  {command}", error=True)
