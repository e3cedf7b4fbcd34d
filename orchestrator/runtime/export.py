"""The weights of a checkpoint as one plain file that other programs read, without the model's code or the task."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from orchestrator.errors import CheckpointError, StorageError
from orchestrator.runtime.checkpoint_files import read_meta
from orchestrator.runtime.checkpoints import load_tree
from orchestrator.runtime.safe_loading import CheckpointReader

FORMATS = (".pt", ".safetensors")


def export_weights(checkpoint: Path, file: Path, *, averaged: bool = False) -> int:
    """Write the model's ``state_dict`` in the whole checkpoint ``checkpoint`` to ``file``; how many tensors it has.

    ``file`` ends in one of ``FORMATS``: ``.pt`` is read by ``torch.load(file, weights_only=True)``, ``.safetensors`` by
    its library. ``averaged``: parameters are the averages of ``train.ema_half_life_samples``, in the model's own dtype;
    buffers stay the model's.

    Raises ``CheckpointError`` for what the checkpoint does not hold or the format cannot, ``StorageError`` where the
    file cannot be written, and ``ModuleNotFoundError`` without the library of the format.
    """
    try:
        weights = _read(checkpoint, averaged=averaged)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # DCP raises several kinds, none of them narrow
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {type(error).__name__}: {error}") from error
    # Whoever reads the file meanwhile sees a whole one, or none.
    part = file.with_name(f".{file.name}.part")
    try:
        if file.suffix == ".safetensors":
            _write_safetensors(weights, part, checkpoint)
        else:
            torch.save(weights, part)
        os.replace(part, file)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError of a folder that is not there
        part.unlink(missing_ok=True)
        raise StorageError(f"cannot write {file}: {error}; make room, or choose another place with --to") from error
    return len(weights)


def _read(checkpoint: Path, *, averaged: bool) -> dict[str, Any]:
    index = CheckpointReader(checkpoint).read_metadata()
    sections = ("model", "ema") if averaged else ("model",)
    tree: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for key, kind in index.state_dict_metadata.items():
        # What a key such as model.norm.weight is made of: a module's own state may be a mapping with tensors in it.
        section, *inner, name = index.planner_data[key]
        if section not in tree:
            continue
        place: dict[Any, Any] = tree[section]
        for part in inner:
            place = place.setdefault(part, {})
        place[name] = None
        if isinstance(kind, TensorStorageMetadata):
            place[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
    if averaged and not tree["ema"]:
        raise CheckpointError(
            f"checkpoint {checkpoint} holds no averaged weights: its run had no train.ema_half_life_samples; leave "
            "--ema out"
        )
    load_tree(tree, checkpoint)
    weights = tree["model"]
    averages = tree.get("ema", {})
    tied: Mapping[str, str] = read_meta(checkpoint).get("tied", {})
    for name in weights:
        average = averages.get(tied.get(name, name))
        if average is not None:
            weights[name] = average.to(weights[name].dtype, copy=True)  # tied names share no memory in a file
    return weights


def _write_safetensors(weights: Mapping[str, Any], file: Path, checkpoint: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    other = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"checkpoint {checkpoint} holds {', '.join(other[:4])}, which is no tensor, and safetensors holds nothing "
            "else; export to a .pt file"
        )
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
