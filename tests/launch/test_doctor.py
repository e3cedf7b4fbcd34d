"""``groundswell doctor`` names what is wrong, how to mend it, and says so with its exit code."""

from __future__ import annotations

import shutil
import socket
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

from launch import doctor


def call(*arguments: str) -> Result:
    return CliRunner().invoke(doctor.doctor_command, list(arguments))


def wrong(result: Result) -> list[tuple[str, str]]:
    """Each finding that is wrong, with its remedy."""
    lines = result.output.splitlines()
    return [(line, lines[i + 1]) for i, line in enumerate(lines) if line.startswith("WRONG")]


def test_a_sound_installation_is_well(tmp_path: Path) -> None:
    result = call("--no-ray", "--run-dir", str(tmp_path / "not" / "yet"))
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "All is well."
    assert f"torch: {torch.__version__}" in result.output
    assert str(tmp_path) in result.output
    assert not (tmp_path / "not").exists()


@pytest.mark.ray
def test_ray_is_started_for_a_moment(tmp_path: Path) -> None:
    result = call("--run-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "ok    Ray cluster: local: 1 node," in result.output
    import ray

    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("installed", "seen"), [("2.8.1", "torch: 2.8.1"), ("2.14.0+cu130", "torch: 2.14.0+cu130"), (None, "not installed")]
)
def test_a_wrong_version_is_named_with_the_command_that_installs_the_right_one(
    installed: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name != "torch":
            return real(name)
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    result = call("--no-ray")
    ((line, fix),) = wrong(result)
    assert result.exit_code == 1
    assert seen in line
    assert fix.strip() == "to mend it: pip install 'torch>=2.9,<2.14'"
    assert result.output.splitlines()[-1] == "1 thing to mend."


def test_a_full_disk_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=5e8))
    ((line, fix),) = wrong(call("--no-ray"))
    assert "0.5 GB free" in line
    assert "free at least 2 GB" in fix


def test_a_run_dir_under_a_file_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ((line, fix),) = wrong(call("--no-ray", "--run-dir", str(tmp_path / "file" / "runs")))
    assert "cannot be written to" in line
    assert "--run-dir" in fix


def test_a_driver_without_a_torch_for_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ((line, fix),) = wrong(call("--no-ray"))
    assert "sees no GPU" in line
    assert "nvidia-smi" in fix


def test_a_ray_that_cannot_be_imported_is_wrong_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.train", None)
    result = call()
    ((line, _),) = wrong(result)
    assert "Ray Train: ModuleNotFoundError" in line
    assert "Ray cluster" not in result.output


def test_a_cluster_where_nobody_answers_is_wrong_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        ((line, fix),) = wrong(call("--address", address))
    assert f"nobody answers at {address}" in line
    assert "ray start --head" in fix


@pytest.mark.parametrize("address", ["local", "auto", "ray://head"])
def test_only_addresses_with_a_port_are_knocked_at(address: str) -> None:
    assert doctor.unreachable(address) is None


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_open_port_answers(form: str) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert doctor.unreachable(form.format(server.getsockname()[1])) is None
