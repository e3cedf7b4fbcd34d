"""Reads a checkpoint without running what might be hidden in it.

A checkpoint may come from somewhere else, and Python's pickle runs whatever a file tells it to. ``torch`` reads tensors
with ``weights_only``, but ``torch.distributed.checkpoint`` unpickles its index, and everything that is not a tensor,
without a question (torch 2.13). Here both are held to plain data.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, final

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from orchestrator.errors import CheckpointError

_INDEX = ".metadata"
_OF_AN_INDEX = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.serialization", "_get_layout"),  # looks a name up in a table
    }
)
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")


@final
class CheckpointReader(FileSystemReader):
    """``FileSystemReader`` that makes nothing of the index but what an index is made of.

    Raises ``CheckpointError`` for an index that names something else, or a file outside the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self._folder / _INDEX).open("rb") as file:
            index = _IndexUnpickler(file, self._folder).load()
        if not isinstance(index, Metadata):
            raise CheckpointError(_refusal(self._folder, f"its index is of type {type(index).__name__}"))
        for info in (index.storage_data or {}).values():
            inside = (self._folder / info.relative_path).resolve()
            if not inside.is_relative_to(self._folder.resolve()):
                raise CheckpointError(_refusal(self._folder, f"its index names a file outside it, {inside}"))
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


@final
class PlainDataPlanner(DefaultLoadPlanner):
    """``DefaultLoadPlanner`` that reads what is not a tensor with ``weights_only`` too."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain, refused = None, False
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            refused = True
        if refused:  # out of the handler: torch's own words are many, and would be taken for the first cause
            raise ValueError(
                f"{read_item.dest_index.fqn} is not plain data, and reading it could run code; if you trust it, name "
                "its classes with torch.serialization.add_safe_globals before resuming"
            )
        # What the planner is given, and unpickles freely, was written here, of plain data.
        own = io.BytesIO()
        torch.save(plain, own)
        own.seek(0)
        super().load_bytes(read_item, own)


@final
class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, folder: Path) -> None:
        super().__init__(file)
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _OF_AN_INDEX
        known = known or (module.split(".")[0] == "pathlib" and name in _PATHS)
        known = known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        if not known:
            raise CheckpointError(_refusal(self._folder, f"its index names {module}.{name}, which could run code"))
        return super().find_class(module, name)


def _refusal(folder: Path, why: str) -> str:
    return (
        f"checkpoint {folder} was not read: {why}, and no checkpoint that a run wrote has such; use one whose origin "
        "you know"
    )
