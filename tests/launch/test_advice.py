"""A run with ``controller.mode: advise`` ends with the batch schedule it would have chosen, ready to be used."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.outcome import EXIT_STOPPED
from launch.run_command import run
from orchestrator.config import RunConfig
from orchestrator.core.advising import Advice
from orchestrator.measure.estimators import find_estimator
from orchestrator.runtime import folder
from orchestrator.runtime.closing_advice import as_config, closing_advice
from orchestrator.runtime.rules import rules_from
from tests import support
from tests.unit.planted import rules

DIGITS = {"name": "digits", "options": {"width": 8, "augment": False}}


def config(place: Path, name: str, **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "task": DIGITS,
        "run": {"name": name},
        "batch": {"initial": 16, "micro_batch": 4, "max": 512},
        "train": {"samples": SAMPLES},
    }
    return support.config(place, **(base | sections))


def start(settings: RunConfig, *, resume: bool = False) -> int:
    return run(settings, runtime="local", resume=resume, address="local", command="groundswell run mine")


def of_kind(place: Path, name: str, kind: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(place / name / folder.EVENTS) if row["kind"] == kind]


SAMPLES = 4096
ADVISING = support.EAGER | {"mode": "advise", "cooldown_samples": 512, "every_samples": 256, "lag_steps": 9}


def test_its_schedule_pasted_as_a_ramp_takes_the_steps_and_samples_it_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(config(tmp_path, "advised", controller=ADVISING)) == 0
    said = capfd.readouterr().out
    (advice,) = of_kind(tmp_path, "advised", "advice")
    rows = folder.surviving(tmp_path / "advised" / folder.METRICS)
    assert {row["global_batch"] for row in rows} == {16}
    assert (advice["fixed_steps"], advice["fixed_samples"]) == (len(rows), SAMPLES)
    assert len(advice["schedule"]) >= 2
    assert advice["steps_saved"] == len(rows) - advice["steps"] > len(rows) / 3
    assert advice["samples_saved"] == SAMPLES - advice["samples"] < 0
    # The first change is the first wish that was written down while the run went on.
    wishes = [row for row in of_kind(tmp_path, "advised", "decision") if "wished_batch" in row]
    assert advice["schedule"][0] == [wishes[0]["samples_seen"], wishes[0]["wished_batch"]]
    assert f"Advice:    {advice['reason']}." in said
    sections = yaml.safe_load(said.split("As a config: ")[1].splitlines()[0])
    assert sections["controller"]["ramp"] == advice["schedule"]
    assert "shrink" not in sections["controller"]
    assert [row["kind"] for row in folder.rows(tmp_path / "advised" / folder.EVENTS)][-1] == "finished"

    done = config(tmp_path, "pasted", **sections)
    assert (done.controller.half_life_samples, done.controller.confidence) == (1024, 0.5)
    assert start(done) == 0
    taken = folder.surviving(tmp_path / "pasted" / folder.METRICS)
    assert len(taken) == pytest.approx(advice["steps"], abs=1)
    decided = [row for row in of_kind(tmp_path, "pasted", "decision") if "effective_step" in row]
    assert [[row["samples_seen"], row["target_batch"]] for row in decided] == advice["schedule"]
    # A run whose batch did move is no ground for advice.
    size = of_kind(tmp_path, "pasted", "started")[0]["dataset_size"]
    reason, evidence = closing_advice(
        tmp_path / "pasted", rules_from(done, dataset_size=size), find_estimator(done.measure.estimator)
    )
    assert reason.startswith("no advice: it is founded on one batch throughout, and this run had 16, ")
    assert not evidence


@pytest.mark.parametrize(
    "schedule",
    [{"name": "linear"}, {"name": "one_cycle", "warmup_samples": 700, "final_fraction": 0.1}],
    ids=lambda schedule: schedule["name"],
)
def test_a_planned_decay_advises_what_it_does_when_it_acts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], schedule: dict[str, Any]
) -> None:
    planned = {"policy": "decay_to_growth", "every_samples": 256, "deadband": 1.2, "mode": "advise"}
    whole: dict[str, Any] = {"train": {"samples": 2048}, "schedule": schedule}
    assert start(config(tmp_path, "advised", controller=planned, **whole)) == 0
    said = capfd.readouterr().out
    (advice,) = of_kind(tmp_path, "advised", "advice")
    wishes = [row for row in of_kind(tmp_path, "advised", "decision") if "wished_batch" in row]
    assert advice["schedule"][0] == [wishes[0]["samples_seen"], wishes[0]["wished_batch"]]
    sections = yaml.safe_load(said.split("As a config: ")[1].splitlines()[0])
    assert start(config(tmp_path, "acted", **whole, controller=planned | sections["controller"])) == 0
    decided = [row for row in of_kind(tmp_path, "acted", "decision") if "effective_step" in row]
    assert [[row["samples_seen"], row["target_batch"]] for row in decided] == advice["schedule"]
    assert len(decided) >= 2
    taken = folder.surviving(tmp_path / "acted" / folder.METRICS)
    assert (len(taken), taken[-1]["samples_seen"]) == (advice["steps"], advice["samples"])
    assert advice["samples_saved"] == 0


def test_a_schedule_that_falls_is_printed_with_what_lets_it(tmp_path: Path) -> None:
    found = Advice(
        schedule=((512, 8), (1024, 64)), steps=9, samples=2000, fixed_steps=10, fixed_samples=160, unmeasured_samples=0
    )
    config = as_config(found, rules(base_batch=16))
    assert config is not None
    assert config["controller"]["shrink"] is True


def touch_when_long(lines: Path, count: int, stop: Path) -> None:
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s and not (lines.exists() and lines.read_text().count("\n") >= count):
        time.sleep(0.02)
    stop.touch()


def test_after_a_resume_it_speaks_of_the_whole_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, parted = (config(tmp_path, name, controller=ADVISING) for name in ("whole", "resumed"))
    assert start(whole) == 0
    capfd.readouterr()
    metrics, stop = (tmp_path / "resumed" / name for name in (folder.METRICS, folder.STOP_REQUEST))
    stopping = threading.Thread(target=touch_when_long, args=(metrics, 60, stop))
    stopping.start()
    assert start(parted) == EXIT_STOPPED
    stopping.join()
    assert "Advice: " in capfd.readouterr().err
    assert start(parted, resume=True) == 0
    first, last = of_kind(tmp_path, "resumed", "advice")
    (expected,) = of_kind(tmp_path, "whole", "advice")
    assert 60 * 16 <= first["fixed_samples"] < SAMPLES
    ends = [{k: v for k, v in row.items() if k not in ("time", "attempt")} for row in (last, expected)]
    assert json.dumps(ends[0]) == json.dumps(ends[1])
    assert capfd.readouterr().out.count("Advice: ") == 1


@pytest.mark.parametrize(
    ("controller", "said"),
    [
        ({"policy": "fixed", "mode": "advise"}, None),
        (support.EAGER, None),
        (support.EAGER | {"mode": "advise", "half_life_samples": 64, "confidence": 0.999999}, "no advice: the noise"),
    ],
    ids=["fixed", "acting", "never measured"],
)
def test_other_runs_give_no_advice_and_one_that_cannot_tell_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], controller: dict[str, Any], said: str | None
) -> None:
    assert start(config(tmp_path, "run", controller=controller, train={"samples": 512})) == 0
    advice = of_kind(tmp_path, "run", "advice")
    out = capfd.readouterr().out
    if said is None:
        assert not advice
        assert "Advice" not in out
    else:
        assert said in advice[0]["reason"]
        assert said in out
        assert "As a config" not in out
