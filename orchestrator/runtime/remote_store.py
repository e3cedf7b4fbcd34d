"""A run's files at a URL, through fsspec: read and written whole, for object stores know no other way.

Every failure of a service is a ``StorageError`` that names the file; the libraries behind fsspec raise exceptions of
their own that share no base. They also try again by themselves when a service stumbles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from orchestrator.errors import ConfigError, Problem, StorageError

# A file appears there whole once it has been sent; elsewhere it is sent under another name, and renamed.
_WHOLE_OR_NOT = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_PART = ".part"


@final
class RemoteFolder:
    """The files below ``url``, by their names relative to it, such as ``checkpoints/step-000000128/manifest.json``.

    Raises ``ConfigError`` where the library for its kind of storage is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        options: dict[str, Any] = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        try:
            # What another machine wrote since is to be seen: nothing is remembered between two looks.
            self._files, self._root = url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            fix = f"pip install 'groundswell[{extra}]' wherever the run trains" if extra else str(error)
            rule = f"{protocol}:// needs a library that is not installed here ({error.name or error})"
            raise ConfigError(Problem(source=None, key="run.dir", value=url, rule=rule, fix=fix)) from error
        except Exception as error:
            raise StorageError(f"cannot open {self.url}: {_said(error)}") from error
        self._root = self._root.rstrip("/")
        self._whole = protocol in _WHOLE_OR_NOT

    def read(self, name: str, *, first: int = 0) -> bytes | None:
        """A file's bytes from number ``first`` on; ``None`` if it is not there."""
        with self._asking("read", name):
            try:
                if first == 0:
                    return bytes(self._files.cat_file(self._path(name)))
                if int(self._files.size(self._path(name))) <= first:
                    return b""
                return bytes(self._files.cat_file(self._path(name), start=first))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, whole or not at all."""
        with self._asking("write", name), self._arriving(name) as path:
            self._files.pipe_file(path, data)

    def send(self, local: Path, name: str, *, moved: Callable[[], None]) -> None:
        """Replace a file by a local one; ``moved`` is called when some of it has arrived.

        Raises ``FileNotFoundError`` where the local one is gone.
        """
        size = local.stat().st_size  # before anything is asked for: a local file that is gone is no fault of theirs
        with self._asking("write", name), self._arriving(name) as path:
            if size == 0:
                self._files.pipe_file(path, b"")
            else:
                self._files.put_file(str(local), path, callback=_callback(moved))
        moved()

    def fetch(self, name: str, local: Path) -> bool:
        """Copy a file to ``local``, whole or not at all; whether it is there."""
        local.parent.mkdir(parents=True, exist_ok=True)
        part = local.with_name(f"{local.name}{_PART}")
        with self._asking("read", name):
            try:
                self._files.get_file(self._path(name), str(part))
            except FileNotFoundError:
                part.unlink(missing_ok=True)
                return False
        part.replace(local)
        return True

    def sizes(self, below: str = "") -> dict[str, int]:
        """The bytes of each file, by name, below the folder ``below``, at any depth."""
        with self._asking("list", below):
            found = self._files.find(self._path(below).rstrip("/"), detail=True)
        sizes = {}
        for path, info in found.items():
            name = path.removeprefix(f"{self._root}/")
            # A folder that is empty in one moment and not in the next is listed as one. And a name with .. would be
            # fetched to somewhere else.
            if info["type"] == "file" and not name.endswith(_PART) and ".." not in name.split("/"):
                sizes[name] = int(info["size"])
        return sizes

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is removed already."""
        with self._asking("remove", name):
            try:
                self._files.rm_file(self._path(name))
            except FileNotFoundError:
                return

    @contextmanager
    def _arriving(self, name: str) -> Iterator[str]:
        """Under which path to send a file, so that it appears whole."""
        path = self._path(name)
        if self._whole:
            yield path
            return
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        yield path + _PART
        self._files.mv(path + _PART, path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _asking(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise StorageError(f"cannot {what} {self.url}/{name}: {_said(error)}") from error


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _callback(moved: Callable[[], None]) -> Any:
    from fsspec.callbacks import Callback

    class Moved(Callback):
        def relative_update(self, inc: int = 1) -> None:
            moved()

    return Moved()
