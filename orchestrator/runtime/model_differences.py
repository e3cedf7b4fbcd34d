"""Is the model in a checkpoint the one that it is to be loaded into? Names, shapes and dtypes, and what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_SHOWN = 4


def model_differences(saved: Mapping[str, Any], model_state: Mapping[str, Any]) -> str | None:
    """What differs between the model saved and this one; ``None`` where every tensor finds its place.

    ``saved`` is what the checkpoint's index says of each name, ``model_state`` the state that would be loaded into.
    DCP itself leaves out what has no place, and turns one dtype into another without a word.
    """
    there = {name.removeprefix("model."): _kind(meta) for name, meta in saved.items() if name.startswith("model.")}
    here = {name: _kind(value) for name, value in model_state.items()}
    changed = [f"{name} ({there[name]} there, {here[name]} here)" for name in here if _differ(name, there, here)]
    told = [
        _listed("{} in the checkpoint alone", [f"{name} ({kind})" for name, kind in there.items() if name not in here]),
        _listed("{} in this model alone", [f"{name} ({kind})" for name, kind in here.items() if name not in there]),
        _listed("{} of another shape or dtype", changed),
    ]
    return "; ".join(filter(None, told)) or None


def _differ(name: str, there: Mapping[str, str], here: Mapping[str, str]) -> bool:
    return name in there and there[name] != here[name]


def _kind(value: Any) -> str:
    """Such as ``32 x 20 float32``; all that is no tensor is alike."""
    if isinstance(value, TensorStorageMetadata):
        size, dtype = value.size, value.properties.dtype
    elif isinstance(value, Tensor):
        size, dtype = value.shape, value.dtype
    else:
        return "no tensor"
    shape = " x ".join(map(str, size)) or "scalar"
    return f"{shape} {str(dtype).removeprefix('torch.')}"


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what.format(len(names))}: {', '.join(names[:_SHOWN])}{more}"
