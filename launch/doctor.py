"""``groundswell doctor``: what this machine has, what is wrong, and how to mend it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click

_LEAST_FREE_GB = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report; ``fix`` is there exactly when something is wrong."""

    what: str
    seen: str
    fix: str | None = None


@click.command("doctor")
@click.option("--address", metavar="ADDRESS", help="Also try to reach this Ray cluster.")
@click.option("--run-dir", default="runs", show_default=True, metavar="DIR", help="Where runs would be kept.")
def doctor_command(address: str | None, run_dir: str) -> None:
    """Check versions, devices, Ray and disk; exit code 1 if something needs mending."""
    wrong = 0
    for finding in examine(address=address, run_dir=Path(run_dir)):
        wrong += finding.fix is not None
        click.echo(f"{'ok   ' if finding.fix is None else 'WRONG'} {finding.what}: {finding.seen}")
        if finding.fix is not None:
            click.echo(f"      to mend it: {finding.fix}")
    sys.exit(1 if wrong else 0)


def examine(*, address: str | None, run_dir: Path) -> Iterator[Finding]:
    yield _python()
    yield from (_version(name, lowest, below) for name, lowest, below in _RANGES)
    for check in (_devices, _import_ray):
        yield _guarded(check)
    yield _disk(run_dir)
    if address is not None:
        yield _reach(address)
        if address != "local":
            yield _shared(run_dir)


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
    return Finding(what="devices", seen=f"no GPU; the CPU with {torch.get_num_threads()} threads")


def _import_ray() -> Finding:
    import ray.train

    from orchestrator.ray_train import policy

    return Finding(what="Ray Train", seen=f"{ray.__version__}; the internals that {policy.__name__} uses are there")


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever a broken installation raises is the finding
        fix = "reinstall: pip install --force-reinstall groundswell"
        return Finding(
            what=check.__name__.strip("_").replace("_", " "), seen=f"{type(error).__name__}: {error}", fix=fix
        )


def _disk(run_dir: Path) -> Finding:
    place = run_dir.resolve()
    while not place.exists():
        place = place.parent
    free_gb = shutil.disk_usage(place).free / 1e9
    fix = None if free_gb >= _LEAST_FREE_GB else f"free at least {_LEAST_FREE_GB:g} GB, or choose another --run-dir"
    return Finding(what="disk", seen=f"{free_gb:.1f} GB free at {place}", fix=fix)


def _reach(address: str) -> Finding:
    import ray

    try:
        ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=False)
        resources = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
    except Exception as error:  # any failure to connect is the finding
        fix = "start a head with: ray start --head; or name the right address"
        return Finding(what="Ray cluster", seen=f"{address}: {type(error).__name__}: {error}", fix=fix)
    finally:
        ray.shutdown()
    seen = f"{address}: {nodes} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    return Finding(what="Ray cluster", seen=seen)


def _shared(run_dir: Path) -> Finding:
    return Finding(
        what="storage", seen=f"{run_dir.resolve()}; with several nodes it must be on storage that all of them share"
    )
