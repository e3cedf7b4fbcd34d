"""``groundswell plot``: where the picture goes, and how it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launch.plot_command import plot_command

CONFIG = """
task: {name: digits}
train: {samples: 64}
batch: {initial: 32, micro_batch: 16}
optimizer: {name: sgd, lr: 0.05}
controller: {policy: fixed}
"""
ROW = {
    "attempt": 1, "world_size": 1, "global_batch": 32, "lr": 0.05, "loss": 2.0, "noise_scale": None, "noise_low": None,
    "noise_high": None, "verdict": "too noisy",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    rows = [ROW | {"step": i, "samples_seen": 32 * (i + 1)} for i in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(plot_command, [str(argument) for argument in arguments])


def test_the_picture_is_put_into_the_run_and_its_path_printed(run: Path) -> None:
    result = call(run)
    assert (result.exit_code, result.output) == (0, f"{run / 'picture.svg'}\n")
    assert "<svg" in (run / "picture.svg").read_text()


def test_the_suffix_decides_the_format(run: Path, tmp_path: Path) -> None:
    assert call(run, "-o", tmp_path / "a.PNG").exit_code == 0
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    refused = call(run, "-o", tmp_path / "a.pdf")
    assert refused.exit_code == 2
    assert "must end in .svg or .png" in refused.output


def test_what_cannot_be_drawn_or_written_is_one_sentence(run: Path, tmp_path: Path) -> None:
    for result, said in (
        (call(tmp_path / "absent"), "holds no run"),
        (call(run, "-o", tmp_path / "absent" / "a.svg"), "cannot write the picture"),
    ):
        assert result.exit_code == 2
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1
    (run / "metrics.jsonl").unlink()
    result = call(run)
    assert result.exit_code == 2
    assert "has not finished a step yet" in result.stderr


def test_without_matplotlib_the_command_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call(run)
    assert result.exit_code == 2
    assert "pip install 'groundswell[plots]'" in result.stderr
    assert not (run / "picture.svg").exists()
