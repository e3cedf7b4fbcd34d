"""What the tests of the built-in tasks share."""

from __future__ import annotations

from typing import Any

from torch.utils.data import default_collate

SMALL_LM = {"context": 16, "width": 16, "depth": 1, "heads": 2}


def batch_of(dataset: Any, count: int) -> Any:
    return default_collate([dataset[i] for i in range(count)])
