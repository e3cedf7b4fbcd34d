"""What an image built from docker/Dockerfile will be like, as far as its text says; -m image builds it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
TEXT = (DOCKER / "Dockerfile").read_text()
SECRET = re.compile(r"token|passw|secret|api_?key|credential", re.I)


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each, continued lines joined."""
    text = re.sub(r"^#.*\n", "", TEXT, flags=re.M)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)]


def arguments(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def test_hadolint_finds_nothing() -> None:
    done = tool("hadolint", "docker/Dockerfile")
    assert done.returncode == 0, done.stdout


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(TEXT.replace("    && rm -rf /var/lib/apt/lists/* \\\n", ""))
    assert "DL3009" in tool("hadolint", str(tmp_path / "Dockerfile")).stdout


def test_shellcheck_finds_nothing() -> None:
    done = tool("shellcheck", "docker/health.sh")
    assert done.returncode == 0, done.stdout


def test_every_stage_stands_on_the_one_pinned_base() -> None:
    (base,) = (rest for rest in arguments("ARG") if rest.startswith("BASE="))
    assert re.fullmatch(r"BASE=docker\.io/library/python:\d+\.\d+\.\d+-slim-[a-z]+", base)
    assert {rest.split(" AS ")[0] for rest in arguments("FROM")} == {"${BASE}"}
    assert len(arguments("FROM")) == 3


def test_it_runs_as_user_1000_who_owns_nothing_that_is_installed() -> None:
    assert arguments("USER") == ["1000:1000"]
    assert "USER" in [name for name, _ in instructions()][-5:]
    assert not any("chown" in rest for rest in arguments("COPY"))


def test_the_command_is_ours_below_an_init_and_a_health_check_is_there() -> None:
    assert [json.loads(rest) for rest in arguments("ENTRYPOINT")] == [["tini", "--", "groundswell"]]
    (check,) = arguments("HEALTHCHECK")
    assert check.endswith('CMD ["groundswell-health"]')
    assert (DOCKER / "health.sh").stat().st_mode & 0o111 == 0o111


def test_no_layer_holds_a_secret() -> None:
    """``ARG`` and ``ENV`` stay in the history of an image, and ``COPY`` in its layers."""
    for name in ("ARG", "ENV", "LABEL", "COPY", "ADD"):
        for rest in arguments(name):
            assert not SECRET.search(rest), f"{name} {rest}"
    for rest in arguments("RUN"):
        assert "--mount=type=secret" in rest or not SECRET.search(rest), rest


def test_only_what_is_named_goes_into_a_build() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    for pattern in allowed:
        assert list(ROOT.glob(pattern)), f"{pattern} matches nothing"
        assert not SECRET.search(pattern)
    for source in (
        word for rest in arguments("COPY") for word in rest.split()[:-1] if not word.startswith(("--", "/"))
    ):
        pattern = source.replace("${VARIANT}", "cpu")
        assert pattern == "." or any(Path(pattern).match(line) for line in allowed), source


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-build.lock"])
def test_what_has_hashes_is_installed_by_them(name: str) -> None:
    (command,) = (rest for rest in arguments("RUN") if f"-r {name}" in rest)
    assert f"pip install --require-hashes --no-deps -r {name}" in command.replace("--no-cache-dir ", "")
