"""Promise 9: an optimizer that compares parts of the batch does not see which rank had them."""

from pathlib import Path

import pytest
import torch

from tests.support import run_fleet
from tests.unit.parts import BATCH, PART, PARTS, by_session, furthest, settings
from tests.unit.small_runs import rows_of


def weights(rank: int, folder: str, name: str) -> list[list[float]]:
    given = settings(folder, name, train={"max_grad_norm": 0.5})
    return [w.flatten().tolist() for w in by_session(given)]


@pytest.mark.dist
@pytest.mark.parametrize("name", PARTS)
def test_one_to_five_ranks_train_alike_and_every_rank_has_the_same_weights(tmp_path: Path, name: str) -> None:
    alone = [torch.tensor(w, dtype=torch.float64) for w in weights(0, str(tmp_path / "1"), name)]
    longest = {2: 2, 3: 2, 5: 1}  # of the four parts; the last of five ranks has none
    for world_size in longest:
        found = run_fleet(weights, world_size, str(tmp_path / str(world_size)), name)
        assert all(own == found[0] for own in found)
        assert furthest([torch.tensor(w, dtype=torch.float64) for w in found[0]], alone) < 1e-12
        rows = set(rows_of(tmp_path / str(world_size), "global_batch", "micro_batch", "accum_steps"))
        assert rows == {(BATCH, PART, longest[world_size])}
