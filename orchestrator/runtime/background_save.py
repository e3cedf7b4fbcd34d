"""A checkpoint that is written while training goes on: a copy of the state in host memory, and a thread that writes it.

Training stands still for the copy alone. Nothing here talks to other ranks: the thread of a rank must not use a process
group that its training uses.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter


@final
class HostCopy:
    """Copies a tree of tensors and plain data into host memory, which the next copy uses again.

    It stays taken between two copies: to take it anew costs as much time as the copy itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def of(self, tree: Any) -> Any:
        """What is copied is overwritten by the next call. Tensors on several devices may be among it."""
        copied = self._copied(tree, ())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into pinned memory are still on their way
        return copied

    def _copied(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._buffer(value.detach(), path)
        if isinstance(value, Mapping):
            return {key: self._copied(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copied(inner, (*path, i)) for i, inner in enumerate(value))
        return copy.deepcopy(value)

    def _buffer(self, tensor: Tensor, path: tuple[Any, ...]) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            on_device = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_device)
            self._buffers[path] = buffer
        return buffer.copy_(tensor, non_blocking=True)


@final
class BackgroundSave:
    """``work`` in a thread of its own, from now on; it returns what went wrong, if something did."""

    def __init__(self, work: Callable[[], str | None]) -> None:
        self._work = work
        self._problem: str | None = None
        self._began_s = time.perf_counter()
        self._took_s = 0.0
        self._thread = threading.Thread(target=self._run, name="groundswell-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> tuple[str | None, float]:
        """Wait for its end: what went wrong, and the seconds that it took."""
        self._thread.join()
        return self._problem, self._took_s

    def _run(self) -> None:
        try:
            self._problem = self._work()
        except (Exception, CheckpointException) as error:  # nobody else would hear of it
            self._problem = f"{type(error).__name__}: {error}"
        self._took_s = time.perf_counter() - self._began_s


class _FoldersThatAreThere(FileSystem):
    """Makes none: a folder that went away would come back empty, above a checkpoint that nobody looks for there."""

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        pass


def writer_into(path: Path) -> FileSystemWriter:
    """Of tensors, into a folder that was made before and is not made anew."""
    writer = FileSystemWriter(path)
    writer.fs = _FoldersThatAreThere()
    return writer


def write_alone(tree: Mapping[str, Any], path: Path) -> None:
    """Write ``tree`` to ``path`` as ``torch.distributed.checkpoint`` does, without the other ranks.

    Its own ``save(no_dist=True)`` warns whenever it is called, and a warning is filtered for all threads or for none.
    """
    planner, writer = DefaultSavePlanner(), writer_into(path)
    writer.reset(path)
    planner.set_up_planner(dict(tree), writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    written = writer.write_data(planner.finish_plan(plan), planner)
    written.wait()
    writer.finish(metadata, [written.value()])
