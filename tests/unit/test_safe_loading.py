"""A checkpoint made to run code when it is read is refused, and its code does not run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from orchestrator.errors import CheckpointError
from orchestrator.runtime.checkpoint_files import digest
from orchestrator.runtime.checkpoints import CheckpointStore, load_weights, verify
from orchestrator.runtime.collective import Solo
from tests.support import mlp


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self._trace), 0o777, True)


def store(place: Path) -> CheckpointStore:
    return CheckpointStore(place / "checkpoints", keep=2, collective=Solo())


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mlp()
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def saved(place: Path) -> Path:
    return store(place).save(*parts(), step=7, meta={})


def seal(checkpoint: Path) -> None:
    """Let the manifest agree, as one would who wants the checkpoint to be read."""
    manifest = {
        file.name: (file.stat().st_size, digest(file))
        for file in sorted(checkpoint.iterdir())
        if file.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert verify(checkpoint) is None


def change_index(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    index = FileSystemReader(checkpoint).read_metadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(change(index)))
    seal(checkpoint)


def refusal(place: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        store(place).load_latest(*parts())
    return str(caught.value)


def test_code_in_the_index_does_not_run(tmp_path: Path) -> None:
    checkpoint, trace = saved(tmp_path), tmp_path / "ran"
    change_index(checkpoint, lambda index: replace(index, planner_data=Trap(trace)))
    said = refusal(tmp_path)
    assert said.startswith(f"checkpoint {checkpoint} was not read: its index names os.makedirs, which could run code")
    with pytest.raises(CheckpointError, match="could run code"):
        load_weights(tmp_path, mlp())
    assert not trace.exists()
    FileSystemReader(checkpoint).read_metadata()  # the trap is one
    assert trace.exists()


def test_code_in_what_is_no_tensor_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    model, optimizer = parts()
    optimizer.param_groups[0]["note"] = Trap(trace)
    store(tmp_path).save(model, optimizer, step=7, meta={})
    if trace.exists():  # it runs when it is copied, too
        trace.rmdir()
    model, optimizer = parts()
    optimizer.param_groups[0]["note"] = None
    with pytest.raises(CheckpointError, match="note is not plain data, and reading it could run code"):
        store(tmp_path).load_latest(model, optimizer)
    assert not trace.exists()


def test_an_index_cannot_point_outside_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)

    def elsewhere(index: Any) -> Any:
        data = {key: replace(info, relative_path="../../secret") for key, info in index.storage_data.items()}
        return replace(index, storage_data=data)

    change_index(checkpoint, elsewhere)
    assert f"its index names a file outside it, {tmp_path / 'secret'}" in refusal(tmp_path)


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    seal(checkpoint)
    assert "its index is of type dict" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_every_kind_of_tensor_is_still_read(tmp_path: Path, dtype: torch.dtype) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = parts()
        model.register_buffer("extra", torch.zeros(3, dtype=dtype))
        return model, optimizer

    model, optimizer = make()
    assert isinstance(model.extra, torch.Tensor)
    model.extra.fill_(1)
    store(tmp_path).save(model, optimizer, step=7, meta={})
    loaded, fresh = make()
    store(tmp_path).load_latest(loaded, fresh)
    assert isinstance(loaded.extra, torch.Tensor)
    assert torch.equal(loaded.extra, model.extra)
