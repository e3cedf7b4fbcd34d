"""A batch of any kind arrives on the device whole, and pinned where that was asked for."""

from __future__ import annotations

from collections import defaultdict, namedtuple
from typing import Any

import pytest
import torch

from orchestrator.runtime.loader import PositionLoader
from orchestrator.runtime.transfer import move
from tests.unit.loading import ANY_CORES, Pair, identity

pytestmark = ANY_CORES

Named = namedtuple("Named", "x y")


class OwnTo:
    def __init__(self, where: str) -> None:
        self.where = where

    def to(self, device: Any) -> OwnTo:
        return OwnTo(str(device))


def test_move_looks_inside_every_container_and_keeps_its_kind() -> None:
    here = torch.zeros(1)
    batch = (
        [here, "text"],
        {"a": here},
        Named(here, 2),
        Pair(here, None),
        defaultdict(list, b=here),
        OwnTo("cpu"),
    )
    moved = move(batch, torch.device("meta"), non_blocking=True)
    tensors = [moved[0][0], moved[1]["a"], moved[2].x, moved[3].left, moved[4]["b"]]
    assert [t.device.type for t in tensors] == ["meta"] * 5
    assert [type(part) for part in moved] == [type(part) for part in batch]
    assert moved[0][1] == "text"
    assert moved[2].y == 2
    assert moved[4]["new"] == []
    assert moved[5].where == "meta"
    assert here.device.type == "cpu"
    assert batch[4]["b"] is here, "the batch itself is left alone"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loader_workers", [0, 1])
def test_pinned_batches_arrive_on_the_device(loader_workers: int) -> None:
    dataset = [{"x": torch.full((3,), float(i)), "y": i} for i in range(8)]
    loader = PositionLoader(dataset, index_of=identity, seed=0, loader_workers=loader_workers, pin_memory=True)
    loader.set_course([(0, 8)])
    batch = loader.take(0, 8)
    loader.close()
    assert batch["x"].is_pinned()
    assert batch["y"].is_pinned()
    assert torch.equal(move(batch, "cuda", non_blocking=True)["x"].cpu(), batch["x"])
