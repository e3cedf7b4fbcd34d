"""What travels with a job: weighed and packed in real folders by Ray's own walk."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from launch.ray_jobs import package
from launch.ray_jobs.head import ClusterError
from launch.ray_jobs.jobs import git_revision
from orchestrator.config import load_config
from tests import support


def fill(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def packed(folder: Path, scratch: Path) -> zipfile.ZipFile:
    target = scratch / "package.zip"
    target.unlink(missing_ok=True)
    config = support.config("/shared/runs")
    found = package.contents(folder)
    made = package.pack(folder, config, found=found, target=target)
    assert made == package.Package(config_path=".groundswell/run.yaml", num_files=len(found.files))
    return zipfile.ZipFile(target)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    return made


def test_code_travels_and_what_a_run_does_not_need_stays(folder: Path, tmp_path: Path) -> None:
    fill(
        folder,
        **{
            "task.py": "code",
            "lib/inner.py": "code",
            "lib/runs/log.py": "a module of that name",
            ".gitignore": "secret*\n",
            "secret.txt": "x",
            ".git/HEAD": "x",
            ".venv/pyvenv.cfg": "x",
            "my env [1]/pyvenv.cfg": "x",
            "my env [1]/lib/big.so": "x",
            "lib/__pycache__/inner.pyc": "x",
            "runs/digits/metrics.jsonl": "x",
            "wandb/x": "x",
            "mlruns/x": "x",
            ".env": "TOKEN=x",
            ".groundswell/stale.yaml": "x",
        },
    )
    travels = {"task.py", "lib/inner.py", "lib/runs/log.py", ".gitignore"}
    assert set(package.contents(folder).files) == travels
    with packed(folder, tmp_path) as zipped:
        assert {name for name in zipped.namelist() if not name.endswith("/")} == {*travels, ".groundswell/run.yaml"}


def test_code_in_a_virtual_environment_travels_without_it(folder: Path, tmp_path: Path) -> None:
    fill(
        folder,
        **{
            "pyvenv.cfg": "x",
            "bin/python": "x",
            "lib/python3.11/site-packages/torch.py": "x",
            "lib64/python3.11/site-packages/torch.py": "x",
            "include/python3.11/x.h": "x",
            "task.py": "code",
            "lib/inner.py": "code",
            "package/bin/tool.py": "code",
        },
    )
    with packed(folder, tmp_path) as zipped:
        names = {name for name in zipped.namelist() if not name.endswith("/")}
    assert names == {"task.py", "lib/inner.py", "package/bin/tool.py", ".groundswell/run.yaml"}


def test_what_commonly_holds_a_secret_stays_and_is_named(folder: Path, tmp_path: Path) -> None:
    secret = [
        ".aws/credentials",
        ".env",
        ".env.local",
        ".pypirc",
        ".ray/auth_token",
        "deploy/.env.production",
        "deploy/kubeconfig",
        "home/.kube/config",
        "id_rsa",
        "keys/tls.pem",
    ]
    sent = ["environment.py", "keys/__init__.py", "task.py", "tokens.txt"]
    fill(folder, **dict.fromkeys([*secret, *sent, "ignored.pem"], "x"), **{".gitignore": "ignored*\n"})
    found = package.contents(folder)
    assert sorted(found.secret) == secret
    assert package.left_behind(found) == [
        "not sent, for such files commonly hold secrets: "
        ".aws/credentials, .env, .env.local, .pypirc, .ray/auth_token and 5 more"
    ]
    with packed(folder, tmp_path) as zipped:
        names = {name for name in zipped.namelist() if not name.endswith("/")}
    assert names == {*sent, ".gitignore", ".groundswell/run.yaml"}


def test_the_config_that_travels_is_the_one_that_was_checked(folder: Path, tmp_path: Path) -> None:
    with packed(folder, tmp_path) as zipped:
        zipped.extract(".groundswell/run.yaml", tmp_path)
    assert load_config(tmp_path / ".groundswell" / "run.yaml") == support.config("/shared/runs")


def test_the_same_files_make_the_same_package_so_that_it_is_not_uploaded_again(folder: Path, tmp_path: Path) -> None:
    fill(folder, **{"task.py": "code"})
    with packed(folder, tmp_path) as zipped:
        first = Path(str(zipped.filename)).read_bytes()
    with packed(folder, tmp_path) as zipped:
        assert Path(str(zipped.filename)).read_bytes() == first


def test_a_file_of_data_stays_and_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "LARGEST_FILE_BYTES", 1000)
    fill(folder, **{"task.py": "code", "data/train *1.bin": "x" * 1001, "data/small.bin": "x" * 1000})
    found = package.contents(folder)
    assert set(found.files) == {"task.py", "data/small.bin"}
    [said] = package.left_behind(found)
    assert said.endswith("data/ 1001 bytes (of it data/train *1.bin)")
    with packed(folder, tmp_path) as zipped:
        assert {name for name in zipped.namelist() if not name.startswith(".")} == {"task.py", "data/small.bin"}


def test_too_much_is_refused_with_the_largest_entries(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.runtime_env import packaging

    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 3000)
    fill(folder, **{"a.py": "x" * 10, "data/one": "x" * 900, "data/two": "x" * 1100, "weights": "x" * 1000})
    with pytest.raises(ClusterError) as refused:
        packed(folder, tmp_path)
    said = str(refused.value)
    assert "2.9 KiB to send, and Ray takes less than 2.9 KiB" in said
    assert "The largest: data/ 2.0 KiB (of it data/two), weights 1000 bytes, a.py 10 bytes." in said
    assert not (tmp_path / "package.zip").exists()


def test_the_revision_says_whether_there_are_changes_beyond_it(folder: Path) -> None:
    assert git_revision(folder) == "none"

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(folder), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    fill(folder, **{"task.py": "one"})
    git("add", ".")
    git("commit", "-qm", "one")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    assert git_revision(folder) == head
    fill(folder, **{"task.py": "two"})
    assert git_revision(folder) == f"{head}-dirty"
