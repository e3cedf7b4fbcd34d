"""Under Ray Train a run at a URL survives the loss of a worker together with all that lay on its machine's disk."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from launch.remote_runs import at_hand
from orchestrator.runtime import folder
from orchestrator.runtime.ledger import verify
from orchestrator.runtime.preparation import run_folder
from orchestrator.runtime.remote_store import RemoteFolder
from tests.stores import BUCKET, s3_service
from tests.support import config

SIZE, EPOCHS = 400, 1


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_what_lies_at_the_url_is_all_that_a_new_worker_group_needs(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.ray_train.trainer import AdaptiveTrainer

    pids = tmp_path / "pids"
    pids.mkdir()
    given = config(
        f"{BUCKET}/runs",
        run={"scratch": str(tmp_path / "scratch")},
        task={
            "name": "tests.ray.tasks:slow",
            "options": {"size": SIZE, "step_s": 0.3, "pids": str(pids), "slow_save_s": 0.0},
        },
        train={"samples": None, "epochs": EPOCHS},
        batch={"initial": 16, "micro_batch": 4, "max": 16},
        workers={"initial": 2, "min": 2, "max": 2},
        checkpoint={"every_samples": 64, "keep": 2},
        ledger=True,
    )
    with s3_service() as (_, environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        remote = RemoteFolder(f"{given.run.dir}/{given.run.name}")

        def lose_the_machine() -> None:
            until_s = time.monotonic() + 120
            while time.monotonic() < until_s:
                if any(name.endswith("/manifest.json") for name in remote.sizes("checkpoints")):
                    os.kill(int((pids / "0").read_text()), signal.SIGKILL)
                    shutil.rmtree(run_folder(given))
                    return
                time.sleep(0.1)

        loser = threading.Thread(target=lose_the_machine)
        loser.start()
        AdaptiveTrainer(given, worker_runtime_env={"env_vars": environment}).fit()
        loser.join()
        shutil.rmtree(tmp_path / "scratch")
        with at_hand(remote.url) as run:
            events = list(folder.rows(run / folder.EVENTS))
            resumed = [row for row in events if row["kind"] == "resumed"]
            assert resumed
            assert resumed[0]["samples_seen"] > 0
            report = verify(run)
            assert report.violation is None
            assert report.samples == SIZE * EPOCHS
            assert {row["world_size"] for row in folder.rows(run / folder.METRICS)} == {2}
