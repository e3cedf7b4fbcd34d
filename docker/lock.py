"""Which exact packages the images hold: ``python docker/lock.py`` writes the lock files beside it, with uv.

``python docker/lock.py --check`` says whether they still fit pyproject.toml. It needs neither uv nor the network, so
that a test can ask it every time.

================================  ==================================================================================
``requirements.lock``             everything but torch, with hashes
``requirements-cuda.lock``        torch and NVIDIA's libraries as PyPI has them, with hashes
``requirements-cpu.lock``         torch from PyTorch's index of CPU builds: the version alone, see below
``requirements-build.lock``       what builds our own wheel, with hashes; none of it stays in the image
================================  ==================================================================================

The CPU build of torch has its version pinned and no hash: PyTorch's index may build one version again, mirrors of it
build their own, and PyPI, which the hashes are taken from, does not have it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCKER = Path(__file__).resolve().parent
EXTRAS = ("cluster", "plots")  # of groundswell, in the image
PYTHON = "3.11"  # of the base image
MAIN, CUDA, CPU, BUILD = (f"requirements{variant}.lock" for variant in ("", "-cuda", "-cpu", "-build"))
_COMMAND = "python docker/lock.py"
_MARK = "# pyproject.toml: sha256:"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Lock the packages of the images; needs uv (pip install uv).")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the locks are not current")
    problems = check(DOCKER.parent) if parser.parse_args().check else write(DOCKER.parent)
    if problems:
        sys.exit("\n".join(problems))


def write(root: Path) -> list[str]:
    """Resolve anew and write the locks; the problems that are left."""
    project = _project(root)
    built = dict(_compiled(project["build-system"]["requires"]))
    needed = dict(_compiled(_wanted(project)))
    with_torch = {name: needed.pop(name) for name in list(needed) if _comes_with_torch(name)}
    torch = _PIN.findall(with_torch["torch"])[0][1]
    mark = f"# Written by: {_COMMAND}\n{_MARK}{fingerprint(project)}\n"
    for name, text in (
        (MAIN, "".join(needed.values())),
        (CUDA, "".join(with_torch.values())),
        (CPU, f"# Without a hash, on purpose: the docstring of lock.py says why.\ntorch=={torch}+cpu\n"),
        (BUILD, "".join(built.values())),
    ):
        (root / "docker" / name).write_text(mark + text)
    return check(root)


def check(root: Path) -> list[str]:
    """What is wrong with the locks of ``root``, one sentence each; empty if they are current."""
    project, problems = _project(root), []
    locks = {name: (root / "docker" / name).read_text() for name in (MAIN, CUDA, CPU, BUILD)}
    for name, text in locks.items():
        if f"{_MARK}{fingerprint(project)}\n" not in text:
            problems.append(f"docker/{name} was made for other dependencies than pyproject.toml has now")
        for line in re.findall(r"^(?!#|\s).+$", text, re.M):
            if _PIN.match(line) is None:
                problems.append(f"docker/{name}: {line!r} is not one version of a package")
        hashed = text.count("\n    --hash=sha256:") > 0
        for block in _blocks(text).values():
            if hashed != ("--hash=sha256:" in block):
                problems.append(f"docker/{name}: {block.splitlines()[0]!r} has no hash, unlike others")
    for variant in (CPU, CUDA):
        problems += _unmet(_wanted(project), locks[MAIN] + locks[variant], f"{MAIN} with {variant}")
    problems += _unmet(project["build-system"]["requires"], locks[BUILD], BUILD)
    return [f"{problem}; run: {_COMMAND}" for problem in problems]


def fingerprint(project: dict[str, Any]) -> str:
    """A hash of what the locks are resolved from; comments and order in pyproject.toml do not count."""
    asked = {"python": PYTHON, "needed": sorted(_wanted(project)), "build": sorted(project["build-system"]["requires"])}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _project(root: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())
    return project


def _wanted(project: dict[str, Any]) -> list[str]:
    """The requirements of groundswell with the extras that the image has."""
    table = project["project"]
    return [*table["dependencies"], *(line for extra in EXTRAS for line in table["optional-dependencies"][extra])]


def _comes_with_torch(name: str) -> bool:
    """Whether PyPI's torch alone needs a package: its builds for CUDA do, those for the CPU do not."""
    return name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))


def _compiled(requirements: Iterable[str]) -> list[tuple[str, str]]:
    """What uv resolves ``requirements`` to, by package, as lines of a lock."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        sys.exit("uv, which resolves the requirements, is not installed; run: pip install uv")
    options = ["--generate-hashes", "--python-version", PYTHON, "--python-platform", "linux", "--no-header"]
    # Neither indexes nor settings of the machine at hand: the lock is the same wherever it is made.
    options += ["--quiet", "--no-config", "--default-index", "https://pypi.org/simple"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    command, asked = [uv, "pip", "compile", "-", *options], "\n".join(requirements)
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=plain)
    if done.returncode != 0:
        sys.exit(f"uv found no set of versions that fits:\n{done.stderr}")
    return list(_blocks(done.stdout).items())


def _blocks(text: str) -> dict[str, str]:
    """A lock's text by package: the line with its version, and the indented ones below."""
    found = re.findall(r"^[^#\s].*\n(?:[ \t].*\n)*", text, re.M)
    return {canonicalize_name(re.split(r"[=\s]", block)[0]): block for block in found}


def _unmet(requirements: Iterable[str], text: str, where: str) -> list[str]:
    pins = {canonicalize_name(name): version for name, version in re.findall(_PIN.pattern, text, re.M)}
    problems = []
    for requirement in map(Requirement, requirements):
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None or not requirement.specifier.contains(pin, prereleases=True):
            problems.append(f"{where}: pyproject.toml wants {requirement}, and the lock has {pin or 'none'}")
    return problems


if __name__ == "__main__":
    main()
