"""Nodes that share no folder: rank zero's must hold all of a checkpoint by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.runtime import folder
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp, run_fleet


def train(rank: int, path: str) -> list[str]:
    """On two ranks; the files that the checkpoint's tensors lie in."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    given = config(path, train={"samples": 64})
    with Session(given, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    (saved,) = [row["path"] for row in folder.rows(Path(path) / "run" / folder.EVENTS) if row["kind"] == "checkpoint"]
    index = FileSystemReader(saved).read_metadata()
    return sorted({info.relative_path for info in index.storage_data.values()})


@pytest.mark.dist
def test_what_all_ranks_hold_is_written_by_rank_zero_alone(tmp_path: Path) -> None:
    assert run_fleet(train, 2, str(tmp_path)) == [["__0_0.distcp"]] * 2
