"""What lies in a run's folder of checkpoints: which are there, what each says of itself, and whether it is whole.

A checkpoint is a folder ``step-000000128`` with the tensors and their index as ``torch.distributed.checkpoint`` writes
them, ``meta.json``, and ``manifest.json``: size and checksum of every file, and of the manifest itself. Nothing here
needs torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
META = "meta.json"
_INDEX = ".metadata"
_NAME = re.compile(r"step-(\d{9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A checkpoint that could not be used, and why."""

    path: str
    why: str


def found(folder: Path) -> list[tuple[int, Path]]:
    """``(step, path)`` of each checkpoint in ``folder``, newest first."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def found_within(folder: Path) -> list[tuple[int, Path]]:
    """The same of a run's folder, or of its checkpoints; or ``folder`` itself, if it is one."""
    name = _NAME.fullmatch(folder.name)
    if name or (folder / MANIFEST).exists():
        return [(int(name[1]) if name else 0, folder)] if folder.is_dir() else []
    inside = folder / "checkpoints"
    return found(inside if inside.is_dir() else folder)


def choose(candidates: list[tuple[int, Path]]) -> tuple[Path | None, tuple[Fault, ...]]:
    """The first that is whole, and those before it that are not."""
    faults: list[Fault] = []
    for _, path in candidates:
        why = verify(path)
        if why is None:
            return path, tuple(faults)
        faults.append(Fault(path=str(path), why=why))
    return None, tuple(faults)


def verify(path: Path, *, checksums: bool = True) -> str | None:
    """What is wrong with the checkpoint at ``path``, or ``None`` when every file is as it was written.

    Without ``checksums`` only the sizes of its files are looked at, which costs nothing.
    """
    try:
        manifest = read_manifest(path)
        for name, (size, checksum) in manifest.items():
            file = path / name
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written"
            if checksums and digest(file) != checksum:
                return f"{name} has changed since it was written (its checksum differs)"
    except (OSError, ValueError, TypeError) as error:
        return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return None


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """``(bytes, checksum)`` by file. Raises ``ValueError``, ``TypeError`` or ``OSError`` where it proves nothing."""
    manifest = json.loads((path / MANIFEST).read_text())
    if not isinstance(manifest, dict) or not {META, _INDEX} <= manifest.keys():
        raise ValueError(f"{MANIFEST} does not list the checkpoint's files")
    files = {name: (int(size), str(checksum)) for name, (size, checksum) in manifest.items() if name != MANIFEST}
    # Older ones have none of their own. Where a changed byte spoils that key, it names a file that is not there.
    if MANIFEST in manifest and manifest[MANIFEST] != list(_of_itself(files)):
        raise ValueError(f"{MANIFEST} has changed since it was written (its checksum differs)")
    return files


def write_manifest(path: Path) -> None:
    """Of all files that are in ``path``."""
    files = {
        str(file.relative_to(path)): (file.stat().st_size, digest(file))
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    (path / MANIFEST).write_text(json.dumps(files | {MANIFEST: _of_itself(files)}, indent=1))


def read_meta(path: Path) -> dict[str, Any]:
    """What the checkpoint keeps besides tensors."""
    meta: dict[str, Any] = json.loads((path / META).read_text())
    return meta


def digest(file: Path) -> str:
    """BLAKE2b of 16 bytes, in hexadecimal."""
    with file.open("rb") as stream:
        hashed = hashlib.blake2b(digest_size=16)
        while block := stream.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def _of_itself(files: Mapping[str, tuple[int, str]]) -> tuple[int, str]:
    """How many files, and the checksum of what is said of them."""
    text = json.dumps(sorted((name, *entry) for name, entry in files.items()))
    return len(files), hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
