"""``groundswell probe`` on the language model: quick, and its interval holds what a ten times longer look finds."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from scipy import stats as scipy_stats

from launch.cli import main
from orchestrator.runtime.probe import measure
from tests import support
from tests.unit.test_probe import CLOSED_FORM, CPU, Regression

NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"
BRIEF = ("train.samples=1280", "schedule.warmup_samples=256", "evaluation.every_samples=null", "workers.max=1")


def groundswell(place: Path, *words: str) -> str:
    """What a command printed."""
    keys = (part for key in (*BRIEF, f"run.dir={place}") for part in ("--set", key))
    done = CliRunner().invoke(main, [*words, *keys])
    assert done.exit_code == 0, done.output
    return done.output


def interval(said: str) -> tuple[float, float, float, int]:
    """``(noise scale, low, high, samples used)`` as printed."""
    found = re.search(rf"noise scale +{NUMBER} samples +\[{NUMBER}, {NUMBER}\] at 95 %  measured", said)
    used = re.search(r"The first ([\d,]+) samples of the run's stream \(([\d,]+) in the data set\)", said)
    assert found, said
    assert used, said
    scale, low, high = map(float, found.groups())
    return scale, low, high, int(used[1].replace(",", ""))


def test_a_checkpoint_is_probed_within_a_minute_and_the_interval_holds_the_longer_look(tmp_path: Path) -> None:
    groundswell(tmp_path, "run", "char_lm", "--runtime", "local")
    checkpoint = ("--checkpoint", str(tmp_path / "char_lm"))
    began_s = time.monotonic()
    usual = interval(groundswell(tmp_path, "probe", "char_lm", *checkpoint))
    took_s = time.monotonic() - began_s
    assert took_s < 60
    assert usual[3] == 4096
    short = interval(groundswell(tmp_path, "probe", "char_lm", *checkpoint, "--samples", "640"))
    long = interval(groundswell(tmp_path, "probe", "char_lm", *checkpoint, "--samples", "6400"))
    print(f"\nprobe took {took_s:.1f} s; 640 samples {short}, 4096 {usual}, 6400 {long}", end="")
    assert (short[3], long[3]) == (640, 6400)
    assert short[1] <= long[0] <= short[2]
    assert usual[1] <= long[0] <= usual[2]
    assert long[2] - long[1] < 0.5 * (short[2] - short[1])
    _, from_the_start, _, _ = interval(groundswell(tmp_path, "probe", "char_lm", "--samples", "640"))
    assert from_the_start != short[1]  # it is the checkpoint that was measured


def test_over_many_seeds_the_share_of_such_intervals_is_as_the_confidence_says(tmp_path: Path) -> None:
    """Linear regression; the longer look begins with the samples of the short one."""
    seeds, held, true = 100, 0, 0
    for seed in range(seeds):
        config = support.config(tmp_path, run={"name": "run", "dir": str(tmp_path), "seed": seed})
        task = Regression(seed, size=3200)
        short, long = (
            measure(config, task=task, model=task.model(), device=CPU, samples=samples).stats for samples in (320, 3200)
        )
        assert long.noise_scale is not None
        low, high = (0.0 if short.low is None else short.low), (np.inf if short.high is None else short.high)
        held, true = held + (low <= long.noise_scale <= high), true + (low <= CLOSED_FORM <= high)
    for count in (held, true):
        sure = scipy_stats.binomtest(count, seeds).proportion_ci(0.999, "exact")
        assert sure.low <= 0.98
        assert sure.high >= 0.92
    print(f"\nof {seeds} intervals {held} hold the longer look's value, {true} the closed form's", end="")
