"""What travels with a job: the working directory without what a run does not need, and the config that was checked.

Ray packs, uploads and unpacks it. Of Ray's packing module two private functions are used here and nowhere else: its
walk, so that what is weighed is what travels, and its zip, to which the config is added.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.ray_jobs.head import ClusterError
from orchestrator.config import RunConfig, to_yaml

CONFIG_FOLDER = ".groundswell"
LARGEST_FILE_BYTES = 100 * 2**20  # data and weights; a module is never that long
# Patterns of .gitignore. What Git or Ray were told to ignore stays here as well.
EXCLUDES = (
    ".git", ".hg", ".svn", ".venv", "__pycache__", "*.pyc", ".mypy_cache", ".pytest_cache", ".ruff_cache",
    ".hypothesis", ".ipynb_checkpoints", ".tox", ".nox", "node_modules", "*.egg-info", "/runs", "/wandb", "/mlruns",
    "/lightning_logs", f"/{CONFIG_FOLDER}",
)  # fmt: skip
# What commonly holds passwords, tokens and keys.
SECRETS = (
    ".env", ".env.*", ".netrc", "_netrc", ".pypirc", ".git-credentials", ".npmrc", ".aws", ".azure", ".gcloud", ".ssh",
    ".ray", ".kube", ".docker", "kubeconfig", "*.kubeconfig", "*.pem", "*.p12", "id_rsa*", "id_dsa*", "id_ecdsa*",
    "id_ed25519*",
)  # fmt: skip
# What a virtual environment holds of its own, where the working directory is one, with the code beside that.
_ENVIRONMENT = ("/pyvenv.cfg", "/bin", "/include/python*", "/lib/python*", "/lib64")
_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files of a directory that travel, those that may be secret and those that stay for their size.

    Bytes by relative path. What Git or Ray were told to ignore is in none of them.
    """

    files: Mapping[str, int]
    secret: Mapping[str, int]
    too_large: Mapping[str, int]
    excludes: tuple[str, ...]  # patterns of all that stays, beyond what Git and Ray were told

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What was packed: the config's path in it, and how many files are beside that."""

    config_path: str
    num_files: int


def contents(directory: Path) -> Contents:
    """What of ``directory`` would travel."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    directory = directory.absolute()
    files: dict[str, int] = {}

    def see(path: Path) -> None:
        if path.is_file():
            files[str(path.relative_to(directory))] = path.stat().st_size

    excludes = [*EXCLUDES, *(_ENVIRONMENT if (directory / "pyvenv.cfg").exists() else ())]
    _dir_travel(directory, [_get_excludes(directory, excludes)], see, include_gitignore=_heeds_gitignore())
    environments = [str(Path(name).parent) for name in files if Path(name).name == "pyvenv.cfg"]
    inside = tuple(f"{environment}/" for environment in environments)
    files = {name: size for name, size in files.items() if not name.startswith(inside)}
    is_secret = _get_excludes(directory, list(SECRETS))
    secret = {name: size for name, size in files.items() if is_secret(directory / name)}
    large = {name: size for name, size in files.items() if size > LARGEST_FILE_BYTES and name not in secret}
    kept = {name: size for name, size in files.items() if name not in large and name not in secret}
    excludes += SECRETS
    excludes += [f"/{_literally(name)}" for name in (*environments, *large)]
    return Contents(files=kept, secret=secret, too_large=large, excludes=tuple(excludes))


def pack(directory: Path, config: RunConfig, *, found: Contents, target: Path) -> Package:
    """Zip ``directory``, whose contents were ``found``, and the config into ``target``.

    Raises ``ClusterError`` above the size that Ray takes, naming the largest entries.
    """
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package

    if found.size_bytes >= GCS_STORAGE_MAX_SIZE:
        raise ClusterError(
            f"{directory} holds {in_bytes(found.size_bytes)} to send, and Ray takes less than "
            f"{in_bytes(GCS_STORAGE_MAX_SIZE)}. The largest: {_largest(found.files)}. Name what the run does not need "
            "in .gitignore or .rayignore, or keep data on storage that the cluster reads"
        )
    create_package(
        str(directory.absolute()), target, include_gitignore=_heeds_gitignore(), excludes=list(found.excludes)
    )
    name = f"{CONFIG_FOLDER}/{config.run.name}.yaml"
    # A fixed date: what did not change is not uploaded again, for Ray names a package by its bytes.
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o644 << 16
    with zipfile.ZipFile(target, "a") as package:
        num_files = sum(not name.endswith("/") for name in package.namelist())
        package.writestr(entry, to_yaml(config))
    return Package(config_path=name, num_files=num_files)


def left_behind(found: Contents) -> list[str]:
    """Which files stay though nobody said so, in a line for those that may be secret and one for those too large."""
    lines = []
    if found.secret:
        names = sorted(found.secret)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"not sent, for such files commonly hold secrets: {', '.join(names[:_NAMED])}{more}")
    if found.too_large:
        limit = in_bytes(LARGEST_FILE_BYTES)
        lines.append(f"not sent, for files above {limit} stay here: {_largest(found.too_large)}")
    return lines


def in_bytes(count: int) -> str:
    """``1.5 MiB``."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count} bytes"


def _largest(files: Mapping[str, int]) -> str:
    """The largest entries of the top level, and in folders the largest file."""
    sums: dict[str, int] = {}
    for name, size in files.items():
        top = name.split("/")[0] + ("/" if "/" in name else "")
        sums[top] = sums.get(top, 0) + size
    named = []
    for top in sorted(sums, key=lambda top: -sums[top])[:_NAMED]:
        inside = max((name for name in files if name.startswith(top)), key=lambda name: files[name])
        named.append(f"{top} {in_bytes(sums[top])}" + (f" (of it {inside})" if top.endswith("/") else ""))
    return ", ".join(named)


def _literally(name: str) -> str:
    return re.sub(r"([\\*?\[\]!# ])", r"\\\1", name)


def _heeds_gitignore() -> bool:
    return os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"  # as Ray's own client reads it
