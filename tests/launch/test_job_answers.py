"""What a head answers besides what was asked: a log that it cannot read, and anything but 200. The head is played."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launch.cli import main
from launch.ray_jobs import errand

IN_SHARED = ("--run-dir", "/shared/runs")
JOB = {
    "type": "SUBMISSION",
    "submission_id": "groundswell-mine-1",
    "entrypoint": "x",
    "start_time": 1000,
    "end_time": 2000,
    "metadata": {
        "groundswell_run": "mine",
        "groundswell_submission": "1",
        "groundswell_folder": "/shared/runs/mine",
        "groundswell_config_sha256": "0" * 64,
        "git_revision": "0" * 40,
    },
}


class PlayedHead(http.server.ThreadingHTTPServer):
    """Answers with the body of the first of its ``pages`` whose path holds that, and with 500 where there is none."""

    pages: list[tuple[str, Any]]
    asked: list[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PlayedHead

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        if (length := int(self.headers.get("Content-Length") or 0)) > 0:
            self.rfile.read(length)
        body = next((body for path, body in self.server.pages if path in self.path), None)
        self.send_response(500 if body is None else 200)
        self.end_headers()
        self.wfile.write(b"the agent of that node is gone" if body is None else json.dumps(body).encode())

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def played() -> Iterator[PlayedHead]:
    server = PlayedHead(("127.0.0.1", 0), _Handler)
    server.asked = []
    server.pages = [("/api/version", {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


def ask(head: PlayedHead, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--address", head.address])


def test_a_log_that_cannot_be_read_is_not_one_in_which_nothing_happened(played: PlayedHead) -> None:
    # Listed as running, as it is until the stop; then stopped, with a log that died with its node.
    played.pages += [
        ("/api/jobs/groundswell-mine-1/stop", {"stopped": True}),
        ("/api/jobs/groundswell-mine-1/logs", None),
        ("/api/jobs/groundswell-mine-1", {**JOB, "status": "STOPPED"}),
        ("/api/jobs/", [{**JOB, "status": "RUNNING"}]),
    ]
    stopped = ask(played, "stop", "mine")
    assert stopped.exit_code == 1
    assert "before it had begun" not in stopped.output
    assert "whether it saved is not known: the log of groundswell-mine-1 cannot be read" in stopped.stderr
    status = ask(played, "status", "mine")
    assert status.exit_code == 0
    assert "no step was taken" not in status.output
    assert "the log of groundswell-mine-1 cannot be read" in status.stdout
    logs = ask(played, "logs", "mine")
    assert logs.exit_code == 2
    assert "/shared/runs/mine says what came of the run" in logs.stderr


@pytest.mark.parametrize(
    "command",
    [["list"], ["status", "mine"], ["stop", "mine"], ["logs", "mine", "--follow"], ["submit", "digits", *IN_SHARED]],
)
def test_a_head_that_answers_with_an_error_is_quoted_in_a_line(played: PlayedHead, command: list[str]) -> None:
    refused = ask(played, *command)
    assert refused.exit_code == 2, refused.output
    assert isinstance(refused.exception, SystemExit)
    assert f"the head at {played.address} does not do as asked: Request failed with status code 500" in refused.stderr


def test_an_order_to_a_head_that_answers_with_an_error_is_refused(played: PlayedHead) -> None:
    refused = ask(played, "control", "mine", "hold")
    assert refused.exit_code == 1
    assert "does not do as asked" in refused.stderr


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_order_that_nobody_waits_for_any_longer_leaves_no_job(
    played: PlayedHead, interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    played.pages += [
        ("/stop", {"stopped": True}),
        ("/api/jobs/groundswell-control-hold-", {**JOB, "status": "PENDING"}),
        ("/api/jobs/", {"submission_id": "groundswell-control-hold-1", "job_id": "groundswell-control-hold-1"}),
    ]

    def pause(_: float) -> None:
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(errand, "time", SimpleNamespace(monotonic=count(0, 20).__next__, sleep=pause))
    given_up = ask(played, "control", "/shared/runs/mine", "hold", "--timeout", "30")
    assert given_up.exit_code == 1
    assert played.asked[-1] == "POST /api/jobs/groundswell-control-hold-1/stop"
    assert "is told to stop" in given_up.stderr
    looks = sum(line.startswith("GET /api/jobs/groundswell-control") for line in played.asked)
    # 30 s for the run and 60 s for the cluster, on a clock that goes on by 20 s from look to look.
    assert looks == (1 if interrupted else 5)
    assert ("has not ended 90 s after it was submitted" in given_up.stderr) != interrupted
