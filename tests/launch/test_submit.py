"""``groundswell submit`` and its sisters against real heads of Ray clusters, with and without token authentication."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from launch.cli import main
from launch.ray_jobs.head import ClusterError, check_versions, connect
from orchestrator.runtime import folder, ledger
from tests import support
from tests.launch.heads import ROOT, Head, clean_environment, head, proxy

pytestmark = pytest.mark.ray
TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def open_head() -> Iterator[Head]:
    with head() as started:
        yield started


@pytest.fixture(scope="module")
def guarded_head() -> Iterator[Head]:
    with head(token=TOKEN) as started:
        yield started


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(ROOT)  # what is submitted from here travels

    def write(name: str, **sections: Any) -> Path:
        task = {"name": "tests.launch.small_task:make", "options": sections.pop("options", {})}
        made = support.config(tmp_path / "runs", run={"name": name}, task=task, ledger=True, **sections)
        path = tmp_path / "given.yaml"
        path.write_text(yaml.safe_dump(made.model_dump(mode="json")))
        return path

    return write


def start(
    address: str, environment: Mapping[str, str], *arguments: str, out: Path | None = None
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", *arguments, "--address", address]
    stdout = subprocess.PIPE if out is None else out.open("w")
    return subprocess.Popen(
        command, cwd=ROOT, env={**clean_environment(), **environment}, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def call(address: str, environment: Mapping[str, str], *arguments: str) -> tuple[int, str, str]:
    process = start(address, environment, *arguments)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def ask(where: Head, *arguments: str) -> tuple[int, str, str]:
    """The same without the seconds that a new process takes, for a head that asks for no token: Ray reads that once."""
    environment = {**where.environment, "RAY_API_SERVER_ADDRESS": where.address}
    done = CliRunner().invoke(main, [*arguments, "--address", where.address], env=environment)
    return done.exit_code, done.stdout, done.stderr


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until_s = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until_s
        time.sleep(0.05)


def shown_samples(text: str) -> list[int]:
    """What the lines of numbers say was seen."""
    return [int(seen.replace(",", "")) for seen in re.findall(r"^([\d,]+)/[\d,]+ \(", text, flags=re.M)]


def test_a_run_is_followed_left_shown_again_stopped_and_goes_on(
    open_head: Head, config: Callable[..., Path], tmp_path: Path
) -> None:
    where, environment = open_head.address, open_head.environment
    given = str(config("wave", train={"samples": 10**6}, options={"sleep_s": 0.02}))
    out = tmp_path / "out"

    followed = start(where, environment, "submit", given, "--follow", out=out)
    wait_for(lambda: bool(shown_samples(out.read_text())), followed)
    followed.send_signal(signal.SIGINT)
    assert followed.wait(timeout=30) == 3
    assert followed.stderr is not None
    left = followed.stderr.read()
    assert left.startswith("Detached; wave goes on.")
    assert "groundswell logs wave --follow" in left
    assert "groundswell stop wave" in left
    assert " as groundswell-wave-1; it is kept in" in out.read_text()

    code, status, _ = ask(open_head, "status", "wave")
    assert code == 0
    assert status.startswith("wave: running for ")
    assert re.search(r"\d+ of 1,000,000 \(\d+%\) samples seen, loss ", status)
    assert "batch 32 = 1 x 4 x 8, 1 worker" in status
    code, answer, _ = ask(open_head, "control", "wave", "checkpoint")
    assert code == 0
    assert re.match(r"checkpoint \(step \d+, [\d,]+ samples\): .*step-\d{9}", answer)
    code, _, refused = ask(open_head, "submit", given)
    assert code == 2
    assert "wave is running on this cluster as groundswell-wave-1: groundswell logs wave --follow" in refused

    with proxy(int(where.rpartition(":")[2])) as between:
        again = start(between.address, environment, "logs", "wave", "--follow", out=out)
        wait_for(lambda: bool(shown_samples(out.read_text())), again)
        connections, seen = between.connections, shown_samples(out.read_text())[-1]
        between.cut()
        wait_for(lambda: between.connections > connections and shown_samples(out.read_text())[-1] > seen, again)
        code, stopped, _ = ask(open_head, "stop", "wave")
        assert code == 0
        assert again.wait(timeout=60) == 130
    match = re.search(r"wave stopped at ([\d,]+) samples, saved in", stopped)
    assert match is not None, stopped
    reached = int(match[1].replace(",", ""))
    said = out.read_text()
    assert said.count("the connection to the cluster broke") == 1
    assert said.count("runtime ray, folder") == said.count("started: 1,000,000 samples") == 1
    assert shown_samples(said) == sorted(set(shown_samples(said)))
    assert "SIGTERM" not in said
    run = tmp_path / "runs" / "wave"
    last = list(folder.rows(run / folder.EVENTS))[-1]
    assert (last["kind"], last["samples_seen"]) == ("stopped", reached)
    assert ask(open_head, "logs", "wave", "--follow")[0] == 130  # of a job that is over

    total = f"train.samples={reached + 128}"
    faster = ["--set", "task.options.sleep_s=0", "--set", "recovery.accept_changed=[task.options.sleep_s]"]
    code, finished, _ = ask(open_head, "submit", given, "--follow", "--set", total, *faster)
    assert code == 0
    assert f"resumed at {reached:,} samples of {reached + 128:,}" in finished
    assert f": {reached + 128:,} samples in " in finished
    assert ledger.verify(run).violation is None
    code, logs, _ = ask(open_head, "logs", "wave")
    assert code == 0
    # The numbers are shown when they are due, which is not at the same row for those who came later.
    assert [x for x in logs.splitlines() if not shown_samples(x)] == [
        x for x in finished.splitlines()[2:] if not shown_samples(x)
    ]
    assert "started: 1,000,000" in ask(open_head, "logs", "groundswell-wave-1")[1]
    raw = ask(open_head, "logs", "wave", "--raw")[1]
    assert '--log-format json\n{"groundswell": "told"' in raw
    listed = [line.split()[:3] for line in ask(open_head, "list")[1].splitlines()[1:]]
    assert listed[:2] == [["wave", "finished", "groundswell-wave-2"], ["wave", "stopped", "groundswell-wave-1"]]
    code, _, unknown = ask(open_head, "stop", "wav")
    assert code == 2
    assert "did you mean wave?" in unknown


def test_a_cluster_with_a_token_trains_for_those_who_have_it_and_keeps_it_to_itself(
    guarded_head: Head, config: Callable[..., Path], tmp_path: Path
) -> None:
    where, given = guarded_head.address, str(config("guarded", train={"samples": 64}))
    code, _, without = call(where, {}, "submit", given)
    assert code == 2
    assert "asks for a token, and none was sent: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH" in without
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    code, _, refused = call(where, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)}, "submit", given)
    assert code == 2
    assert "refused the token that it was given" in refused
    missing = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")}
    code, _, missed = call(where, missing, "list")
    assert code == 2
    assert "RAY_AUTH_TOKEN_PATH" in missed
    assert "Traceback" not in missed
    code, none, _ = call(where, guarded_head.environment, "list")
    assert code == 0
    assert none.startswith("No run was submitted")  # those refused left nothing behind

    code, said, error = call(where, guarded_head.environment, "submit", given, "--follow")
    assert code == 0, said + error
    assert ": 64 samples in 2 steps" in said
    raw = call(where, guarded_head.environment, "logs", "guarded", "--raw")[1]
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in text for text in [*written, said.encode(), error.encode(), raw.encode()])


def test_a_cluster_without_groundswell_is_named_as_such(guarded_head: Head, config: Callable[..., Path]) -> None:
    guarded_head.bare.touch()
    try:
        code, _, said = call(guarded_head.address, guarded_head.environment, "submit", str(config("bare")))
    finally:
        guarded_head.bare.unlink()
    assert code == 1
    assert "has no Groundswell: put it into the image" in said
    status = call(guarded_head.address, guarded_head.environment, "status", "bare")[1]
    assert status.startswith("bare: failed after ")


def test_a_broken_config_never_reaches_the_cluster(
    open_head: Head, config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", open_head.address)
    given = str(config("broken"))
    broken = [("--set", "batch.intial=3"), ("--set", "batch.max=1"), ("--run-dir", "runs"), ("--set", "run.name=a b")]
    with proxy(int(open_head.address.rpartition(":")[2])) as between:
        for arguments in broken:
            done = CliRunner().invoke(main, ["submit", given, *arguments, "--address", between.address])
            assert done.exit_code == 2, done.output
        assert between.connections == 0
        # A run of another Ray is refused once the head has said which it has, and before anything is sent.
        monkeypatch.setattr("ray.__version__", "2.59.1")
        done = CliRunner().invoke(main, ["submit", given, "--address", between.address])
        assert done.exit_code == 2
        assert "runs Ray 2.60.0, and this is Ray 2.59.1" in done.stderr
        assert between.connections > 0
    code, listed, _ = ask(open_head, "list")
    assert code == 0
    assert "broken" not in listed


def test_a_folder_that_would_be_another_one_on_the_cluster_is_refused(config: Callable[..., Path]) -> None:
    given = str(config("digits"))
    for where, why in (("runs", "is relative"), ("~/runs", "is in the home of whoever asks")):
        done = CliRunner().invoke(main, ["submit", given, "--run-dir", where, "--address", "http://127.0.0.1:1"])
        assert done.exit_code == 2
        assert f"config: run.dir: {where}\n  {why}" in done.stderr


def test_a_head_on_another_machine_must_ask_for_a_token(open_head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", open_head.address)  # and put back after: the client is told by it
    look_up = socket.getaddrinfo

    def elsewhere(host: Any, *rest: Any, **named: Any) -> Any:
        return look_up("127.0.0.1" if host == "head.example.org" else host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", elsewhere)
    address = open_head.address.replace("127.0.0.1", "head.example.org")
    with pytest.raises(ClusterError, match="asks for no token, so that everybody who reaches it can run code"):
        connect(address, allow_unauthenticated=False)
    client = connect(address, allow_unauthenticated=True)
    assert isinstance(client.list_jobs(), list)
    assert check_versions(client, ray_version="2.60.9") is None
    for other in ("2.61.0", "3.60.0"):
        with pytest.raises(ClusterError, match=re.escape(f"this is Ray {other}")):
            check_versions(client, ray_version=other)
    monkeypatch.setattr("sys.version_info", (3, 99, 1))
    note = check_versions(client, ray_version="2.60.0")
    assert note is not None
    assert note.endswith("and this machine 3.99.1; the run uses the head's")
