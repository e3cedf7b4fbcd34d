"""``groundswell checkpoints``: what is listed is there, what is torn is named, what is exported is what was saved."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor, nn

from launch.cli import main
from orchestrator.runtime.checkpoints import CheckpointStore, load_weights
from orchestrator.runtime.collective import Solo
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy

STEPS = (4, 8, 10)


class Tied(nn.Module):
    """Two names for one weight, a buffer, a scalar, and three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(20, 20)
        self.norm = nn.BatchNorm1d(20)
        self.second = nn.Linear(20, 20)
        self.second.weight = self.first.weight
        self.last = nn.Linear(20, 4, dtype=torch.bfloat16)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.norm(self.first(inputs))))
        out: Tensor = self.last(hidden.bfloat16()).float()
        return out


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["checkpoints", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A run's folder, its weights at its end, and the averaged ones as the model has them."""
    place = tmp_path_factory.mktemp("trained")
    settings = config(
        place,
        train={"samples": 320, "ema_half_life_samples": 64},
        checkpoint={"every_samples": 128, "keep": 3},
    )
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
        with session.ema_weights():
            averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return place / "run", {name: tensor.clone() for name, tensor in model.state_dict().items()}, averaged


@pytest.fixture
def run(trained: tuple[Path, Any, Any], tmp_path: Path) -> Path:
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def tear(run: Path, step: int, name: str = "*.distcp") -> None:
    (file,) = (run / "checkpoints" / f"step-{step:09d}").glob(name)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# ls and verify


def test_ls_names_each_checkpoint_with_what_it_is_of(run: Path) -> None:
    result = call("ls", run)
    assert result.exit_code == 0, result.output
    heading, *rows = result.output.splitlines()
    assert heading.split() == ["step", "samples", "written", "size", "workers", "state"]
    assert [row.split()[0] for row in rows] == ["10", "8", "4"]
    assert [row.split()[1] for row in rows] == ["320", "256", "128"]
    assert all(row.split()[-2:] == ["1", "whole"] for row in rows)
    assert all("KiB" in row for row in rows)


def test_ls_for_programs(run: Path) -> None:
    tear(run, 8)
    rows = [json.loads(line) for line in call("ls", run, "--json", "--verify").output.splitlines()]
    assert [(row["step"], row["samples_seen"], row["world_size"], row["state"]) for row in rows] == [
        (10, 320, 1, "good"),
        (8, 256, 1, "torn"),
        (4, 128, 1, "good"),
    ]
    assert "checksum" in rows[1]["why"]
    newest = run / "checkpoints" / "step-000000010"
    assert rows[0]["path"] == str(newest)
    files = [file.stat().st_size for file in newest.iterdir() if file.name != "manifest.json"]
    assert rows[0]["bytes"] == sum(files)


def test_ls_says_without_reading_every_byte_what_is_torn_by_its_size(run: Path) -> None:
    (file,) = (run / "checkpoints" / "step-000000010").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    (run / "checkpoints" / "step-000000008" / "meta.json").unlink()
    (run / "checkpoints" / "step-000000004" / "manifest.json").write_text("{")
    for line, why in zip(call("ls", run).output.splitlines()[1:], ("bytes", "FileNotFound", "JSON"), strict=True):
        assert "torn: " in line
        assert why in line


def test_verify_names_what_is_torn_and_exits_with_1(run: Path) -> None:
    good = call("verify", run)
    assert good.exit_code == 0
    assert good.output == "".join(f"step-{step:09d}: good\n" for step in sorted(STEPS, reverse=True))
    tear(run, 8)
    tear(run, 10, "manifest.json")
    bad = call("verify", run)
    assert bad.exit_code == 1
    first, second, third = bad.output.splitlines()
    assert first.startswith("step-000000010: torn: ")
    assert second.startswith("step-000000008: torn: __0_0.distcp has changed")
    assert third == "step-000000004: good"
    assert call("verify", run / "checkpoints" / "step-000000004").exit_code == 0


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["export", "--to", "x.pt"]], ids=lambda c: str(c[0]))
def test_a_folder_without_checkpoints_is_refused(tmp_path: Path, command: list[str]) -> None:
    result = call(*command, tmp_path / "nothing")
    assert result.exit_code == 2
    assert "holds no checkpoint: name a run's folder" in result.stderr


# export


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_exported_weights_are_the_models_bit_for_bit(
    trained: tuple[Path, dict[str, Tensor], dict[str, Tensor]], tmp_path: Path, suffix: str
) -> None:
    run, weights, averaged = trained
    for options, expected in (([], weights), (["--ema"], averaged)):
        file = tmp_path / f"weights.{suffix}"
        result = call("export", run, "--to", file, *options)
        assert result.exit_code == 0, result.output
        assert result.output == f"{file}: {len(expected)} tensors of {run / 'checkpoints' / 'step-000000010'}\n"
        found = load_file(file) if suffix == "safetensors" else torch.load(file, weights_only=True)
        assert_same(found, expected)
        Tied().load_state_dict(found)
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert any(not torch.equal(weights[name], averaged[name]) for name in weights)
    assert torch.equal(averaged["first.weight"], averaged["second.weight"])


def test_of_a_step_that_is_named(run: Path, tmp_path: Path) -> None:
    assert call("export", run, "--step", 4, "--to", tmp_path / "four.pt").exit_code == 0
    model = Tied()
    load_weights(run / "checkpoints" / "step-000000004", model)
    assert_same(torch.load(tmp_path / "four.pt", weights_only=True), dict(model.state_dict()))
    result = call("export", run, "--step", 5, "--to", tmp_path / "five.pt")
    assert result.exit_code == 2
    assert "no checkpoint of step 5: there are those of step 10, 8, 4" in result.stderr


def test_a_torn_one_is_passed_over_or_refused_where_it_was_named(run: Path, tmp_path: Path) -> None:
    tear(run, 10)
    result = call("export", run, "--to", tmp_path / "newest.pt")
    assert result.exit_code == 0
    assert "passed over" in result.stderr
    assert "step-000000008" in result.stdout
    refused = call("export", run, "--step", 10, "--to", tmp_path / "ten.pt")
    assert refused.exit_code == 2
    assert "is whole" in refused.stderr
    assert not (tmp_path / "ten.pt").exists()


def saved(place: Path, model: nn.Module) -> Path:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    place.mkdir(exist_ok=True)  # a store makes no folder that is gone
    store = CheckpointStore(place / "checkpoints", keep=1, collective=Solo())
    store.save(model, optimizer, step=1, meta={})
    return place


class WithExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def test_what_is_no_tensor_goes_into_a_pt_file_alone(tmp_path: Path) -> None:
    run = saved(tmp_path, WithExtra(2, 2))
    assert call("export", run, "--to", tmp_path / "x.pt").exit_code == 0
    model = WithExtra(2, 2)
    model.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    assert model.calls == 3
    result = call("export", run, "--to", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert "_extra_state, which is no tensor" in result.stderr
    assert not (tmp_path / "x.safetensors").exists()


def test_what_cannot_be_written_or_is_not_there_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("pt", "safetensors"):
        result = call("export", run, "--to", tmp_path / "no" / f"x.{suffix}")
        assert result.exit_code == 2, result.output
        assert "choose another place with --to" in result.stderr
    result = call("export", saved(tmp_path / "plain", nn.Linear(2, 2)), "--ema", "--to", tmp_path / "x.pt")
    assert result.exit_code == 2
    assert "holds no averaged weights" in result.stderr
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    result = call("export", run, "--to", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert "pip install 'groundswell[safetensors]'" in result.stderr
