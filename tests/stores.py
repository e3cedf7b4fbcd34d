"""A real S3 service on this machine, in a process of its own, behind a door that can be shut."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import final

import s3fs

BUCKET = "s3://bucket"


@final
class Door:
    """Passes connections on to ``port`` while it is open; shut, it ends those there are and takes no others."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._sockets: list[socket.socket] = []
        self._is_open = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.bytes_per_s: float | None = None  # towards the service
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        self._is_open = False
        for each in [self._listener, *self._sockets]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._sockets = []

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._is_open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        listener = self._listener
        with suppress(OSError):
            while True:
                caller, _ = listener.accept()
                behind = socket.create_connection(("127.0.0.1", self._behind))
                self._sockets += [caller, behind]
                threading.Thread(target=self._pass, args=(caller, behind, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(behind, caller, False), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, towards: bool) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
                if towards and self.bytes_per_s is not None:
                    time.sleep(len(data) / self.bytes_per_s)
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _put(url: str) -> None:
    """Make the bucket."""
    urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()


@contextmanager
def s3_service() -> Iterator[tuple[Door, dict[str, str]]]:
    """The door of a service with one empty bucket, and the environment in which clients find it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    service = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    s3fs.S3FileSystem.clear_instance_cache()  # of a service before this one
    try:
        until_s = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert service.poll() is None, "moto's server did not start"
                assert time.monotonic() < until_s, "moto's server did not answer"
                time.sleep(0.05)
        door = Door(port)
        _put(f"http://127.0.0.1:{port}/bucket")
        yield (
            door,
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{door.port}",
                "AWS_ACCESS_KEY_ID": "anyone",
                "AWS_SECRET_ACCESS_KEY": "anything",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_MAX_ATTEMPTS": "1",  # a door that is shut is seen at once
            },
        )
    finally:
        service.kill()
        service.wait()
