"""``groundswell run``: start training in the chosen runtime, show it, and stop it cleanly.

Training runs in a background thread or in child processes; this one shows what the run's folder says. Ctrl-C asks for
a stop through that folder, which reaches rank zero wherever it is; a second one ends at once.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click

from launch.bundled import find_config
from launch.live import follow
from orchestrator.config import RunConfig
from orchestrator.config_file import load_config
from orchestrator.errors import GroundswellError
from orchestrator.runtime import folder

EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED = 1, 2, 130


@click.command("run")
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key: section.key=value.")
@click.option(
    "--runtime",
    type=click.Choice(["ray", "torchrun", "local"]),
    default="ray",
    show_default=True,
    help="Ray Train, with workers that come and go; torchrun, with workers.initial processes; or this process alone.",
)
@click.option("--run-dir", metavar="DIR", help="Keep the run under DIR instead of run.dir.")
@click.option("--resume", is_flag=True, help="Go on with a run that exists, from its newest whole checkpoint.")
@click.option(
    "--address", default="local", show_default=True, metavar="ADDRESS", help="Ray cluster to use; local starts one."
)
def run_command(
    config: str, overrides: tuple[str, ...], runtime: str, run_dir: str | None, resume: bool, address: str
) -> None:
    """Train CONFIG: a path, or the name of a bundled config."""
    try:
        settings = load_config(find_config(config), list(overrides) + _run_dir_override(run_dir))
        again = _again(config, overrides, runtime, run_dir)
        sys.exit(run(settings, runtime=runtime, resume=resume, address=address, again=again))
    except GroundswellError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_REFUSED)


def run(settings: RunConfig, *, runtime: str, resume: bool, address: str, again: str) -> int:
    """Train ``settings`` and return the exit code; ``again`` is the command that goes on with the run."""
    path = Path(settings.run.dir) / settings.run.name
    folder.check(path, resume=resume)
    task = settings.task.name
    click.echo(f"{settings.run.name}: {task} on {runtime}, results in {path}")
    started = time.time()
    job = _Job(_starter(settings, runtime=runtime, resume=resume, address=address))
    interrupted = False
    while job.running:
        try:
            follow(path, while_true=lambda: job.running, since=started)
        except KeyboardInterrupt:
            if interrupted:
                click.echo("Stopped at once; what was saved last stays.", err=True)
                _say_resume(again)
                job.kill()
                return EXIT_STOPPED
            interrupted = True
            click.echo("\nStopping after this step, with a checkpoint (Ctrl-C again to stop at once) ...", err=True)
            (path / folder.STOP_REQUEST).touch()
    return _conclude(path, job, again=again)


def _conclude(path: Path, job: _Job, *, again: str) -> int:
    if job.error is not None:
        click.echo(f"The run failed: {job.error}", err=True)
        if any((path / "checkpoints").glob("step-*")):
            _say_resume(again)
        return EXIT_FAILED
    kinds = [row["kind"] for row in folder.rows(path / folder.EVENTS)]
    if "finished" not in kinds[-3:]:
        _say_resume(again)
        return EXIT_STOPPED
    click.echo(summary(path))
    return 0


def summary(path: Path) -> str:
    """How a finished run ended, in a few plain lines."""
    steps = folder.surviving(path / folder.METRICS)
    evals = folder.surviving(path / folder.EVALS)
    first, last = steps[0], steps[-1]
    largest = max(row["global_batch"] for row in steps)
    lines = [
        f"Finished: {last['samples_seen']} samples in {len(steps)} steps, "
        f"batch {first['global_batch']} to {largest}, workers {first['world_size']} to {last['world_size']}."
    ]
    if evals:
        skip = ("attempt", "step", "samples_seen")
        lines.append("Held out: " + ", ".join(f"{k} {v:.4g}" for k, v in evals[-1].items() if k not in skip))
    lines.append(f"Curves: tensorboard --logdir {path / 'tensorboard'}; every decision: {path / folder.EVENTS}")
    return "\n".join(lines)


class _Job:
    """Training in a background thread, and what came of it."""

    def __init__(self, start: Callable[[_Job], None]) -> None:
        self.error: BaseException | None = None
        self.kill: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, args=(start,), name="training", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self, start: Callable[[_Job], None]) -> None:
        try:
            start(self)
        except BaseException as error:  # shown by the main thread
            self.error = error


def _starter(settings: RunConfig, *, runtime: str, resume: bool, address: str) -> Callable[[_Job], None]:
    def local(job: _Job) -> None:
        from orchestrator.runtime.worker import local_worker
        from orchestrator.train import train

        train(settings, local_worker(settings), resume=resume)

    def torchrun(job: _Job) -> None:
        from launch.torchrun import spawn

        spawn(settings, resume=resume, on_start=lambda kill: setattr(job, "kill", kill))

    def ray(job: _Job) -> None:
        from launch.ray_cluster import fit

        fit(settings, resume=resume, address=address)

    return {"local": local, "torchrun": torchrun, "ray": ray}[runtime]


def _run_dir_override(run_dir: str | None) -> list[str]:
    return [] if run_dir is None else [f"run.dir={json.dumps(run_dir)}"]


def _again(config: str, overrides: tuple[str, ...], runtime: str, run_dir: str | None) -> str:
    parts = ["groundswell run", config, *(f"--set {o}" for o in overrides)]
    if runtime != "ray":
        parts.append(f"--runtime {runtime}")
    if run_dir is not None:
        parts.append(f"--run-dir {run_dir}")
    return " ".join([*parts, "--resume"])


def _say_resume(command: str) -> None:
    click.echo(f"To go on from the last checkpoint:\n  {command}", err=True)
