"""The checkpoint store: written whole or not at all, proved whole before use, and as many kept as were asked for.

What a run does with broken checkpoints is in ``test_bad_checkpoints.py``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import CheckpointError
from orchestrator.optim import LAMB, LANS, LARS, VRSGD, PartsOptimizer, VRAdam
from orchestrator.runtime import checkpoints
from orchestrator.runtime.checkpoints import CheckpointStore, verify
from orchestrator.runtime.collective import Solo
from tests.support import mlp

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "lars": lambda p: LARS(p, lr=0.1),
    "lamb": lambda p: LAMB(p, lr=0.01),
    "lans": lambda p: LANS(p, lr=0.01),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "momentum decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "dampened decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "adam decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "lars decay": lambda p: LARS(p, lr=0.1, weight_decay=0.1),
    "vr_sgd decay": lambda p: VRSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "vr_adam decay": lambda p: VRAdam(p, lr=0.01, weight_decay=0.1),
}


def store(path: Path, *, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(path, keep=keep, collective=Solo())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        model(torch.randn(8, 20, generator=generator)).square().mean().backward()
        if isinstance(optimizer, PartsOptimizer):  # the batch is one part
            gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
            optimizer.take_parts({p: optimizer.of_part(gradient) for p, gradient in gradients.items()})
        optimizer.step()
        optimizer.zero_grad()


def pair(make: Make = OPTIMIZERS["momentum"], *, seed: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 4), nn.BatchNorm1d(4), *mlp(4, seed=seed))
    return model, make(model.parameters())


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found: dict[str, Any] = dict(model.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{key}": value for key, value in state.items()}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def assert_same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key], key


def steps(path: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in path.glob("step-*"))


def cut(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_what_is_loaded_is_what_was_saved_and_trains_on_as_if_nothing_had_been(tmp_path: Path, make: Make) -> None:
    model, optimizer = pair(make)
    train(model, optimizer)
    saved = everything(model, optimizer)
    path = store(tmp_path).save(
        model, optimizer, step=3, meta={"step": 3, "text": "ünï", "none": None, "deep": [{"a": 1.5}]}
    )
    assert_same(everything(model, optimizer), saved)  # saving changes nothing
    train(model, optimizer, seed=1)

    other, other_optimizer = pair(make, seed=9)
    chosen, meta, faults = store(tmp_path).load_latest(other, other_optimizer)
    assert (chosen, faults) == (path, ())
    assert meta == {"step": 3, "text": "ünï", "none": None, "deep": [{"a": 1.5}]}
    assert_same(everything(other, other_optimizer), saved)
    train(other, other_optimizer, seed=1)
    assert_same(everything(other, other_optimizer), everything(model, optimizer))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_what_is_saved_before_the_first_step_trains_on_as_if_nothing_had_been(tmp_path: Path, make: Make) -> None:
    model, optimizer = pair(make)
    train(model, optimizer)

    fresh, fresh_optimizer = pair(make)
    store(tmp_path).save(fresh, fresh_optimizer, step=0, meta={})
    assert not fresh_optimizer.state
    other, other_optimizer = pair(make, seed=9)
    store(tmp_path).load_latest(other, other_optimizer)
    assert not other_optimizer.state
    for trained, trained_optimizer in ((fresh, fresh_optimizer), (other, other_optimizer)):
        train(trained, trained_optimizer)
        assert_same(everything(trained, trained_optimizer), everything(model, optimizer))


def test_a_folder_without_checkpoints_loads_nothing_and_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = pair()
    before = everything(model, optimizer)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        assert store(path).load_latest(model, optimizer) == (None, {}, ())
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize(("wrote", "loads"), [("sgd", "momentum"), ("adam", "momentum"), ("momentum", "lars")])
def test_another_optimizers_checkpoint_is_refused_though_parameters_may_be_without_a_state(
    tmp_path: Path, wrote: str, loads: str
) -> None:
    model, optimizer = pair(OPTIMIZERS[wrote])
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)  # in no step so far
    train(model, optimizer)
    store(tmp_path).save(model, optimizer, step=3, meta={})
    with pytest.raises(CheckpointError, match=r"does not fit this model and optimizer.*Missing key.*optimizer\."):
        store(tmp_path).load_latest(*pair(OPTIMIZERS[loads]))


def test_another_optimizers_checkpoint_from_before_its_first_step_is_refused_too(tmp_path: Path) -> None:
    store(tmp_path).save(*pair(OPTIMIZERS["adam"]), step=0, meta={})
    with pytest.raises(CheckpointError, match=r"does not fit this model and optimizer.*Missing key.*param_groups"):
        store(tmp_path).load_latest(*pair(OPTIMIZERS["momentum"]))


# Kept


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    model, optimizer = pair()
    for step in (1, 2, 30, 31):
        store(tmp_path, keep=keep).save(model, optimizer, step=step, meta={})
    assert steps(tmp_path) == [1, 2, 30, 31][-keep:]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_broken_one_of_a_later_step_does_not_take_the_place_of_a_good_one(tmp_path: Path, keep: int) -> None:
    model, optimizer = pair()
    for step in (10, 20):
        store(tmp_path, keep=2).save(model, optimizer, step=step, meta={"step": step})
    cut(tmp_path / "step-000000020")
    again = store(tmp_path, keep=keep)
    chosen, _, faults = again.load_latest(model, optimizer)
    assert chosen is not None
    assert (chosen.name, len(faults)) == ("step-000000010", 1)
    path = again.save(model, optimizer, step=15, meta={"step": 15})
    assert verify(path) is None
    assert steps(tmp_path) == [10, 15][-keep:]
    assert again.load_latest(model, optimizer)[0] == path


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    model, optimizer = pair()
    store(tmp_path).save(model, optimizer, step=4, meta={"attempt": 1})
    train(model, optimizer)
    path = store(tmp_path).save(model, optimizer, step=4, meta={"attempt": 2})
    saved = everything(model, optimizer)
    other, other_optimizer = pair(seed=9)
    chosen, meta, _ = store(tmp_path).load_latest(other, other_optimizer)
    assert (chosen, meta) == (path, {"attempt": 2})
    assert_same(everything(other, other_optimizer), saved)


def test_what_an_interrupted_save_left_is_not_used_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    model, optimizer = pair()
    path = store(tmp_path).save(model, optimizer, step=4, meta={})
    for step in (5, 6):
        shutil.copytree(path, tmp_path / f".step-{step:09d}.partial")
    assert store(tmp_path).load_latest(model, optimizer)[0] == path
    store(tmp_path).save(model, optimizer, step=6, meta={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000004", "step-000000006"]


# Whole or not at all


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_save_that_fails_at_the_end_leaves_the_older_ones_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    model, optimizer = pair()
    older = store(tmp_path).save(model, optimizer, step=4, meta={})

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    # The store's own last steps, made to fail; the writes before them are real.
    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(checkpoints.os, "fsync", no_space)
        else:
            patch.setattr(Path, "rename", no_space)
        with pytest.raises(
            CheckpointError, match=r"step 5 was not written.*No space left.*older checkpoints are untouched"
        ):
            store(tmp_path).save(model, optimizer, step=5, meta={})
    assert [p.name for p in tmp_path.iterdir()] == [older.name]
    assert verify(older) is None
    assert verify(store(tmp_path).save(model, optimizer, step=5, meta={})) is None


def test_metadata_that_is_not_plain_data_is_an_error_and_leaves_the_older_ones(tmp_path: Path) -> None:
    model, optimizer = pair()
    older = store(tmp_path).save(model, optimizer, step=4, meta={})
    with pytest.raises((CheckpointError, TypeError)):
        store(tmp_path).save(model, optimizer, step=5, meta={"odd": object()})
    assert store(tmp_path).load_latest(model, optimizer)[0] == older


def test_a_place_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    model, optimizer = pair()
    with pytest.raises(CheckpointError, match="was not written"):
        store(tmp_path / "file").save(model, optimizer, step=5, meta={})


# Proof


def test_every_file_of_a_checkpoint_is_watched(tmp_path: Path) -> None:
    model, optimizer = pair()
    path = store(tmp_path).save(model, optimizer, step=4, meta={"step": 4})
    assert verify(path) is None
    files = [p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert len(files) >= 3  # tensors, their index, the metadata
    for file in files:
        data = file.read_bytes()
        for changed in (data[:-1], data + b"x", bytes([data[0] ^ 1]) + data[1:], data[:-1] + bytes([data[-1] ^ 128])):
            file.write_bytes(changed)
            assert file.name in str(verify(path))
        file.unlink()
        assert "FileNotFoundError" in str(verify(path))
        file.write_bytes(data)
        assert verify(path) is None


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", "3", '{"meta.json": 1}', '{"meta.json": [1, 2, 3]}'])
def test_a_manifest_that_proves_nothing_is_a_fault_and_not_a_crash(tmp_path: Path, text: str) -> None:
    model, optimizer = pair()
    good = store(tmp_path).save(model, optimizer, step=3, meta={})
    bad = store(tmp_path).save(model, optimizer, step=4, meta={})
    (bad / "manifest.json").write_text(text)
    assert verify(bad) is not None
    chosen, _, (fault,) = store(tmp_path).load_latest(model, optimizer)
    assert (chosen, fault.path) == (good, str(bad))


def test_a_manifest_that_misses_the_index_or_the_metadata_proves_nothing(tmp_path: Path) -> None:
    model, optimizer = pair()
    path = store(tmp_path).save(model, optimizer, step=4, meta={})
    manifest = json.loads((path / "manifest.json").read_text())
    for name in (".metadata", "meta.json"):
        (path / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != name}))
        (path / name).rename(tmp_path / "kept")
        assert verify(path) is not None, name
        (tmp_path / "kept").rename(path / name)


def test_names_that_only_look_like_checkpoints_are_left_alone(tmp_path: Path) -> None:
    model, optimizer = pair()
    for name in ("step-best", "step-1", "step-0000000009", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000003.txt").write_text("mine")
    store(tmp_path, keep=1).save(model, optimizer, step=1, meta={})
    path = store(tmp_path, keep=1).save(model, optimizer, step=2, meta={})
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["step-best", "step-1", "step-0000000009", "notes", "step-000000003.txt", path.name]
    )
    assert store(tmp_path).load_latest(model, optimizer)[0] == path
