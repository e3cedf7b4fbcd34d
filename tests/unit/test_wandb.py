"""A run in Weights & Biases in its offline mode, read back from the file that ``wandb sync`` would send."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from orchestrator.errors import SessionError
from orchestrator.runtime import folder
from tests.support import config
from tests.unit.test_session import run, session_of

TRACKING = {"wandb_project": "swell", "tags": {"team": "waves"}, "every_s": 0}
_HEADER, _BLOCK, _LAST = 7, 32768, (1, 4)  # of LevelDB's log format: bytes, bytes, types that end a record


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(path: Path) -> Iterator[Any]:
    """The messages of a ``.wandb`` file: a header, then records that are cut where a block ends."""
    data, at, whole = path.read_bytes(), _HEADER, b""
    assert data[:4] == b":W&B"
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        whole += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in _LAST:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def read(path: Path, *, attempts: int = 1) -> list[Any]:
    """The records of every attempt, in order. W&B's own process writes them, and is not done when ``finish`` is."""
    deadline = time.monotonic() + 60
    while True:
        files = sorted((path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
        found = [record for file in files for record in records(file)]
        if sum(record.WhichOneof("record_type") == "exit" for record in found) == attempts:
            return found
        assert time.monotonic() < deadline, files
        time.sleep(0.05)


def history(read: list[Any]) -> list[dict[str, Any]]:
    rows = [r.history for r in read if r.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


def summary(read: list[Any]) -> dict[str, Any]:
    updates = [u for r in read if r.WhichOneof("record_type") == "summary" for u in r.summary.update]
    return {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in updates}


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] == kind]


def test_the_curves_the_config_and_the_decisions_are_there(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "train": {"samples": 1280},
        "batch": {"max": 128},
        "controller": {"policy": "schedule", "ramp": [[200, 64], [600, 128]]},
    }
    run(session_of(config(tmp_path, **sections, tracking=TRACKING | {"run_name": "first swell"})))
    assert events(tmp_path, "tracker_dropped") == []
    found, rows = read(tmp_path), folder.surviving(tmp_path / "run" / folder.METRICS)
    sent = history(found)
    for key in ("loss", "global_batch", "noise_scale"):
        points = [(row["samples_seen"], row[f"train/{key}"]) for row in sent if f"train/{key}" in row]
        assert points == [(row["samples_seen"], row[key]) for row in rows if row[key] is not None]
    decisions = events(tmp_path, "decision")
    assert [r["decision/target_batch"] for r in sent if "decision/target_batch" in r] == [
        d["target_batch"] for d in decisions
    ]
    (begun,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.display_name, list(begun.tags)) == ("swell", "first swell", ["team:waves"])
    resolved = {u.key: json.loads(u.value_json) for u in begun.config.update}
    assert resolved["optimizer"]["lr"] == 0.05
    assert summary(found)["decision"] == decisions[-1]["reason"]
    assert summary(found)["ending"].startswith("finished: 1280 samples")
    (ended,) = [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"]
    assert ended == 0


def test_a_resumed_run_goes_on_with_the_same_id_and_a_failed_one_says_so(tmp_path: Path) -> None:
    settings = config(tmp_path, train={"samples": 320}, tracking=TRACKING)
    run(session_of(settings), stop_in_step=3)
    with pytest.raises(SessionError, match="was not finished"), session_of(settings, resume=True) as session:
        for _ in session:
            pass
    found = read(tmp_path, attempts=2)
    run_ids = {r.run.run_id for r in found if r.WhichOneof("record_type") == "run"}
    assert run_ids == {row["run_id"] for row in events(tmp_path, "tracking")}
    assert len(run_ids) == 1
    assert summary(found)["ending"].startswith("fault: SessionError: step 4 was not finished")
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [0, 1]
