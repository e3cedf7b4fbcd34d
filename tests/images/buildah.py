"""Builds the image where there is no Docker engine, and perhaps no registry: with buildah, in a folder of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_REGISTRY, _TORCH = "https://registry-1.docker.io/v2/", "https://download.pytorch.org/whl/cpu/torch/"
_DEBIAN = "http://deb.debian.org/debian"
_OWN_CERTIFICATES = Path("/usr/local/share/ca-certificates")


class Buildah:
    """Calls of buildah; everything that it keeps lies below ``folder``."""

    def __init__(self, folder: Path) -> None:
        assert shutil.which("buildah"), "building the image needs buildah: apt-get install buildah debootstrap"
        assert os.geteuid() == 0, "chroot isolation needs root"
        self.folder = folder

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        places = ["--root", str(self.folder / "root"), "--runroot", str(self.folder / "run")]
        command = ["buildah", *places, "--storage-driver", "vfs", *arguments]
        # The caches of RUN --mount lie in TMPDIR, and the files of buildah are not told apart from ours there.
        plain = {**os.environ, "TMPDIR": str(self.folder)}
        done = subprocess.run(command, capture_output=True, text=True, env=plain)
        assert not check or done.returncode == 0, f"{arguments} ended with {done.returncode}:\n" + (
            done.stdout[-4000:] + done.stderr[-4000:]
        )
        return done

    def build(self, context: Path, dockerfile: Path, tag: str, *arguments: str) -> None:
        options = ["--isolation", "chroot", "--network", "host", "--format", "docker", "--pull=missing"]
        self("bud", *options, "-f", str(dockerfile), "-t", tag, *arguments, str(context))

    def run(self, container: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``command`` in ``container``, as the image's user and in its folder."""
        return self("run", "--isolation", "chroot", "--network", "host", container, "--", *command, check=check)


@contextmanager
def built_image(tag: str) -> Iterator[Buildah]:
    """The CPU image under ``tag``; what was built for it is deleted at the end."""
    folder = Path(tempfile.mkdtemp(prefix="gs-image-"))
    try:
        buildah = Buildah(folder)
        with _torch_index(folder / "index") as torch_arguments:
            arguments = [*_base_arguments(buildah), *torch_arguments]
            buildah.build(ROOT, ROOT / "docker" / "Dockerfile", tag, *arguments)
        yield buildah
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _base_arguments(buildah: Buildah) -> list[str]:
    """None where the base can be pulled, else those that name one with Debian's own Python, made here."""
    if _answers(_REGISTRY):
        return []
    base, name = buildah.folder / "base", "localhost/groundswell-base"
    packages = "--include=ca-certificates,python3,python3-venv"
    _call("debootstrap", "--variant=minbase", packages, "bookworm", str(base), _DEBIAN)
    if _OWN_CERTIFICATES.is_dir():  # networks that look into connections sign them themselves
        shutil.copytree(_OWN_CERTIFICATES, base / "usr/local/share/ca-certificates", dirs_exist_ok=True)
        _call("chroot", str(base), "update-ca-certificates")
        (base / "etc/pip.conf").write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n")
    container = buildah("from", "scratch").stdout.strip()
    buildah("copy", container, str(base), "/")
    buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    buildah("commit", "--rm", container, name)
    shutil.rmtree(base)
    return ["--build-arg", f"BASE={name}"]


@contextmanager
def _torch_index(folder: Path) -> Iterator[list[str]]:
    """None where PyTorch's index can be reached, else those that name one with the wheel that pip finds here."""
    if _answers(_TORCH):
        yield []
        return
    (pin,) = re.findall(r"^torch==\S+", (ROOT / "docker" / "requirements-cpu.lock").read_text(), re.M)
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--dest", str(folder / "torch")]
    _call(sys.executable, "-m", "pip", "download", "--quiet", *options, pin)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield ["--build-arg", f"TORCH_INDEX=http://127.0.0.1:{server.server_port}"]
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
