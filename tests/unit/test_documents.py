"""README, code and CI agree: the examples are the tested ones, the commands exist, and CI runs what is documented."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from launch.cli import main
from orchestrator.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_example_task_is_the_tested_one() -> None:
    assert (ROOT / "tests" / "unit" / "example_task.py").read_text() in README


def test_the_example_config_trains_the_example_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.runtime.worker import local_worker
    from orchestrator.train import train

    (tmp_path / "example.yaml").write_text(blocks("yaml")[0])
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "unit"))
    config = load_config(tmp_path / "example.yaml", [f"run.dir={tmp_path}", "train.epochs=6"])
    assert train(config, local_worker(config), resume=False)


def test_ci_runs_the_readmes_test_command() -> None:
    command = blocks("bash")[1].strip()
    assert " -m pytest" in command
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash")[3:] for line in block.splitlines() if line.startswith("groundswell")]
)
def test_the_commands_of_the_readme_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group):
        words = words[1:]
        command = command.commands[words[0]]
    command.make_parser(context).parse_args(words[1:])  # raises for an option that is not there, or takes a value


def test_the_keys_of_the_readme_are_keys_of_the_config() -> None:
    for key in re.findall(r"`((?:batch|controller|lr_rule|measure|optimizer|workers|train)\.[a-z_]+)`", README):
        section, field = key.split(".")
        inner = RunConfig.model_fields[section].annotation
        assert inner is not None
        assert field in inner.model_fields, key


def test_the_tests_that_the_readme_names_are_there() -> None:
    for path in re.findall(r"`(tests/[a-z_/]+\.py)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("command", [["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"]], ids=str)
def test_format_lint_and_types_are_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configs_in_the_readme_are_whole(tmp_path: Path) -> None:
    for text in blocks("yaml"):
        assert isinstance(yaml.safe_load(text), dict)
        (tmp_path / "c.yaml").write_text(text)
        load_config(tmp_path / "c.yaml")


def test_the_metrics_of_the_readme_are_those_of_the_code() -> None:
    from orchestrator.ray_train.metrics import exported_names

    rows = dict(re.findall(r"\| `(ray_groundswell_\w+)` \| (.+) \|", README))
    assert rows == exported_names()
