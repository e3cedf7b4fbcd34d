"""Makes a run's folder ready for an attempt, and leaves one that another process writes as it is."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.config import RunConfig, load_config, to_yaml
from orchestrator.config.differences import differences, refuse_changes
from orchestrator.config.places import is_url
from orchestrator.errors import ConfigError, StorageError
from orchestrator.runtime import folder
from orchestrator.runtime.tracking import check_libraries


def run_folder(config: RunConfig) -> Path:
    """Where the run lies, for all who ask; ``~`` in ``run.dir`` is the home of the process that asks.

    A run that is kept at a URL lies here only while it trains.
    """
    if run_url(config) is None:
        return Path(os.path.expanduser(config.run.dir)) / config.run.name
    scratch = config.run.scratch
    own = Path(tempfile.gettempdir()) / f"groundswell-{os.getuid()}" if scratch is None else Path(scratch).expanduser()
    return own / hashlib.sha256(config.run.dir.encode()).hexdigest()[:12] / config.run.name


def run_url(config: RunConfig) -> str | None:
    """Where the run is kept, if that is not its folder."""
    return f"{config.run.dir.rstrip('/')}/{config.run.name}" if is_url(config.run.dir) else None


def from_anywhere(config: RunConfig) -> RunConfig:
    """The same config for processes whose current folder is another one."""
    above = run_folder(config).parent.resolve()
    key, place = ("dir", above) if run_url(config) is None else ("scratch", above.parent)
    return config.model_copy(update={"run": config.run.model_copy(update={key: str(place)})})


def prepare(config: RunConfig, *, resume: bool) -> Path:
    """Make a new run's folder with its resolved config, or check the one to resume.

    Raises ``RunFolderError``, and ``ConfigError`` for a library that the config needs and that is not there, and for a
    config that the run cannot go on with.
    """
    check_libraries(config)
    if run_url(config) is not None:
        from orchestrator.runtime.at_url import (
            bring_lines,
        )  # with torch, which few who ask where a run lies have use of

        bring_lines(config)
    folder.check(run_folder(config), resume=resume)
    with claimed(config) as path:
        folder.check(path, resume=resume)  # once more: a run may have begun while the lock was waited for
        write_config(config, path)
    return path


@contextmanager
def claimed(config: RunConfig, *, patience_s: float = folder.PATIENCE_S) -> Iterator[Path]:
    """Hold the lock of the run's folder, which is made where it is not there, for what only a writer may change there.

    The attempt that begins takes the lock anew. Raises ``RunFolderError`` where another process has it for longer than
    ``patience_s``.
    """
    path = run_folder(config)
    folder.make(path)
    lock = folder.take_lock(path, patience_s=patience_s)
    try:
        yield path
    finally:
        lock.release()


def refuse_changed_config(config: RunConfig, path: Path) -> None:
    """Raises ``ConfigError`` where the run in ``path`` has checkpoints, of a config that is too unlike."""
    if not any((path / "checkpoints").glob("step-*")):
        return  # it begins again
    source = path / folder.CONFIG
    try:
        before = load_config(source)
    except ConfigError:  # torn, or of another version: each checkpoint has its own
        return
    found = differences(before.model_dump(mode="json"), config)
    refuse_changes(found, accepted=config.recovery.accept_changed, source=str(source))


def write_config(config: RunConfig, path: Path) -> None:
    """What an attempt finds as it begins: its config, and no request to stop that was meant for the one before.

    Raises ``ConfigError`` where the run that is there cannot go on with it.
    """
    refuse_changed_config(config, path)
    try:
        (path / folder.STOP_REQUEST).unlink(missing_ok=True)
        (path / folder.CONFIG).write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write {path / folder.CONFIG}: {error}; make room or mend the storage, or choose another folder "
            "with --run-dir"
        ) from error
