"""The commands work on a run that is kept at a URL as on one in a folder; the service is a real one, moto's S3."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launch.cli import main
from orchestrator.config import to_yaml
from orchestrator.runtime.remote_store import RemoteFolder
from tests.stores import BUCKET, s3_service
from tests.support import config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with s3_service() as (_, found):
        yield found


@pytest.fixture
def s3(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return f"{BUCKET}/{request.node.name}"


def file_of(url: str, tmp_path: Path, *, samples: int = 320, sleep_s: float = 0.0) -> str:
    settings = config(
        url,
        run={"scratch": str(tmp_path / "scratch")},
        task={"name": "tests.launch.small_task:make", "options": {"sleep_s": sleep_s}},
        train={"samples": samples},
        checkpoint={"every_samples": 64},
        ledger=True,
    )
    path = tmp_path / "given.yaml"
    path.write_text(to_yaml(settings))
    return str(path)


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def test_a_run_at_a_url_is_trained_read_and_gone_on_with(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = file_of(s3, tmp_path)
    trained = call("run", given, "--runtime", "local")
    assert trained.exit_code == 0, trained.output
    assert f"at {s3}/run" in trained.output
    assert call("run", given, "--runtime", "local").exit_code == 2  # there is one
    proved = call("ledger", "verify", f"{s3}/run")
    assert (proved.exit_code, proved.output.split(":")[0]) == (0, "exactly once")
    drawn = call("plot", f"{s3}/run")
    assert (drawn.exit_code, drawn.output) == (0, "run.svg\n")
    assert (tmp_path / "run.svg").exists()
    for where in (f"{s3}/run", f"{s3}/run/checkpoints/step-000000010"):
        probed = call("probe", given, "--checkpoint", where, "--set", "batch.micro_batch=4", "--samples", "200")
        assert probed.exit_code == 0, probed.output
        assert "step-000000010" in probed.output
    elsewhere = ["--set", f"run.scratch={tmp_path}/elsewhere", "--set", "train.samples=640"]
    longer = call("run", given, "--runtime", "local", "--auto-resume", *elsewhere)
    assert longer.exit_code == 0, longer.output
    assert "resumed at 320 samples" in longer.output
    assert call("ledger", "verify", f"{s3}/run").output.startswith("exactly once: 640 positions")


def test_what_is_not_at_a_url_is_said(s3: str) -> None:
    for words in (("ledger", "verify"), ("plot",), ("control",)):
        done = call(*words, f"{s3}/nothing", *(["hold"] if words == ("control",) else []))
        assert done.exit_code in (1, 2)
        assert f"there is no run at {s3}/nothing" in done.stderr


def test_orders_are_given_to_a_url(s3: str, tmp_path: Path, environment: dict[str, str]) -> None:
    given = file_of(s3, tmp_path, samples=32_000, sleep_s=0.02)
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", given, "--runtime", "local"], cwd=ROOT, env={**os.environ}
    )
    try:
        remote, until_s = RemoteFolder(f"{s3}/run"), time.monotonic() + 60
        while b'"started"' not in (remote.read("events.jsonl") or b""):
            assert time.monotonic() < until_s
            time.sleep(0.5)
        held = call("control", f"{s3}/run", "hold")
        assert held.exit_code == 0, held.output
        assert held.stdout.startswith("hold (step ")
        stopped = call("control", "run", "stop", "--run-dir", s3)
        assert stopped.exit_code == 0, stopped.output
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    refused = call("control", f"{s3}/run", "hold")
    assert (refused.exit_code, refused.stderr.strip()) == (1, f"{s3}/run is not running: it has stopped")
