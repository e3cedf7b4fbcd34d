"""``groundswell config``: what it prints, how it fails, and that it finds its files wherever it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launch.bundled import describe, find_config, list_configs
from launch.config_commands import config_group
from orchestrator.config import load_config
from orchestrator.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(config_group, list(arguments))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").iterdir()), ids=lambda path: path.name)
def test_every_bundled_config_loads_and_describes_itself(path: Path) -> None:
    assert path.suffix == ".yaml"
    loaded = load_config(path)
    assert loaded.run.name == path.stem
    assert 20 < len(describe(path)) < 120


def test_the_main_config_grows_at_least_eightfold_by_noise() -> None:
    digits = load_config(find_config("digits"))
    assert digits.controller.policy == "noise_scale"
    assert digits.controller.mode == "act"
    assert digits.batch.max >= 8 * digits.batch.initial
    assert digits.workers.max > digits.workers.initial


def test_validate_says_in_one_line_what_would_run() -> None:
    done = call("validate", "digits")
    assert done.exit_code == 0
    assert done.stderr == ""
    run = load_config(find_config("digits"))
    batch = f"batch {run.batch.initial} to {run.batch.max}"
    assert done.stdout == f"OK digits: task digits, {run.train.epochs} epochs, {batch}\n"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["batch.initial=24", "controller.mode=advise"], "batch 24 (advise only)"),
        (["batch.initial=24", "controller.policy=fixed"], "batch 24\n"),
        (["train.epochs=null", "train.samples=90000"], "90000 samples"),
    ],
)
def test_validate_applies_overrides(overrides: list[str], words: str) -> None:
    arguments = [part for override in overrides for part in ("--set", override)]
    done = call("validate", "digits", *arguments)
    assert done.exit_code == 0
    assert words in done.stdout


@pytest.mark.parametrize("command", ["validate", "show"])
def test_a_broken_config_is_refused_on_stderr_with_code_two(command: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: {nmae: digits}\n", encoding="utf-8")
    done = call(command, str(broken), "--set", "batch.initial=10k")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert f"{broken}, line 1: task.nmae: digits" in done.stderr
    assert "did you mean task.name?" in done.stderr
    assert "--set batch.initial=10k" in done.stderr
    assert "write 10000" in done.stderr


def test_show_prints_a_file_that_reads_back_to_the_same_config(tmp_path: Path) -> None:
    done = call("show", "char_lm", "--set", "optimizer.lr=5e-4")
    assert done.exit_code == 0
    assert "# [samples] " in done.stdout
    copy = tmp_path / "copy.yaml"
    copy.write_text(done.stdout, encoding="utf-8")
    assert load_config(copy) == load_config(find_config("char_lm"), ["optimizer.lr=5e-4"])
    assert "#" not in call("show", "char_lm", "--no-comments").stdout


def test_list_names_every_bundled_config_with_its_first_line() -> None:
    lines = call("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [path.stem for path in list_configs()]
    assert len(lines) >= 3
    for line, path in zip(lines, list_configs(), strict=True):
        assert line.endswith(describe(path))


def test_a_path_wins_where_a_suffix_or_a_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(find_config("char_lm"), tmp_path / "digits.yaml")
    (tmp_path / "digits").mkdir()
    assert find_config("digits.yaml") == Path("digits.yaml")
    assert find_config(tmp_path / "digits.yaml") == tmp_path / "digits.yaml"
    assert find_config("digits").parent.name == "configs"


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("digts", "did you mean digits?"),
        ("digits.yaml", "did you mean digits?"),
        ("configs/nothing_like_it.yaml", "groundswell config list"),
        ("mine", "did you mean mine.yaml?"),
        ("folder/", "is a folder"),
    ],
)
def test_a_config_that_is_not_there_is_refused_with_the_nearest(
    asked: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        find_config(asked if asked != "folder/" else "./folder")
    assert hint in str(caught.value)


def test_an_installed_copy_finds_its_configs_and_imports_no_framework(tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    ignore = shutil.ignore_patterns("__pycache__", "_configs")
    shutil.copytree(ROOT / "orchestrator", site / "orchestrator", ignore=ignore)
    shutil.copytree(ROOT / "launch", site / "launch", ignore=ignore)
    shutil.copytree(ROOT / "configs", site / "launch" / "_configs")
    elsewhere.mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from launch.config_commands import config_group; "
        "import launch; print(launch.__file__); "
        "config_group(['validate', 'digits'], standalone_mode=False); print(*({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=elsewhere)
    where, answer, *frameworks = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert answer.startswith("OK digits:")
    assert "".join(frameworks).strip() == ""
