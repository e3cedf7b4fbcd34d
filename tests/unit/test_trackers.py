"""Who follows a run gets every line of its files; one that fails is dropped, once, and training does not notice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.runtime import folder
from orchestrator.runtime.scalars import evaluation_scalars, step_scalars
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp

KINDS = ("step", "event", "evaluation", "groups")


class Recorder:
    """Remembers what it is given, and raises from call ``fails_at`` on, or when closed."""

    name = "recorder"

    def __init__(self, *, fails_at: int | None = None, fails_to_close: bool = False) -> None:
        self.rows: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in KINDS}
        self.calls = 0
        self.closed = 0
        self.fails_at = fails_at
        self.fails_to_close = fails_to_close

    def _take(self, kind: str, row: Mapping[str, Any]) -> None:
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise ConnectionError("nobody answers\nat example.org")
        self.rows[kind].append(row)

    def step(self, row: Mapping[str, Any]) -> None:
        self._take("step", row)

    def event(self, row: Mapping[str, Any]) -> None:
        self._take("event", row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._take("evaluation", row)

    def groups(self, row: Mapping[str, Any]) -> None:
        self._take("groups", row)

    def close(self) -> None:
        self.closed += 1
        if self.fails_to_close:
            raise ConnectionError("gone")


def followed(path: Path, *trackers: Recorder, **sections: Any) -> torch.Tensor:
    """A short run that ``trackers`` follow; its first weights."""
    settings = config(path, **{"train": {"samples": 320}, **sections})
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    worker = replace(local_worker(settings), trackers=lambda: trackers)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), worker=worker) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            if session.evaluation_due:
                session.record_evaluation({"accuracy": 0.5})
    return next(iter(model.parameters())).detach()


def written(path: Path, name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "attempt"} for row in folder.rows(path / "run" / name)]


def test_a_tracker_gets_every_line_of_the_runs_files_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    followed(tmp_path, recorder, measure={"groups": "layers"})
    files = (folder.METRICS, folder.EVENTS, folder.EVALS, folder.GROUPS)
    for kind, name in zip(KINDS, files, strict=True):
        assert recorder.rows[kind], kind
        assert recorder.rows[kind] == written(tmp_path, name)
    assert recorder.rows["event"][-1]["kind"] == "finished"
    assert recorder.closed == 1


@pytest.mark.parametrize("fails_at", [1, 4, 9])
def test_a_tracker_that_fails_is_dropped_once_and_changes_nothing(tmp_path: Path, fails_at: int) -> None:
    broken, sound = Recorder(fails_at=fails_at), Recorder()
    weights = followed(tmp_path / "a", broken, sound)
    assert torch.equal(weights, followed(tmp_path / "b"))
    assert broken.calls == fails_at
    assert broken.closed == 0
    (note,) = [row for row in written(tmp_path / "a", folder.EVENTS) if row["kind"] == "tracker_dropped"]
    assert note["tracker"] == "recorder"
    assert "ConnectionError: nobody answers at example.org" in note["reason"]
    assert len(sound.rows["step"]) == 10
    assert note in sound.rows["event"]


def test_what_fails_at_the_end_is_said_and_the_run_has_finished(tmp_path: Path) -> None:
    followed(tmp_path, Recorder(fails_to_close=True))
    *_, finished, dropped = written(tmp_path, folder.EVENTS)
    assert finished["kind"] == "finished"
    assert (dropped["kind"], "gone" in dropped["reason"]) == ("tracker_dropped", True)


def test_a_board_that_cannot_be_written_is_no_reason_to_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file where a folder belongs")
    followed(tmp_path)
    (note,) = [row for row in written(tmp_path, folder.EVENTS) if row["kind"] == "tracker_dropped"]
    assert note["tracker"] == "tensorboard"
    assert written(tmp_path, folder.EVENTS)[-1]["kind"] == "finished"


def test_what_is_unknown_or_not_finite_is_on_no_curve() -> None:
    names = ("loss", "lr", "global_batch", "accum_steps", "world_size", "noise_scale", "noise_low", "noise_high")
    row: dict[str, Any] = {**dict.fromkeys(names, 1), "samples_per_s": None, "loss": float("nan"), "noise_high": None}
    assert set(step_scalars(row)) == {f"train/{name}" for name in names if name not in ("loss", "noise_high")}
    evaluation = {"step": 1, "samples_seen": 2, "accuracy": 0.5, "loss": float("inf")}
    assert evaluation_scalars(evaluation) == {"evaluation/accuracy": 0.5}
