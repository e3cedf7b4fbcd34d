"""A run in MLflow, read back by MLflow's own client from a store of files: curves, parameters, decisions, endings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from orchestrator.errors import SessionError
from orchestrator.runtime import folder
from tests.support import config
from tests.unit.test_session import run, session_of

TRACKING = {"mlflow_experiment": "swell", "tags": {"team": "waves"}, "every_s": 0}
GROWING: dict[str, Any] = {
    "train": {"samples": 1280},
    "batch": {"max": 128},
    "controller": {"policy": "schedule", "ramp": [[200, 64], [600, 128]]},
    "tracking": TRACKING,
}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return MlflowClient()


def only_run(client: MlflowClient) -> Run:
    experiment = client.get_experiment_by_name("swell")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] == kind]


def test_the_curves_are_the_runs_lines_against_samples_seen(tmp_path: Path, client: MlflowClient) -> None:
    run(session_of(config(tmp_path, **GROWING)))
    found, rows = only_run(client), folder.surviving(tmp_path / "run" / folder.METRICS)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.tags["team"] == "waves"
    assert found.data.tags["groundswell.ending"].startswith("finished: 1280 samples")
    for curve, key in (("loss", "loss"), ("global_batch", "global_batch"), ("noise_scale", "noise_scale")):
        points = sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, f"train/{curve}"))
        assert points == [(row["samples_seen"], row[key]) for row in rows if row[key] is not None]
    decided = client.get_metric_history(found.info.run_id, "decision/target_batch")
    decisions = events(tmp_path, "decision")
    assert sorted((m.step, m.value) for m in decided) == [(d["samples_seen"], d["target_batch"]) for d in decisions]
    assert {m.value for m in decided} != {32.0}
    assert found.data.tags["groundswell.decision"] == decisions[-1]["reason"]


def test_the_parameters_are_the_resolved_config(tmp_path: Path, client: MlflowClient) -> None:
    run(session_of(config(tmp_path, train={"samples": 64}, tracking=TRACKING | {"run_name": "first swell"})))
    found = only_run(client)
    assert found.info.run_name == "first swell"
    expected = {"optimizer.lr": "0.05", "batch.initial": "32", "controller.policy": "fixed", "ledger": "False"}
    assert expected.items() <= found.data.params.items()
    assert "optimizer.betas" not in found.data.params  # not given


def test_a_resumed_run_goes_on_with_the_same_mlflow_run(tmp_path: Path, client: MlflowClient) -> None:
    settings = config(tmp_path, train={"samples": 320}, tracking=TRACKING)
    run(session_of(settings), stop_in_step=3)
    assert only_run(client).info.status == "KILLED"
    longer = config(tmp_path, train={"samples": 640}, tracking=TRACKING)
    run(session_of(longer, resume=True))
    found = only_run(client)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.samples"] == "320"
    assert found.data.tags["groundswell.resumed_with.train.samples"] == "640"
    steps = [m.value for m in client.get_metric_history(found.info.run_id, "train/step")]
    assert sorted(steps) == list(range(20))
    assert {row["run_id"] for row in events(tmp_path, "tracking")} == {found.info.run_id}


def test_a_run_that_fails_has_failed_there_too(tmp_path: Path, client: MlflowClient) -> None:
    settings = config(tmp_path, tracking=TRACKING)
    with pytest.raises(SessionError, match="was not finished"), session_of(settings) as session:
        for _ in session:
            pass
    found = only_run(client)
    assert found.info.status == "FAILED"
    assert found.data.tags["groundswell.ending"].startswith("fault: SessionError: step 0 was not finished")


def test_a_server_that_refuses_costs_the_run_nothing_but_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:s3cret@127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert run(session_of(config(tmp_path, tracking=TRACKING))).finished
    (note,) = events(tmp_path, "tracker_dropped")
    assert note["tracker"] == "mlflow"
    assert "127.0.0.1" in note["reason"]
    assert not any("s3cret" in file.read_text(errors="replace") for file in (tmp_path / "run").glob("*.*"))
