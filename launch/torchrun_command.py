"""``groundswell torchrun``: torch's elastic agent for this node, with what our workers need of it.

The agent runs in this process: it takes SIGTERM and Ctrl-C itself and hands them to the workers, which save and end.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import MutableMapping
from pathlib import Path
from types import FrameType
from typing import Any

import click

from launch import options
from launch.bundled import read_config
from launch.jobs import quiet_libraries
from launch.launched import goes_on
from launch.live import say
from launch.outcome import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, is_finished, nothing_to_do, planned_end
from orchestrator.config import RunConfig
from orchestrator.errors import GroundswellError
from orchestrator.runtime.preparation import run_folder, run_url

_SLURM_SCRIPT = Path(__file__).parent / "slurm" / "groundswell.sbatch"
_PORT = 29400  # torchrun's own default
_SAVE_PATIENCE_S = 100  # below the 120 s of notice that schedulers are commonly asked for
_LAST_CALL_TIMEOUT_S = 5  # torch waits 30 s for late agents before each group, though they may join at any time


class _NodesType(click.ParamType):
    name = "MIN:MAX"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d+)(?::(\d+))?", value)
        if found is None:
            self.fail(f"{value} is neither a number of nodes nor MIN:MAX, such as 2 or 1:4", param, context)
        low, high = int(found[1]), int(found[2] or found[1])
        if not 1 <= low <= high:
            self.fail(f"{value} must count from at least 1 up", param, context)
        return low, high


class _EndpointType(click.ParamType):
    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        host, colon, port = value.rpartition(":")
        if not colon:
            host, port = value, str(_PORT)
        if not host or not port.isdecimal() or not 0 <= int(port) < 65536:
            self.fail(f"{value} is not HOST:PORT, such as node1:{_PORT}", param, context)
        return f"{host}:{port}"


def _print_slurm_script(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        click.echo(_SLURM_SCRIPT)
        context.exit()


@click.command("torchrun", short_help="Train on nodes that may come and go.")
@click.argument("config")
@options.overrides
@options.no_plugins
@click.option("--run-dir", metavar="DIR", help="Keep the run in DIR/<run.name>, on storage that all nodes share.")
@click.option("--resume", is_flag=True, help="Go on with a run that exists, from its newest whole checkpoint.")
@click.option("--auto-resume", is_flag=True, help="Go on with the run if it exists, else begin it.")
@click.option(
    "--nnodes", type=_NodesType(), default="1", show_default=True, help="How many nodes, or the fewest and the most."
)
@click.option(
    "--nproc-per-node",
    type=click.IntRange(min=1),
    help="Workers on this node. Default: one for each of its GPUs, or workers.initial where it has none.",
)
@click.option(
    "--rdzv-endpoint", type=_EndpointType(), help="Where the agents meet: a node that stays. Needed with several nodes."
)
@click.option("--rdzv-id", metavar="ID", help="Names this launch, alike on all of its nodes, and no other launch.")
@click.option("--rdzv-backend", default="c10d", show_default=True, metavar="NAME", help="As torchrun knows them.")
@click.option(
    "--rdzv-conf", "rdzv_settings", multiple=True, metavar="KEY=VALUE", help="A setting of the rendezvous, as torch's."
)
@click.option("--local-addr", metavar="ADDRESS", help="Where other nodes reach this one, if not by its host name.")
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    help="Failures, and nodes that leave, survived by this agent. Default: recovery.max_failures.",
)
@click.option(
    "--slurm-script",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_slurm_script,
    help="Say where the script for Slurm lies, and exit.",
)
def torchrun_command(
    config: str,
    overrides: tuple[str, ...],
    no_plugins: bool,
    run_dir: str | None,
    resume: bool,
    auto_resume: bool,
    nnodes: tuple[int, int],
    nproc_per_node: int | None,
    rdzv_endpoint: str | None,
    rdzv_id: str | None,
    rdzv_backend: str,
    rdzv_settings: tuple[str, ...],
    local_addr: str | None,
    max_restarts: int | None,
) -> None:
    """Train CONFIG with the workers of this node and those of the other nodes where the same command is given.

    \b
    Nodes may come and go within --nnodes MIN:MAX; the batch stays, and is shared out anew.
    SIGTERM and Ctrl-C save, and take this node out; a second Ctrl-C ends at once.
    Exit codes:
      0    finished, or ended as planned: by its budget or by order
      130  stopped by a signal; --resume goes on
      1    failed
      2    refused before it started
    """
    if nnodes[1] > 1 and (rdzv_endpoint is None or rdzv_id is None):
        raise click.UsageError(
            "several nodes meet by --rdzv-endpoint HOST:PORT and --rdzv-id ID: give all of them the same ones, with an "
            "ID that no other launch had, such as a job's number"
        )
    rendezvous = {"last_call_timeout": str(_LAST_CALL_TIMEOUT_S)}
    for setting in rdzv_settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--rdzv-conf {setting} is not KEY=VALUE")
        rendezvous[key] = value
    rdzv_id = rdzv_id or str(uuid.uuid4())
    try:
        settings = read_config(config, overrides, run_dir=run_dir, plugins=not no_plugins)
        path = run_folder(settings)
        if run_url(settings) is not None:
            from orchestrator.runtime.at_url import bring_lines  # brings torch

            bring_lines(settings)
        going_on = goes_on(path, launch=rdzv_id, resume=resume, auto_resume=auto_resume)
        done = nothing_to_do(settings, path) if going_on else None
        if done is not None:
            say(done)
            sys.exit(0)
    except GroundswellError as error:
        say(str(error), error=True)
        sys.exit(EXIT_REFUSED)
    quiet_libraries()
    _set_environment(settings, os.environ)
    given = [f"--nnodes={nnodes[0]}:{nnodes[1]}", f"--nproc-per-node={nproc_per_node or _workers_here(settings)}"]
    given += [f"--rdzv-id={rdzv_id}", f"--rdzv-backend={rdzv_backend}"]
    given += [f"--rdzv-endpoint={rdzv_endpoint or 'localhost:0'}"]
    given += [f"--rdzv-conf={','.join(f'{key}={value}' for key, value in rendezvous.items())}"]
    given += [] if local_addr is None else [f"--local-addr={local_addr}"]
    given += [f"--max-restarts={settings.recovery.max_failures if max_restarts is None else max_restarts}"]
    given += ["-m", "launch.torchrun"]
    given += [part for override in overrides for part in ("--set", override)]
    given += ["--no-plugins"] * no_plugins
    given += [] if run_dir is None else ["--run-dir", run_dir]
    given += ["--resume"] * resume + ["--auto-resume"] * auto_resume + ["--elastic"] * (nnodes[1] > 1)
    with tempfile.TemporaryDirectory() as scratch:
        refusal = Path(scratch) / "refusal"
        code = _run_agent([*given, "--refusal", str(refusal), "--", config])
        if refusal.exists():
            say(refusal.read_text(encoding="utf-8"), error=True)
            sys.exit(EXIT_REFUSED)
    if code == 0 and not is_finished(settings, path) and planned_end(path) is None:
        code = EXIT_STOPPED
    if code == EXIT_STOPPED:
        say(f"Stopped; the same command with --resume goes on with {path}.", error=True)
    sys.exit(code)


def _set_environment(settings: RunConfig, environment: MutableMapping[str, str]) -> None:
    """What torch's agent, and the workers that inherit it, need to find in ``environment``."""
    # Where agents share one store, torch 2.13 publishes the address of rank zero in its first round only, and an agent
    # that joins later waits for it without end (dynamic_rendezvous.py, next_rendezvous).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    environment["OMP_NUM_THREADS"] = str(settings.workers.threads)
    # How long a save may take after SIGTERM, before the agent kills the workers; 30 s are torch's default.
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_PATIENCE_S))


def _workers_here(settings: RunConfig) -> int:
    import torch

    return torch.cuda.device_count() or settings.workers.initial


def _run_agent(arguments: list[str]) -> int:
    """Run the agent until its workers have ended, and say how; the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    def take(number: int, frame: FrameType | None) -> None:
        raise SignalException(f"signal {number}", signal.Signals(number))

    # The agent installs handlers of its own with its first workers; it may wait long for other nodes before.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, take)
    try:
        run(parse_args(arguments))
        return 0
    except SignalException:
        return EXIT_STOPPED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        say(f"The run failed: rank {rank} ended with {how}, and no restart is left (--max-restarts).", error=True)
    except RendezvousError as error:
        say(
            f"The run failed on this node: the agents cannot meet ({error or type(error).__name__}). Either the run "
            "has ended, or the node named by --rdzv-endpoint has, or is not reached from here.",
            error=True,
        )
    return EXIT_FAILED
