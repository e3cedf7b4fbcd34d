"""A run that is kept at a URL lies there whole, and goes on from there on another machine, whatever cut it off.

The service is a real one, moto's S3 over HTTP, and a folder by its URL; no cloud was asked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.errors import RunFolderError, StorageError
from orchestrator.runtime import at_url, folder, ledger, mirror, remote_lease
from orchestrator.runtime.checkpoints import verify
from orchestrator.runtime.control_requests import write_request
from orchestrator.runtime.preparation import run_folder
from tests.stores import BUCKET, Door, s3_service
from tests.unit.remote_runs import assert_alike, kinds, settings, steps_there, stopping_at, there, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[Door, dict[str, str]]]:
    with s3_service() as found:
        yield found


@pytest.fixture
def door(service: tuple[Door, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Door:
    door, environment = service
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(mirror, "LOOK_EVERY_S", 0.1)
    return door


@pytest.fixture
def s3(door: Door, request: pytest.FixtureRequest) -> str:
    return f"{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else f"file://{tmp_path}/there"


def test_a_run_lies_whole_at_its_url(url: str, tmp_path: Path) -> None:
    given = settings(url, tmp_path / "scratch")
    train(given)
    assert_alike(given)
    assert steps_there(given) == [8, 10]


def test_another_machine_goes_on_as_if_there_had_been_no_break(url: str, tmp_path: Path) -> None:
    undisturbed = train(settings(url + "-undisturbed", tmp_path / "undisturbed"))
    with pytest.raises(KeyboardInterrupt):
        train(settings(url, tmp_path / "one"), between=stopping_at(7))
    other = settings(url, tmp_path / "other")
    weights = train(other, resume=True)
    assert all(map(torch.equal, weights, undisturbed))
    assert_alike(other)
    assert kinds(other).count("resumed") == 1
    assert ledger.verify(run_folder(other)).violation is None
    # The first machine's folder is of the past by now, with lines that nobody else has.
    with (run_folder(settings(url, tmp_path / "one")) / folder.EVENTS).open("a") as file:
        file.write('{"attempt": 2, "kind": "fault", "reason": "alone", "samples_seen": 0, "step": 0}\n')
    again = settings(url, tmp_path / "one", steps=12)
    saved = run_folder(again) / "checkpoints"
    shutil.copytree(saved / "step-000000006", saved / "step-000000011")
    train(again, resume=True)
    resumed = [row["step"] for row in folder.rows(run_folder(again) / folder.EVENTS) if row["kind"] == "resumed"]
    assert resumed[-1] == 10
    assert "alone" not in (run_folder(again) / folder.EVENTS).read_text()
    assert_alike(again)
    assert ledger.verify(run_folder(again)).violation is None


def test_while_the_url_is_out_of_reach_training_goes_on(door: Door, s3: str, tmp_path: Path) -> None:
    def outage(step: int) -> None:
        if step == 3:
            door.shut()
        elif step == 9:
            door.open()
        time.sleep(0.3)

    given = settings(s3, tmp_path, steps=12)
    train(given, between=outage)
    assert_alike(given)
    assert kinds(given).count("storage_out_of_reach") == kinds(given).count("storage_in_reach") == 1


def test_what_could_not_be_sent_at_the_end_is_named_and_sent_by_the_next_attempt(
    door: Door, s3: str, tmp_path: Path
) -> None:
    given = settings(s3, tmp_path / "scratch", steps=4)
    try:
        with pytest.raises(StorageError, match=r"events\.jsonl.*only in .*resume the run there"):
            train(given, between=lambda step: door.shut() if step == 3 else None)
    finally:
        door.open()
    assert "finished" in kinds(given)
    assert steps_there(given) != [2, 4]
    at_url.bring_lines(given)
    assert steps_there(given) == [2, 4]
    assert_alike(given)


@pytest.mark.parametrize("harm", ["byte", "short", "gone", "unfinished"])
def test_a_torn_checkpoint_there_is_passed_over(s3: str, tmp_path: Path, harm: str) -> None:
    given = settings(s3, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        train(given, between=stopping_at(5))
    remote, name = there(given), "checkpoints/step-000000004/__0_0.distcp"
    data = remote.read(name)
    assert data is not None
    if harm == "byte":
        remote.write(name, data[:999] + bytes([data[999] ^ 1]) + data[1000:])
    elif harm == "short":
        remote.write(name, data[:-1])
    elif harm == "gone":
        remote.remove(name)
    else:
        remote.remove("checkpoints/step-000000004/manifest.json")
    other = settings(s3, tmp_path / "other")
    train(other, resume=True)
    events = list(folder.rows(run_folder(other) / folder.EVENTS))
    assert next(row["step"] for row in events if row["kind"] == "resumed") == 2
    passed_over = [row for row in events if row["kind"] == "checkpoint_passed_over"]
    assert len(passed_over) == (harm != "unfinished")
    assert ledger.verify(run_folder(other)).violation is None
    assert_alike(other)


def test_a_run_that_is_killed_while_it_sends_goes_on_from_what_is_whole(door: Door, s3: str, tmp_path: Path) -> None:
    door.bytes_per_s = 200e3  # a checkpoint takes about a second
    given = settings(s3, tmp_path / "one", steps=1000)
    process = subprocess.Popen([sys.executable, "-m", "tests.unit.remote_runs", s3, str(tmp_path / "one")], cwd=ROOT)
    try:
        remote, until_s = there(given), time.monotonic() + 60
        while True:
            names = remote.sizes("checkpoints")
            steps = {name.split("/")[1] for name in names}
            half = {step for step in steps if f"checkpoints/{step}/manifest.json" not in names}
            if half and steps - half:
                break
            assert time.monotonic() < until_s
    finally:
        process.kill()
        process.wait()
        door.shut()  # what is on its way is lost with the machine
        door.bytes_per_s = None
        door.open()
    whole = max(steps - half)
    other = settings(s3, tmp_path / "other", steps=1000)
    with pytest.raises(KeyboardInterrupt):
        train(other, resume=True, width=150, between=stopping_at(int(whole[5:]) + 4))
    events = list(folder.rows(run_folder(other) / folder.EVENTS))
    resumed = next(row for row in events if row["kind"] == "resumed")
    assert resumed["step"] >= int(whole[5:])
    assert ledger.verify(run_folder(other)).violation is None
    for step in steps_there(other):
        assert f"checkpoints/step-{step:09d}/manifest.json" in there(other).sizes()


def test_what_a_dead_process_had_sent_and_arrives_late_does_not_stay(url: str, tmp_path: Path) -> None:
    given = settings(url, tmp_path)

    def late(step: int) -> None:
        if step == 3:
            there(given).write("checkpoints/step-000000014/__0_0.distcp", b"half")

    train(given, between=late)
    assert steps_there(given) == [8, 10]


def test_orders_at_the_url_reach_the_run(s3: str, tmp_path: Path) -> None:
    given = settings(s3, tmp_path / "scratch", steps=1000)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def order(step: int) -> None:
        time.sleep(0.02)
        if step == 3:
            name = f"control/{write_request(elsewhere, 'hold', caps={}, timeout_s=60)}.json"
            there(given).write(name, (elsewhere / name).read_bytes())
        elif step == 40:
            there(given).write(f"control/{folder.STOP_REQUEST}", b"")

    train(given, between=order)
    assert kinds(given)[-1] == "stopped"
    answers = [row for row in folder.rows(run_folder(given) / folder.EVENTS) if row["kind"] == "control"]
    assert [(row["order"], row["accepted"]) for row in answers] == [("hold", True)]
    assert there(given).sizes("control") == {}
    train(settings(s3, tmp_path / "scratch", steps=50), resume=True)  # and a stop is for one attempt
    assert kinds(given)[-1] == "finished"


def test_a_run_has_one_writer(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lease, "RENEW_S", 0.2)
    given = settings(s3, tmp_path / "scratch", steps=1000)

    def note(renewals: int) -> bytes:
        return json.dumps({"writer": "other", "host": "elsewhere", "pid": 1, "renewals": renewals}).encode()

    remote, looks = there(given), iter(range(100))
    remote.write(remote_lease.NOTE, note(0))
    living = remote_lease.Lease(remote, now=lambda: remote.write(remote_lease.NOTE, note(next(looks))) or 0.0)
    with pytest.raises(RunFolderError, match="is being written by process 1 on elsewhere"):
        living.take()
    dead = remote_lease.Lease(remote)
    dead.take(watch_s=0.3)
    assert dead.renew()

    def taken_over(step: int) -> None:
        time.sleep(0.02)
        if step == 3:
            remote.write(remote_lease.NOTE, note(0))

    remote.remove(remote_lease.NOTE)
    with pytest.raises(StorageError, match="another process writes there"):
        train(given, between=taken_over)
    assert "stopped" in kinds(given)
    assert remote.read(remote_lease.NOTE) == note(0)


def test_other_nodes_go_on_from_what_rank_zero_chose(s3: str, tmp_path: Path) -> None:
    """One process plays both nodes: what is in the folder while it is rank one is what rank one's node has."""

    class Rank:
        world_size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def share(self, value: object) -> object:
            nonlocal said
            said = value if self.rank == 0 else said
            return said

        def sum(self, values: list[float]) -> list[float]:
            return values

    said: object = None
    given = settings(s3, tmp_path / "scratch")
    with pytest.raises(KeyboardInterrupt):
        train(given, between=stopping_at(5))
    path = run_folder(given)
    at_url.share_run(given, Rank(0))
    for damage in (lambda: shutil.rmtree(path), lambda: (path / "checkpoints/step-000000004/manifest.json").unlink()):
        damage()
        at_url.share_run(given, Rank(1))
        assert verify(path / "checkpoints" / "step-000000004") is None
        assert (path / folder.CONFIG).exists()
    moved = settings(s3, tmp_path / "moved")
    with pytest.raises(RunFolderError, match=r"run\.scratch"):
        at_url.share_run(moved, Rank(1))
    there(given).remove("checkpoints/step-000000004/meta.json")
    shutil.rmtree(path)
    with pytest.raises(RunFolderError, match=r"meta\.json"):
        at_url.share_run(given, Rank(1))


def test_a_scratch_folder_of_somebody_else_is_refused(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    with pytest.raises(RunFolderError, match=r"run\.scratch"):
        train(settings(s3, tmp_path))


def test_a_library_that_is_missing_is_named_with_its_extra() -> None:
    code = "import sys; sys.modules['s3fs'] = None\n"
    code += "from orchestrator.runtime.remote_store import RemoteFolder\nRemoteFolder('s3://bucket/runs')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError" in done.stderr
    assert "pip install 'groundswell[s3]'" in done.stderr
