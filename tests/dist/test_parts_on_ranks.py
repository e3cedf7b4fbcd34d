"""Promise 9: an optimizer that compares parts of the batch does not see which rank had them."""

from pathlib import Path

import pytest
import torch

from tests.support import run_fleet
from tests.unit.parts import BATCH, PART, PARTS, by_session, furthest, settings
from tests.unit.small_runs import rows_of


def weights(rank: int, folder: str) -> dict[str, list[list[float]]]:
    """By optimizer, after a run of each in one group."""
    found = {}
    for name in PARTS:
        trained = by_session(settings(f"{folder}/{name}", name, train={"max_grad_norm": 0.5}))
        found[name] = [w.flatten().tolist() for w in trained]
    return found


@pytest.mark.dist
def test_one_two_and_five_ranks_train_alike_and_every_rank_has_the_same_weights(tmp_path: Path) -> None:
    alone = weights(0, str(tmp_path / "1"))
    longest = {1: 4, 2: 2, 5: 1}  # run of the four parts; the last of five ranks has none
    for world_size in (2, 5):
        first, *others = run_fleet(weights, world_size, str(tmp_path / str(world_size)))
        assert all(other == first for other in others)
        for name in PARTS:
            mine, theirs = ([torch.tensor(w, dtype=torch.float64) for w in found[name]] for found in (first, alone))
            assert furthest(mine, theirs) < 1e-12
    for world_size, steps in longest.items():
        for name in PARTS:
            rows = set(rows_of(tmp_path / str(world_size) / name, "global_batch", "micro_batch", "accum_steps"))
            assert rows == {(BATCH, PART, steps)}
