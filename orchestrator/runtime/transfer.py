"""How does a batch of any kind get to a device: which tensors does it hold, and what stays of its containers?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


def move(batch: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """``batch`` with every tensor on ``device``.

    Looks inside lists, tuples, named tuples, mappings and dataclasses; any other object is asked for its own
    ``to(device)`` if it has one, and is left as it is if not.
    """
    return _through(batch, "to", device, non_blocking=non_blocking)


def pin(batch: Any) -> Any:
    """``batch`` with every tensor in page-locked memory, found as ``move`` finds them."""
    return _through(batch, "pin_memory")


def _through(value: Any, method: str, *args: Any, **of_tensors: Any) -> Any:
    def go(inner: Any) -> Any:
        return _through(inner, method, *args, **of_tensors)

    if isinstance(value, Tensor):
        return getattr(value, method)(*args, **of_tensors)
    if isinstance(value, type):
        return value  # a class is no value to look into, though it may have the method
    if callable(getattr(value, method, None)):
        return getattr(value, method)(*args)
    if isinstance(value, Mapping):
        moved = {key: go(inner) for key, inner in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return moved
        same_kind = copy.copy(value)  # keeps what a subclass carries, such as a default factory
        same_kind.update(moved)
        return same_kind
    if isinstance(value, tuple):
        parts = [go(inner) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, list):
        return [go(inner) for inner in value]
    if dataclasses.is_dataclass(value):
        moved = {f.name: go(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **moved)  # type: ignore[type-var]  # classes were sent back above
    return value
