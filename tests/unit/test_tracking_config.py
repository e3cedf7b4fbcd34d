"""What the config says of services: secrets and addresses are refused unread, and so is a library that is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.cli import main
from orchestrator.config import load_config, to_yaml
from orchestrator.errors import ConfigError
from orchestrator.runtime.preparation import prepare
from orchestrator.runtime.tracking import check_libraries
from tests.support import config
from tests.unit.test_config import MINIMAL

SECRET = "0123456789abcdef0123456789abcdef01234567"


def refused(tmp_path: Path, section: str) -> str:
    path = tmp_path / "case.yaml"
    path.write_text(f"{MINIMAL}tracking: {{{section}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (f"wandb_api_key: {SECRET}", "tracking.wandb_api_key"),
        (f"mlflow_tracking_uri: 'https://me:{SECRET}@example.org'", "tracking.mlflow_tracking_uri"),
        (f"mlflow_password: {SECRET}", "tracking.mlflow_password"),
        (f"mlflow_experiment: 'https://me:{SECRET}@example.org/waves'", "tracking.mlflow_experiment"),
        (f"wandb_project: p, tags: {{wandb_token: {SECRET}}}", "tracking.tags.wandb_token"),
        (f"wandb_project: p, tags: {{store: 's3://me:{SECRET}@bucket'}}", "tracking.tags"),
    ],
)
def test_secrets_and_addresses_are_refused_and_not_repeated(tmp_path: Path, section: str, key: str) -> None:
    said = refused(tmp_path, section)
    assert f"case.yaml, line 5: {key}" in said
    assert "in the environment" in said
    assert "MLFLOW_TRACKING_URI" in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("section", "hint"),
    [
        ("mlflow_experimnt: waves", "did you mean tracking.mlflow_experiment?"),
        ("wandb_entity: team", "give wandb_project as well"),
        ("every_s: -1", "must be at least 0"),
        ("mlflow_experiment: ''", "must not be empty"),
    ],
)
def test_other_mistakes_are_refused_with_what_to_write(tmp_path: Path, section: str, hint: str) -> None:
    assert hint in refused(tmp_path, section)


def test_what_is_given_reads_back(tmp_path: Path) -> None:
    given = config(tmp_path, tracking={"mlflow_experiment": "waves", "tags": {"team": "a", "git": SECRET}})
    (tmp_path / "c.yaml").write_text(to_yaml(given))
    assert load_config(tmp_path / "c.yaml") == given


def test_a_missing_library_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # as W&B leaves one where it was used: no library
    monkeypatch.syspath_prepend(str(tmp_path))
    paths = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", paths)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    settings = config(tmp_path / "runs", tracking={"wandb_project": "swell"})
    with pytest.raises(ConfigError, match=r"pip install 'groundswell\[wandb\]'"):
        prepare(settings, resume=False)
    assert not (tmp_path / "runs").exists()
    check_libraries(config(tmp_path))


def test_the_command_refuses_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.runtime.tracking.find_spec", lambda name: None)
    arguments = ["run", "digits", "--run-dir", str(tmp_path / "r"), "--set", "tracking.mlflow_experiment=waves"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "pip install 'groundswell[mlflow]'" in done.output
    assert not (tmp_path / "r").exists()
