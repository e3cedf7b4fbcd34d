"""``groundswell probe`` as its user meets it: what is printed, and how it ends."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launch.cli import main
from orchestrator.config import load_config, to_yaml
from orchestrator.runtime.probe import measure, probe
from orchestrator.types import Verdict
from tests import support

TASK = "tests.launch.small_task:make"


def call(place: Path, *arguments: str, **sections: Any) -> Result:
    config = {"task": {"name": TASK, "options": {"size": 640}}, "batch": {"initial": 8, "micro_batch": 4, "max": 64}}
    file = place / "given.yaml"
    file.write_text(to_yaml(support.config(place, **(config | sections))))
    return CliRunner().invoke(main, ["probe", str(file), *arguments])


def test_it_prints_what_was_measured_and_what_follows(tmp_path: Path) -> None:
    done = call(tmp_path)
    assert done.exit_code == 0, done.output
    found = probe(load_config(tmp_path / "given.yaml"))
    stats, decision = found.stats, found.advice.decisions["noise_scale"]
    assert stats.verdict is Verdict.MEASURED
    assert f"{stats.noise_scale:.4g} samples  [{stats.low:.4g}, {stats.high:.4g}] at 95 %  measured" in done.output
    assert re.search(rf"noise_scale +{decision.target_batch} +{re.escape(decision.reason[:20])}", done.output)
    assert re.search(rf"linear +{decision.target_batch / 8:.3g}\b", done.output)
    assert "The first 640 samples of the run's stream (640 in the data set), in 20 groups of 8" in done.output
    assert "tradeoff: controller.exchange_rate is missing" in done.output
    assert "\x1b" not in done.output
    assert list(tmp_path.iterdir()) == [tmp_path / "given.yaml"]  # no run was begun


def test_it_says_that_it_knows_no_calibration(tmp_path: Path) -> None:
    digits = {"task": {"name": "digits", "options": {"width": 8}}, "train": {"samples": 10_000}}
    for estimator in ("per_example", "norm_layers"):
        done = call(tmp_path, "--samples", "320", **digits, measure={"estimator": estimator})
        assert done.exit_code == 0, done.output
        assert ("Measured per_example" in done.output) is (estimator == "norm_layers")


def test_a_policy_whose_setting_is_given_answers_too(tmp_path: Path) -> None:
    sets = ("controller.policy=norm_test", "controller.theta=0.5", "lr_rule.name=surge", "lr_rule.peak_batch=32")
    done = call(tmp_path, *(word for key in sets for word in ("--set", key)))
    assert done.exit_code == 0, done.output
    assert re.search(r"  norm_test +\d+ ", done.output)
    assert re.search(r"  surge +[\d.]+ +[\d.]+", done.output)


def test_too_noisy_is_said_and_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*arguments: Any, **named: Any) -> Any:
        found = measure(*arguments, **named)
        return replace(found, stats=replace(found.stats, verdict=Verdict.TOO_NOISY, high=None))

    monkeypatch.setattr("orchestrator.runtime.probe.measure", noisy)
    done = call(tmp_path, "--samples", "320")
    assert done.exit_code == 0, done.output
    assert "Too noisy: 320 samples cannot tell the noise scale; it is above" in done.output
    assert "cannot be said from an interval without two ends; try --samples 640" in done.output
    assert "would choose" not in done.output


@pytest.mark.parametrize(("estimator", "helps"), [("micro_batch", True), ("per_example", False)])
@pytest.mark.parametrize("noisy", [False, True])
def test_smaller_micro_batches_are_advised_where_it_is_they_that_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, helps: bool, noisy: bool
) -> None:
    def measured(*arguments: Any, **named: Any) -> Any:
        found = measure(*arguments, **named)
        return replace(found, stats=replace(found.stats, verdict=Verdict.TOO_NOISY, high=None)) if noisy else found

    monkeypatch.setattr("orchestrator.runtime.probe.measure", measured)
    done = call(tmp_path, "--samples", "640", measure={"estimator": estimator})
    assert done.exit_code == 0, done.output
    assert ("all of the data set was used" if noisy else "The data set gives no more") in done.output
    advice = "give --set batch.micro_batch a smaller number" if noisy else "smaller micro-batches would measure better"
    assert (advice in done.output) == helps


def test_too_few_samples_and_a_missing_checkpoint_are_refused(tmp_path: Path) -> None:
    done = call(tmp_path, "--samples", "100")
    assert done.exit_code == 2
    assert "write --samples 160 or more" in done.output
    done = call(tmp_path, "--checkpoint", str(tmp_path / "nowhere"))
    assert done.exit_code == 2
    assert "holds no checkpoint" in done.output


def test_help_names_the_options() -> None:
    done = CliRunner().invoke(main, ["probe", "--help"])
    assert done.exit_code == 0
    for word in ("--checkpoint DIR", "--samples N", "--set SECTION.KEY=VALUE", "without training it", "too noisy"):
        assert word in done.output


def test_layers_are_shown_below_the_whole_unless_switched_off(tmp_path: Path) -> None:
    done = call(tmp_path)
    found = probe(load_config(tmp_path / "given.yaml"))
    assert found.layers
    for name, stats in found.layers.items():
        assert re.search(
            rf"^  {re.escape(name)} +{stats.noise_scale:.4g} samples .*{stats.verdict.value}", done.output, re.M
        )
    without = call(tmp_path, "--groups", "none")
    assert without.exit_code == 0
    assert "By layer" in done.output
    assert "By layer" not in without.output
    assert [line for line in without.output.splitlines() if line not in done.output] == []
