"""What an attempt of a run that is kept at a URL finds in its folder: what lies there, or what has yet to go there.

The folder may be empty, of an attempt before, or ahead of the URL because its last uploads failed. Both histories are
only ever appended to, and by one writer: where the folder's events begin with those at the URL it is ahead, or up to
date; where they do not, the run went on elsewhere, and the folder is of the past.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from filelock import FileLock

from orchestrator.errors import RunFolderError, StorageError
from orchestrator.ports import Collective
from orchestrator.runtime import folder
from orchestrator.runtime.checkpoints import verify
from orchestrator.runtime.mirror import Mirror
from orchestrator.runtime.remote_checkpoints import CHECKPOINTS, committed, fetch, fetch_newest
from orchestrator.runtime.remote_store import RemoteFolder

LINES = (folder.EVENTS, folder.METRICS, folder.EVALS, folder.GROUPS, folder.LEDGER)
_NOTES = (folder.CONFIG, "launched.by")
_MANIFEST = "manifest.json"


def bring_lines(remote: RemoteFolder, path: Path, *, patience_s: float) -> None:
    """Make the folder at ``path`` hold the run's history, unless a process of this machine writes it.

    What only the folder has, since it could not be sent before, is sent. Raises ``StorageError`` where the URL is out
    of reach.
    """
    make_scratch(path)
    if folder.is_written(path):
        return
    with _alone(path):
        theirs, ours = remote.read(folder.EVENTS), _read(path / folder.EVENTS)
        if theirs is None and not ours:
            return
        if ours.startswith(theirs or b""):
            sizes = remote.sizes()
            for name in LINES:
                if _size(path / name) < sizes.get(name, 0):  # the folder was tidied up
                    remote.fetch(name, path / name)
            for name in _NOTES:
                if not (path / name).exists():
                    remote.fetch(name, path / name)
            if _is_ahead(path, remote, sizes):
                _send(path, remote, patience_s=patience_s)
        else:
            _forget(path, remote)
            for name in (*LINES, *_NOTES):
                remote.fetch(name, path / name)


def bring_checkpoint(remote: RemoteFolder, path: Path) -> None:
    """Make the newest whole checkpoint at the URL one of the folder."""
    with _alone(path):
        fetch_newest(remote, path / CHECKPOINTS)


def share_checkpoint(remote: RemoteFolder, path: Path, collective: Collective) -> None:
    """Collective. Bring what rank zero goes on from to the ranks of other nodes, which have folders of their own."""
    chosen: tuple[str, bytes] | None = None
    if collective.rank == 0:
        whole = (step for step in reversed(committed(path / CHECKPOINTS)) if verify(step) is None)
        newest = next(whole, None)
        chosen = None if newest is None else (newest.name, (newest / _MANIFEST).read_bytes())
    chosen, folder_of_zero = collective.share((chosen, str(path)))
    problem = None
    if collective.rank != 0:
        try:
            problem = _follow(remote, path, chosen, folder_of_zero)
        except (StorageError, OSError) as error:
            problem = str(error)
    mine = [0.0] * collective.world_size
    mine[collective.rank] = float(problem is not None)
    failed = [rank for rank, bad in enumerate(collective.sum(mine)) if bad]
    if failed:
        raise RunFolderError(problem or f"rank {failed[0]} could not fetch what to go on from; it says why")


def make_scratch(path: Path) -> None:
    """Make the folder that a run at a URL works in, which no other user may have made before."""
    folder.make(path)
    above = path.parent.parent
    found = above.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
        raise RunFolderError(
            f"{above} is not this user's own folder, and whoever made it could change the run: name one with "
            "run.scratch"
        )


def _alone(path: Path) -> FileLock:
    """For the processes of one node, which all would fetch the same."""
    return FileLock(path.with_name(f".{path.name}.arrival.lock"))


def _follow(remote: RemoteFolder, path: Path, chosen: tuple[str, bytes] | None, folder_of_zero: str) -> str | None:
    """On another rank: what keeps this node from going on from ``chosen``, or ``None``."""
    if str(path) != folder_of_zero:
        return (
            f"this rank would work in {path}, and rank 0 works in {folder_of_zero}: name one place that all nodes "
            "have with run.scratch"
        )
    make_scratch(path)
    with _alone(path):
        if not (path / folder.CONFIG).exists():
            remote.fetch(folder.CONFIG, path / folder.CONFIG)
        if chosen is None:
            return None
        step, manifest = chosen
        if _read(path / CHECKPOINTS / step / _MANIFEST) == manifest:
            return verify(path / CHECKPOINTS / step)
        return fetch(remote, path / CHECKPOINTS / step)


def _is_ahead(path: Path, remote: RemoteFolder, sizes: dict[str, int]) -> bool:
    manifests = {f"{CHECKPOINTS}/{step.name}/{_MANIFEST}" for step in committed(path / CHECKPOINTS)}
    newest = max((name for name in sizes if name.endswith(f"/{_MANIFEST}")), default="")
    longer = any(_whole_lines(path / name) > sizes.get(name, 0) for name in LINES)
    return longer or any(name > newest for name in manifests)


def _send(path: Path, remote: RemoteFolder, *, patience_s: float) -> None:
    lock = folder.take_lock(path, patience_s=folder.PATIENCE_S)
    try:
        mirror = Mirror(path, remote, keep=_ALL, patience_s=patience_s, say=lambda note: None)
        missing = mirror.wait()
        mirror.close()
    finally:
        lock.release()
    if missing is not None:
        raise StorageError(missing)


_ALL = 1_000_000  # checkpoints: nothing is deleted but by a run that trains


def _forget(path: Path, remote: RemoteFolder) -> None:
    """Take out of the folder what is not of the history at the URL."""
    for name in LINES:
        (path / name).unlink(missing_ok=True)
    for step in committed(path / CHECKPOINTS):
        if remote.read(f"{CHECKPOINTS}/{step.name}/{_MANIFEST}") != (step / _MANIFEST).read_bytes():
            shutil.rmtree(step, ignore_errors=True)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _whole_lines(path: Path) -> int:
    return _read(path).rfind(b"\n") + 1
