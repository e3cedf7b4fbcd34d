"""Fewer workers than wanted never stop training."""

from pathlib import Path

import pytest

from orchestrator.runtime import folder
from tests.support import config


@pytest.mark.ray
def test_a_run_goes_on_with_the_workers_there_are(cluster: None, tmp_path: Path) -> None:
    from orchestrator.ray_train.trainer import AdaptiveTrainer

    (tmp_path / "pids").mkdir()
    settings = config(
        tmp_path,
        task={"name": "tests.ray.tasks:slow", "options": {"pids": str(tmp_path / "pids"), "step_s": 0.03}},
        train={"samples": 800},
        batch={"initial": 8, "micro_batch": 4, "max": 64},
        controller={"policy": "schedule", "ramp": [[80, 32]], "every_samples": 40},
        # The cluster has 4 CPUs: a second worker of 3 will never be there.
        workers={"initial": 1, "max": 2, "cpus_per_worker": 3.0, "micro_batches_each": 4, "when": "always"},
    )
    AdaptiveTrainer(settings).fit()
    events = list(folder.rows(tmp_path / "run" / folder.EVENTS))
    kinds = [event["kind"] for event in events]
    assert "workers_wanted" in kinds
    assert "resize" not in kinds
    assert kinds[-1] == "finished"
    rows = folder.surviving(tmp_path / "run" / folder.METRICS)
    assert {row["world_size"] for row in rows} == {1}
    assert max(row["global_batch"] for row in rows) == 32
