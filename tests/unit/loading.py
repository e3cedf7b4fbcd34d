"""Data sets that tell what was read of them, or fail; and what else the tests of the loader share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.types import BatchPlan

# The machine's cores are torch's concern; what is promised holds for any number of processes.
ANY_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

TOTAL = 10**9  # samples; a run longer than any test


def identity(positions: np.ndarray) -> np.ndarray:
    return positions


def plan(batch: int, micro_batch: int, *, world_size: int = 1) -> BatchPlan:
    return BatchPlan(generation=0, world_size=world_size, batch=batch, micro_batch=micro_batch)


class Counted:
    """Sample ``i`` is ``i``; every read in any process adds a line to a file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.log.open("ab", buffering=0) as file:
            file.write(b"%d\n" % index)
        return torch.tensor(index)

    def reads(self) -> Counter[int]:
        return Counter(int(line) for line in self.log.read_text().split())


class Broken:
    def __init__(self, bad: int, error: Exception) -> None:
        self.bad = bad
        self.error = error

    def __getitem__(self, index: int) -> int:
        if index == self.bad:
            raise self.error
        return index


@dataclass
class Pair:
    left: torch.Tensor
    right: Any
