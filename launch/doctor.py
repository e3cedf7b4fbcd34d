"""``groundswell doctor``: what this machine has, what is wrong, and how to mend it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click

from launch.jobs import quiet_libraries
from launch.progress import counted

_LEAST_FREE_GB = 2.0
_CONNECT_PATIENCE_S = 3.0
_START_OR_NAME = "start a head with: ray start --head; or name the address that it printed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report; ``fix`` is there exactly when something is wrong."""

    what: str
    seen: str
    fix: str | None = None


@click.command("doctor", short_help="Check versions, devices, Ray and disk.")
@click.option(
    "--address", default="local", show_default=True, metavar="ADDRESS", help="Ray cluster to try; local starts one."
)
@click.option("--no-ray", is_flag=True, help="Do not try Ray: for runs under torchrun, or in one process.")
@click.option("--run-dir", default="runs", show_default=True, metavar="DIR", help="Where runs would be kept.")
def doctor_command(address: str, no_ray: bool, run_dir: str) -> None:
    """Check versions, devices, Ray and disk; exit code 1 if something needs mending."""
    quiet_libraries()
    wrong = 0
    for finding in examine(address=None if no_ray else address, run_dir=Path(run_dir)):
        wrong += finding.fix is not None
        click.echo(f"{'ok   ' if finding.fix is None else 'WRONG'} {finding.what}: {finding.seen}")
        if finding.fix is not None:
            click.echo(f"      to mend it: {finding.fix}")
    click.echo("All is well." if wrong == 0 else f"{counted(wrong, 'thing')} to mend.")
    sys.exit(1 if wrong else 0)


def examine(*, address: str | None, run_dir: Path) -> Iterator[Finding]:
    """One finding after the other, as they are made; Ray is left out where ``address`` is ``None``."""
    yield _python()
    yield from (_version(name, lowest, below) for name, lowest, below in _RANGES)
    yield _guarded("devices", _devices)
    yield _disk(run_dir)
    if address is None:
        return
    importable = _guarded("Ray Train", _import_ray)
    yield importable
    if importable.fix is None:
        yield _reach(address)
        if address != "local":
            yield _shared(run_dir)


def unreachable(address: str) -> str | None:
    """Why nobody answers at a Ray address that names a host and a port; Ray itself would try for many minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        return f"nobody answers at {address} ({error})"
    return None


_RANGES = (
    ("torch", (2, 9), (2, 14)),
    ("ray", (2, 60), (2, 61)),
    ("numpy", (1, 26), None),
    ("pydantic", (2, 10), (3, 0)),
)


def _python() -> Finding:
    seen = ".".join(str(part) for part in sys.version_info[:3])
    fix = None if sys.version_info >= (3, 10) else "use Python 3.10 or newer"
    return Finding(what="python", seen=seen, fix=fix)


def _version(name: str, lowest: tuple[int, int], below: tuple[int, int] | None) -> Finding:
    wanted = f">={lowest[0]}.{lowest[1]}" + (f",<{below[0]}.{below[1]}" if below else "")
    command = f"pip install '{name}{wanted}'"
    try:
        seen = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(what=name, seen="not installed", fix=command)
    numbers = tuple(int(part) for part in seen.split("+")[0].split(".")[:2])
    fits = numbers >= lowest and (below is None or numbers < below)
    return Finding(what=name, seen=seen, fix=None if fits else command)


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding(what="devices", seen=", ".join(names))
    cpu = f"the CPU with {counted(os.cpu_count() or 1, 'core')}"
    if shutil.which("nvidia-smi") is not None:
        seen = f"{cpu}; there is an NVIDIA driver, but torch {torch.__version__} sees no GPU"
        return Finding(
            what="devices", seen=seen, fix="see what nvidia-smi says, and install a torch built for its CUDA"
        )
    return Finding(what="devices", seen=f"no GPU; {cpu}")


def _import_ray() -> Finding:
    import ray.train

    from orchestrator.ray_train import policy

    return Finding(what="Ray Train", seen=f"{ray.__version__}; the internals that {policy.__name__} uses are there")


def _guarded(what: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever a broken installation raises is the finding
        fix = "mend what is named WRONG above, else: pip install --force-reinstall groundswell"
        return Finding(what=what, seen=_told(error), fix=fix)


def _disk(run_dir: Path) -> Finding:
    place = run_dir.expanduser().resolve()
    while not place.exists():
        place = place.parent
    free_gb = shutil.disk_usage(place).free / 1e9
    seen, fix = f"{free_gb:.1f} GB free at {place}", None
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        seen, fix = f"{place} cannot be written to", "choose another --run-dir, or change its permissions"
    elif free_gb < _LEAST_FREE_GB:
        fix = f"free at least {_LEAST_FREE_GB:g} GB, or choose another --run-dir"
    return Finding(what="disk", seen=seen, fix=fix)


def _reach(address: str) -> Finding:
    import ray

    local = address == "local"
    silence = unreachable(address)
    if silence is not None:
        return Finding(what="Ray cluster", seen=silence, fix=_START_OR_NAME)
    try:
        ray.init(
            address=address,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level="error",
        )
        resources = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
    except (Exception, SystemExit) as error:  # any failure to connect is the finding
        fix = _START_OR_NAME
        if local:
            fix = "end what an earlier Ray left behind with: ray stop; see also /tmp/ray; or use --runtime torchrun"
        return Finding(what="Ray cluster", seen=f"{address}: {_told(error)}", fix=fix)
    finally:
        ray.shutdown()
    seen = f"{address}: {counted(nodes, 'node')}, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    return Finding(what="Ray cluster", seen=seen)


def _shared(run_dir: Path) -> Finding:
    return Finding(
        what="storage", seen=f"{run_dir.resolve()}; with several nodes it must be on storage that all of them share"
    )


def _told(error: BaseException) -> str:
    """An error in one line; Ray's go on for pages."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
