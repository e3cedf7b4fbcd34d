"""A run goes on with a config that differs where it may, and says so; where it may not it is refused, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import RunConfig, load_config
from orchestrator.config.differences import differences, refuse_changes
from orchestrator.errors import ConfigError
from orchestrator.runtime import folder
from orchestrator.runtime.preparation import refuse_changed_config
from tests.support import config
from tests.unit.small_runs import BATCH, events, groundswell, rows_of, settings_of, trained

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
LONGER: dict[str, Any] = {"train": {"samples": 10 * BATCH}}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"run": {"seed": 1}}, "run.seed", "order of the samples"),
    ({"task": {"name": "char_lm"}}, "task.name", "what is trained"),
    ({"task": {"options": {"width": 3}}}, "task.options.width", "the model or the samples"),
    ({"data": {"seed_each_sample": False}}, "data.seed_each_sample", "augmentation"),
    ({"optimizer": {"name": "adam", "momentum": None}}, "optimizer.name", "state of the other one"),
    ({"optimizer": {"momentum": 0.8}}, "optimizer.momentum", "the old value"),
    ({"optimizer": {"weight_decay": 0.1}}, "optimizer.weight_decay", "the old value"),
    ({"train": {"samples": 640, "ema_half_life_samples": 8}}, "train.ema_half_life_samples", "no averaged weights"),
]
TOLD: list[tuple[dict[str, Any], str]] = [
    ({"train": {"samples": 960}}, "train.samples 640 -> 960"),
    ({"train": {"max_grad_norm": 1.0}}, "train.max_grad_norm null -> 1.0"),
    ({"optimizer": {"lr": 0.02}}, "optimizer.lr 0.05 -> 0.02"),
    ({"batch": {"max": 64}}, "batch.max 32 -> 64"),
    ({"controller": {"mode": "advise"}}, "controller.mode act -> advise"),
    ({"schedule": {"name": "cosine"}}, "schedule.name constant -> cosine"),
]
SILENT: list[dict[str, Any]] = [
    {"run": {"dir": "elsewhere"}},
    {"workers": {"max": 4}},
    {"checkpoint": {"every_samples": 64, "asynchronous": False}},
    {"recovery": {"max_failures": 9}},
    {"evaluation": {"every_samples": 64}},
    {"data": {"prefetch": 7}},
    {"tracking": {"every_s": 7.0}},
    {"budget": {"worker_hours": 1.0}},
    {"ledger": True},
]


def plain(settings: RunConfig) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    found: dict[str, Any] = json.loads(json.dumps(settings.model_dump(mode="json")))
    return found


def refusal(before: RunConfig, now: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_changes(
            differences(plain(before), now), accepted=now.recovery.accept_changed, source="runs/mine/config.yaml"
        )
    return str(caught.value)


@pytest.mark.parametrize(("sections", "key", "why"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_the_checkpoints_state_belongs_to_cannot_change(sections: dict[str, Any], key: str, why: str) -> None:
    before, now = config("x"), config("x", **sections)
    said = refusal(before, now)
    assert said.startswith("runs/mine/config.yaml: ")
    assert f" {key}: " in said
    assert why in said
    assert "or begin a new run" in said


@pytest.mark.parametrize(("sections", "told"), TOLD, ids=[case[1] for case in TOLD])
def test_what_is_read_afresh_may_change_and_is_told(sections: dict[str, Any], told: str) -> None:
    found = differences(plain(config("x")), config("x", **sections))
    refuse_changes(found, accepted=(), source="")
    assert told in [str(difference) for difference in found if difference.is_told]


@pytest.mark.parametrize("sections", SILENT, ids=lambda sections: str(*sections))
def test_where_and_how_a_run_is_kept_may_change_without_a_word(sections: dict[str, Any]) -> None:
    found = differences(plain(config("x")), config("x", **sections))
    assert found
    refuse_changes(found, accepted=(), source="")
    assert not any(difference.is_told for difference in found)


def test_the_same_config_does_not_differ() -> None:
    everything = {key: value for case in (*REFUSED[3:], *TOLD) for key, value in case[0].items()}
    for settings in (config("x"), config("x", **everything)):
        assert differences(plain(settings), settings) == []


def test_all_differences_are_listed_at_once() -> None:
    said = refusal(config("x"), config("x", run={"seed": 1}, optimizer={"momentum": 0.8}, task={"options": {"a": 1}}))
    assert all(key in said for key in ("run.seed", "optimizer.momentum", "task.options.a"))


def test_options_of_a_task_count_also_where_they_are_given_no_more() -> None:
    said = refusal(config("x", task={"options": {"a": 1}}), config("x"))
    assert "task.options.a: null" in said
    assert "the run was trained with 1" in said


def test_a_key_of_a_newer_version_is_no_difference() -> None:
    older = plain(config("x"))
    del older["optimizer"]["part_samples"], older["budget"]
    assert differences(older, config("x")) == []


def test_a_task_that_is_known_to_be_the_same_can_be_accepted_by_name() -> None:
    before = config("x", task={"options": {"place": "/old"}})
    options = {"options": {"place": "/new"}}
    assert "recovery.accept_changed: [task.options]" in refusal(before, config("x", task=options))
    for accepted in (["task.options"], ["task.options.place"]):
        now = config("x", task=options, recovery={"accept_changed": accepted})
        refuse_changes(differences(plain(before), now), accepted=now.recovery.accept_changed, source="")
    now = config("x", task=options, recovery={"accept_changed": ["task.name", "task.options.other"]})
    assert "task.options.place" in refusal(before, now)


def test_only_what_can_be_accepted_can_be_named() -> None:
    for name, told in (("task.option", "did you mean task.options?"), ("run.seed", "write one of task.name")):
        with pytest.raises(ConfigError, match=r"recovery\.accept_changed") as caught:
            load_config(DIGITS, [f"recovery.accept_changed=[{name}]"])
        assert told in str(caught.value)


# Runs


def test_a_run_that_goes_on_says_what_is_other_from_there(run: Path) -> None:
    sections = {"train": {"samples": 12 * BATCH}, "optimizer": {"lr": 0.01}, "workers": {"max": 2}}
    trained(run, resume=True, sections=sections, optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    (event,) = events(run, "config_changed")
    assert (event["step"], event["samples_seen"]) == (7, 7 * BATCH)
    assert event["changes"] == [
        {"key": "train.samples", "before": 320, "now": 384},
        {"key": "optimizer.lr", "before": 0.05, "now": 0.01},
    ]
    assert "train.samples 320 -> 384, optimizer.lr 0.05 -> 0.01" in event["reason"]
    assert {lr for step, lr in rows_of(run, "step", "lr") if step >= 7} == {0.01}


def test_a_refused_config_leaves_the_folder_as_it_was(run: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"config\.yaml: optimizer\.momentum"):
        trained(run, resume=True, sections={"optimizer": {"momentum": 0.1}})
    assert {path: path.read_bytes() for path in (run / "run").rglob("*") if path.is_file()} == before


def test_where_the_runs_config_is_torn_the_checkpoints_own_is_gone_by(run: Path) -> None:
    (run / "run" / folder.CONFIG).write_text("run: {name")
    with pytest.raises(ConfigError, match=r"step-000000007: optimizer\.momentum: 0\.1"):
        trained(run, resume=True, sections={"optimizer": {"momentum": 0.1}})


def test_a_run_without_checkpoints_begins_again_with_any_config(tmp_path: Path) -> None:
    settings = config(tmp_path)
    refuse_changed_config(settings, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / folder.CONFIG).write_text("optimizer: {name: adam}")
    (tmp_path / "run" / folder.EVENTS).write_text('{"attempt": 1, "kind": "started"}\n')
    refuse_changed_config(settings, tmp_path / "run")


def test_the_command_refuses_with_the_difference_before_anything_starts(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    assert groundswell(settings).exit_code == 0
    for arguments in (["--resume"], ["--auto-resume"]):
        result = groundswell(settings, "--set", "optimizer.momentum=0.5", "--set", "train.samples=9999", *arguments)
        assert result.exit_code == 2, result.output
        assert "optimizer.momentum: 0.5" in result.stderr
        assert "the run was trained with 0.9" in result.stderr
        assert "train.samples" not in result.stderr
    assert len(events(tmp_path, "started", "resumed")) == 1


def test_what_is_refused_for_the_old_value_would_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: the settings of a parameter group are the checkpoint's after it was loaded."""
    from orchestrator.runtime import preparation, resume_checks

    trained(tmp_path, stop_in_step=2, sections=LONGER)
    for module in (preparation, resume_checks):
        monkeypatch.setattr(module, "refuse_changes", lambda *_, **__: None)
    made: list[torch.optim.Optimizer] = []

    def adopt(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.05, momentum=0.1))
        return made[0]

    trained(tmp_path, resume=True, optimizer=adopt, sections={"optimizer": {"momentum": 0.1}})
    assert made[0].param_groups[0]["momentum"] == 0.9
