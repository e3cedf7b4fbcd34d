"""Heads of Ray clusters of a test's own, and what stands between one and its clients."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_START_PATIENCE_S = 60.0
_END_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A head that runs, and the environment of those who have its token, where it asks for one."""

    address: str
    gcs_address: str
    environment: Mapping[str, str]
    bare: Path  # while this file is there, the cluster's python has no Groundswell


@contextmanager
def head(*, token: str | None = None, cpus: int = 4) -> Iterator[Head]:
    """Start a head on this machine with ports and a folder of its own, and end it by its process."""
    scratch = Path(tempfile.mkdtemp(prefix="gsh-", dir="/tmp"))  # short: Ray puts sockets below it
    access = {"RAY_AUTH_MODE": "disabled"}
    if token is not None:
        (scratch / "token").write_text(token)
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(scratch / "token")}
    bare, python = scratch / "bare", scratch / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ -e {bare} ] && set -- -I -S "$@"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    gcs, dashboard, *others = _free_ports(7)
    names = (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "metrics-export",
        "runtime-env-agent",
        "ray-client-server",
    )
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    command += [f"--{name}-port={port}" for name, port in zip(names, others, strict=True)]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={cpus}", f"--temp-dir={scratch}/r"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # nobody waits for a head of a test
    environment = {**clean_environment(), **access, **at_once, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    address = f"http://127.0.0.1:{dashboard}"
    with (scratch / "said").open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        _wait_until_it_answers(address, process, scratch / "said")
        yield Head(address=address, gcs_address=f"127.0.0.1:{gcs}", environment=access, bare=bare)
    finally:
        process.send_signal(signal.SIGTERM)  # ends what it started, and nothing else
        try:
            process.wait(_END_PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def clean_environment() -> dict[str, str]:
    """This process's environment without what names a cluster or a token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_until_it_answers(address: str, process: subprocess.Popen[bytes], said: Path) -> None:
    until_s = time.monotonic() + _START_PATIENCE_S
    while time.monotonic() < until_s:
        assert process.poll() is None, said.read_text()
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"no head at {address}: {said.read_text()}")


@dataclass(slots=True)
class Proxy:
    """Passes connections on to a port of this machine, until they are cut."""

    port: int
    address: str = ""
    connections: int = 0
    _open: list[socket.socket] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def cut(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    made = Proxy(port=port, address=f"http://127.0.0.1:{listener.getsockname()[1]}")

    def serve() -> None:
        while not made._over.is_set():
            try:
                near, _ = listener.accept()
            except TimeoutError:
                continue
            made.connections += 1
            far = socket.create_connection(("127.0.0.1", port))
            made._open += [near, far]
            threading.Thread(target=_pass_on, args=(near, far), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made._over.set()
        made.cut()
        thread.join()
        listener.close()


def _pass_on(near: socket.socket, far: socket.socket) -> None:
    with near, far, suppress(OSError):
        while True:
            for ready in select.select([near, far], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                (far if ready is near else near).sendall(data)
