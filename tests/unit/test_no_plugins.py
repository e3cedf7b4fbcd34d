"""A config runs code only where it names it, and none at all where that is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from launch.cli import main
from orchestrator.config import RunConfig, load_config
from orchestrator.config.plugins import KEYS, plugins
from orchestrator.errors import ConfigError, Problem
from tests.support import config

NAMED = {"task.name", "optimizer.name", "schedule.name", "lr_rule.name", "controller.policy", "measure.estimator"}


def found(path: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, plugins=False)
    return [problem for problem in caught.value.problems if isinstance(problem, Problem)]


def write(place: Path, task: str = "digits") -> Path:
    file = place / "mine.yaml"
    settings = config(place).model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(settings | {"task": {"name": task}}))
    return file


def test_the_keys_are_those_whose_help_says_that_code_may_be_named() -> None:
    described = {
        f"{section}.{key}"
        for section, about in RunConfig.model_fields.items()
        for key, field in getattr(about.annotation, "model_fields", {}).items()
        if "module:" in (field.description or "")
    }
    assert {".".join(path) for path in KEYS} == described == NAMED


@pytest.mark.parametrize("key", sorted(NAMED))
def test_code_of_the_configs_own_is_refused_where_it_is_named(key: str, tmp_path: Path) -> None:
    file = write(tmp_path)
    overrides = ["lr_rule.name=linear", f"{key}=my_code:make"]  # auto would ask for the optimizer's family
    assert load_config(file, overrides)
    (problem,) = found(file, *overrides)
    assert (problem.key, problem.value, problem.source) == (key, "my_code:make", f"--set {key}=my_code:make")
    assert "--no-plugins" in problem.rule


def test_a_config_of_built_in_names_passes(tmp_path: Path) -> None:
    assert load_config(write(tmp_path), plugins=False).task.name == "digits"
    assert list(plugins(config(tmp_path))) == []


@pytest.mark.parametrize("command", [("run",), ("probe",), ("config", "validate"), ("config", "show")])
def test_the_commands_refuse_it_before_it_is_imported(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_code.py").write_text("open('ran', 'w').close()\n")
    file = write(tmp_path, task="my_code:make")
    done = CliRunner().invoke(main, [*command, str(file), "--no-plugins"])
    assert done.exit_code == 2
    assert "task.name: my_code:make" in done.stderr
    assert not (tmp_path / "ran").exists()
