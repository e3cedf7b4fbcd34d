"""Checkpoints at a URL: sent file by file with the manifest last, and fetched whole or not at all.

One whose manifest is not there was never finished, and is none. Which to use is told by the same digests as in a
folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import final

from orchestrator.errors import StorageError
from orchestrator.runtime.checkpoints import verify
from orchestrator.runtime.remote_store import RemoteFolder

CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
_STEPS = "step-*"
_ASIDE = ".sending"


def committed(checkpoints: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    return sorted(path for path in checkpoints.glob(_STEPS) if (path / _MANIFEST).exists())


@final
class CheckpointsThere:
    """Those of the folder ``checkpoints`` at ``remote``, where ``names`` are; the newest ``keep`` stay."""

    def __init__(self, checkpoints: Path, remote: RemoteFolder, *, names: Mapping[str, int], keep: int) -> None:
        self._folder, self._remote, self._keep = checkpoints, remote, keep
        self._aside = checkpoints / _ASIDE
        self._names = {name for name in names if name.startswith(f"{CHECKPOINTS}/")}
        self._sent: set[str] = set()  # from here
        self._manifests = {
            path.name: manifest
            for path in committed(checkpoints)
            if (manifest := self._manifest(path.name)) == (path / _MANIFEST).read_bytes()
        }

    @property
    def missing(self) -> list[str]:
        """Those of the folder that are not there."""
        return [f"{CHECKPOINTS}/{path.name}" for path in committed(self._folder) if self._is_new(path)]

    def set_aside(self) -> str | None:
        """Choose the newest that is not there yet, and keep it from being deleted before it is; its name.

        The run may save, and delete, faster than the network is.
        """
        for path in reversed(committed(self._folder)):
            if self._is_new(path):
                shutil.rmtree(self._aside, ignore_errors=True)
                with suppress(FileNotFoundError, shutil.Error):  # deleted meanwhile
                    shutil.copytree(path, self._aside, copy_function=_link)
                    return path.name
        return None

    def send(self, step: str, *, moved: Callable[[], None]) -> None:
        """Send the checkpoint that was set aside, and forget what is old by it."""
        path, where = self._aside, f"{CHECKPOINTS}/{step}"
        manifest = (path / _MANIFEST).read_bytes()
        self._remove(f"{where}/{_MANIFEST}")  # of the same step, saved before
        self._manifests.pop(step, None)
        for name in json.loads(manifest):
            self._names.add(f"{where}/{name}")
            self._remote.send(path / name, f"{where}/{name}", moved=moved)
        self._names.add(f"{where}/{_MANIFEST}")
        self._remote.write(f"{where}/{_MANIFEST}", manifest)
        self._manifests[step] = manifest
        self._sent.add(step)
        self._look_again()
        moved()
        shutil.rmtree(path, ignore_errors=True)

    def _is_new(self, path: Path) -> bool:
        try:
            return self._manifests.get(path.name) != (path / _MANIFEST).read_bytes()
        except FileNotFoundError:
            return False

    def forget_old(self) -> None:
        """As the run's own store does, once a newer one is there: those beyond ``keep``, and those of later steps."""
        here = {path.name for path in committed(self._folder)}
        newest = max(here & self._sent, default=None)
        if newest is None:
            return
        steps = sorted({name.split("/")[1] for name in self._names}, reverse=True)
        whole = [step for step in steps if f"{CHECKPOINTS}/{step}/{_MANIFEST}" in self._names]
        kept = [step for step in whole if step <= newest][: self._keep]
        for step in steps:
            if step not in kept and step not in here:
                self._forget(step)

    def _look_again(self) -> None:
        """What a process that is dead had sent may arrive only after its end, and after this one's beginning."""
        self._names |= self._remote.sizes(CHECKPOINTS).keys()

    def _forget(self, step: str) -> None:
        files = sorted(name for name in self._names if name.startswith(f"{CHECKPOINTS}/{step}/"))
        for name in sorted(files, key=lambda name: not name.endswith(f"/{_MANIFEST}")):  # the manifest first
            self._remove(name)
        self._manifests.pop(step, None)

    def _remove(self, name: str) -> None:
        if name in self._names:
            self._remote.remove(name)
            self._names.discard(name)

    def _manifest(self, step: str) -> bytes | None:
        name = f"{CHECKPOINTS}/{step}/{_MANIFEST}"
        return self._remote.read(name) if name in self._names else None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def fetch_newest(remote: RemoteFolder, checkpoints: Path) -> None:
    """Make the newest whole checkpoint at ``remote`` one of the folder ``checkpoints``.

    Those that are not whole there come too, so that the run's own store passes them over, and says so.
    """
    names = remote.sizes(CHECKPOINTS)
    there = sorted((name.split("/")[1] for name in names if name.endswith(f"/{_MANIFEST}")), reverse=True)
    for step in there:
        if any(path.name > step and verify(path) is None for path in committed(checkpoints)):
            return  # not sent yet
        if fetch(remote, checkpoints / step) is None:
            return


def fetch(remote: RemoteFolder, path: Path) -> str | None:
    """Make the checkpoint of that name at ``remote`` the one at ``path``; what is wrong with it, or ``None``."""
    where = f"{CHECKPOINTS}/{path.name}"
    manifest = remote.read(f"{where}/{_MANIFEST}")
    with suppress(OSError):
        if manifest == (path / _MANIFEST).read_bytes() and verify(path) is None:
            return None
    if manifest is None:
        return f"{remote.url}/{where} is not there"
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name in remote.sizes(where):
            remote.fetch(name, partial / name.removeprefix(f"{where}/"))
        why = verify(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error}; make room, or name another place with run.scratch"
        ) from error
    return why
