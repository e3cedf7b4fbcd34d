"""A run whose config keeps it at a URL, from its beginning to its end; of all others nothing is done here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig, to_yaml
from orchestrator.ports import Collective
from orchestrator.runtime import arrival, folder
from orchestrator.runtime.mirror import Mirror
from orchestrator.runtime.preparation import run_folder, run_url
from orchestrator.runtime.remote_store import RemoteFolder


def bring_lines(config: RunConfig) -> None:
    """Make the run's folder here hold its history; what could not be sent before is sent.

    Raises ``StorageError`` where the URL is out of reach, ``ConfigError`` without the library for it, and
    ``RunFolderError`` where another machine writes there what this one would send.
    """
    url = run_url(config)
    if url is not None:
        arrival.bring_lines(RemoteFolder(url), run_folder(config), patience_s=config.run.upload_patience_s)


def bring_run(config: RunConfig) -> None:
    """Rank zero's: the same with the newest checkpoint, before it opens the run."""
    url = run_url(config)
    if url is None:
        return
    bring_lines(config)
    path = run_folder(config)
    text = to_yaml(config)  # who launched the run may have written it on another node
    if not (path / folder.CONFIG).exists() or (path / folder.CONFIG).read_text(encoding="utf-8") != text:
        (path / folder.CONFIG).write_text(text, encoding="utf-8")
    arrival.bring_checkpoint(RemoteFolder(url), path)


def share_run(config: RunConfig, collective: Collective) -> None:
    """Collective. Give the nodes without rank zero what it goes on from. Raises ``RunFolderError`` on every rank."""
    url = run_url(config)
    if url is not None:
        arrival.share_checkpoint(RemoteFolder(url), run_folder(config), collective)


def mirror_of(config: RunConfig, path: Path, *, say: Callable[[Mapping[str, Any]], None]) -> Mirror | None:
    """What carries the folder at ``path``, whose lock the caller holds, to the run's URL, if it has one."""
    url = run_url(config)
    if url is None:
        return None
    keep, patience_s = config.checkpoint.keep, config.run.upload_patience_s
    return Mirror(path, RemoteFolder(url), keep=keep, patience_s=patience_s, say=say)
