"""The lock files hold what pyproject.toml asks for, and whoever changes the one without the other is told."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("docker_lock", ROOT / "docker" / "lock.py")
assert _spec is not None
assert _spec.loader is not None
lock = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lock)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "docker").mkdir()
    for path in (ROOT / "docker").glob("*.lock"):
        shutil.copy(path, tmp_path / "docker")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_locks_are_current() -> None:
    assert lock.check(ROOT) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"rich>=13",', '"rich>=13", "tqdm",'),
        ('"rich>=13",', ""),
        ("numpy>=1.26", "numpy>=1.27"),
        ("matplotlib>=3.8", "matplotlib>=3.9"),
        ("hatchling>=1.25", "hatchling>=1.26"),
    ],
)
def test_locks_of_other_dependencies_are_not_current(copy: Path, old: str, new: str) -> None:
    edit(copy / "pyproject.toml", old, new)
    problems = lock.check(copy)
    assert any("was made for other dependencies" in problem for problem in problems)
    assert all("run: python docker/lock.py" in problem for problem in problems)


def test_what_the_image_does_not_hold_does_not_make_the_locks_old(copy: Path) -> None:
    edit(copy / "pyproject.toml", "hypothesis>=6.100", "hypothesis>=6.101")
    edit(copy / "pyproject.toml", "[project.optional-dependencies]", "# A remark.\n[project.optional-dependencies]")
    assert lock.check(copy) == []


@pytest.mark.parametrize(
    ("name", "pattern", "becomes", "said"),
    [
        (lock.MAIN, r"^ray==\S+", "ray==2.59.0", "wants ray[train]"),
        (lock.MAIN, r"^ray==\S+ \\\n(    --hash.*\n)+", "", "and the lock has none"),
        (lock.MAIN, r"^pydantic==(\S+ \\\n)(    --hash.*\n)+", r"pydantic==2.14.3\n", "has no hash"),
        (lock.MAIN, r"^pyyaml==\S+", "pyyaml>=6", "not one version"),
        (lock.MAIN, r"\Z", "--find-links /opt/wheels\n", "not one version"),
        (lock.CPU, r"^torch==.*", "torch @ https://example.org/torch.whl", "not one version"),
        (lock.CPU, r"^torch==.*", "torch==2.8.0+cpu", "wants torch"),
        (lock.CUDA, r"^torch==\S+", "torch==2.14.0", "wants torch"),
        (lock.BUILD, r"^hatchling==\S+", "hatchling==1.20.0", "wants hatchling"),
    ],
)
def test_locks_changed_by_hand_are_refused(copy: Path, name: str, pattern: str, becomes: str, said: str) -> None:
    path = copy / "docker" / name
    text, count = re.subn(pattern, becomes, path.read_text(), count=1, flags=re.M)
    assert count == 1
    path.write_text(text)
    assert any(said in problem for problem in lock.check(copy))


def test_both_variants_hold_the_same_torch() -> None:
    versions = {
        re.findall(r"^torch==([\d.]+)", (ROOT / "docker" / name).read_text(), re.M)[0] for name in (lock.CPU, lock.CUDA)
    }
    assert len(versions) == 1


def test_the_locks_are_for_the_python_of_the_image() -> None:
    base = re.findall(r"^ARG BASE=\S+:(\d+\.\d+)\.\d+-", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    assert base == [lock.PYTHON]
