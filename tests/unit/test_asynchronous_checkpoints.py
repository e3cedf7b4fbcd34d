"""Regular checkpoints are written while training goes on, hold the state of their own step, and are told once whole.

That a run can be resumed from them is in ``test_bad_checkpoints.py`` and in the tests of the runtimes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import CheckpointError
from orchestrator.runtime import background_save, checkpoints
from orchestrator.runtime.background_save import HostCopy
from orchestrator.runtime.checkpoints import CheckpointStore, verify
from orchestrator.runtime.collective import Solo
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp
from tests.unit.small_runs import BATCH, events, readings_of, saved_steps, trained

PATIENCE_S = 60.0


def steps_of(path: Path, *, every: int, steps: int, **more: Any) -> Iterator[Session]:
    """A run of ``steps`` steps with a regular checkpoint at every so many; handed out after each step."""
    sections: dict[str, Any] = {"train": {"samples": steps * BATCH}, "checkpoint": {"every_samples": every * BATCH}}
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with Session(config(path, **(sections | more)), model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            yield session


def tensors_of(path: Path, step: int) -> dict[str, Tensor]:
    """Weights, averaged weights and the optimizer's tensors of a checkpoint."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    checkpoint = path / "run" / "checkpoints" / f"step-{step:09d}"
    store = CheckpointStore(checkpoint.parent, keep=1, collective=Solo())
    ema = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert verify(checkpoint) is None
    with pytest.MonkeyPatch.context() as patch:  # of all that are there, this one
        patch.setattr(checkpoints, "found", lambda folder: [(step, checkpoint)])
        store.load_latest(model, optimizer, ema)
    state = {f"{i}.{key}": value for i, s in optimizer.state_dict()["state"].items() for key, value in s.items()}
    return {**model.state_dict(), **state, **{f"ema.{name}": value for name, value in ema.items()}}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The tensors of regular checkpoints are not written before it is opened."""
    opened = threading.Event()
    write = background_save.write_alone

    def wait(tree: Any, path: Path) -> None:
        assert opened.wait(PATIENCE_S)
        write(tree, path)

    monkeypatch.setattr(checkpoints, "write_alone", wait)
    return opened


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_state_of_its_step(
    tmp_path: Path, gate: threading.Event
) -> None:
    ema = {"train": {"samples": 10 * BATCH, "ema_half_life_samples": 64}}
    for _ in steps_of(
        tmp_path / "plain",
        every=3,
        steps=10,
        **ema,
        checkpoint={"every_samples": 3 * BATCH, "keep": 9, "asynchronous": False},
    ):
        pass
    for session in steps_of(tmp_path, every=4, steps=10, **ema, checkpoint={"every_samples": 3 * BATCH, "keep": 9}):
        if session.step_number == 5:  # two steps beyond the one that it is of
            assert saved_steps(tmp_path) == []
            assert events(tmp_path, "checkpoint") == []
            gate.set()
    assert saved_steps(tmp_path) == saved_steps(tmp_path / "plain") == [3, 6, 9, 10]
    for step in saved_steps(tmp_path):
        mine, theirs = tensors_of(tmp_path, step), tensors_of(tmp_path / "plain", step)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), step
    told = events(tmp_path, "checkpoint")
    assert [(e["step"], e["samples_seen"], e["reason"]) for e in told] == [
        *((step, step * BATCH, "regular") for step in (3, 6, 9)),
        (10, 10 * BATCH, "the end"),
    ]
    assert told[0]["paused_s"] < told[0]["duration_s"]
    assert readings_of(tmp_path) == readings_of(tmp_path / "plain")


def test_one_that_comes_due_waits_for_the_one_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, slow_s, writing, most = checkpoints.os.fsync, 0.05, 0, 0
    write = background_save.write_alone

    def counted(tree: Any, path: Path) -> None:
        nonlocal writing, most
        writing += 1
        most = max(most, writing)
        write(tree, path)
        writing -= 1

    def slow(handle: int) -> None:
        time.sleep(slow_s)
        sync(handle)

    monkeypatch.setattr(checkpoints, "write_alone", counted)
    monkeypatch.setattr(checkpoints.os, "fsync", slow)
    for _ in steps_of(tmp_path, every=1, steps=5):
        pass
    assert most == 1
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [1, 2, 3, 4, 5]  # none is left out
    # Five files and folders are made sure of; each checkpoint but the first found one under way.
    assert [e["duration_s"] > 4 * slow_s for e in events(tmp_path, "checkpoint")] == [True] * 5


def test_steps_do_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, slow_s = checkpoints.os.fsync, 0.4

    def slow(handle: int) -> None:
        if threading.current_thread() is not threading.main_thread():  # the end's own checkpoint is quick
            time.sleep(slow_s)
        sync(handle)

    monkeypatch.setattr(checkpoints.os, "fsync", slow)
    ends_s = [
        time.perf_counter() for _ in steps_of(tmp_path, every=2, steps=5, checkpoint={"every_samples": 3 * BATCH})
    ]
    (regular, _) = events(tmp_path, "checkpoint")
    assert regular["duration_s"] > 4 * slow_s
    assert ends_s[3] - ends_s[2] < slow_s  # it began between these two


def test_it_is_taken_in_at_a_boundary_soon_after_it_was_written(tmp_path: Path, gate: threading.Event) -> None:
    gate.set()
    seen: list[int] = []
    for session in steps_of(tmp_path, every=3, steps=500, checkpoint={"every_samples": 300 * BATCH}):
        if session.step_number > 300:
            time.sleep(0.01)
            if events(tmp_path, "checkpoint"):
                seen.append(session.step_number)
                session.request_stop("seen")
    assert seen
    assert seen[0] < 500  # not only at the end


def test_a_write_that_fails_is_said_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = background_save.write_alone

    def fails_once(tree: Any, path: Path) -> None:
        if path.name == ".step-000000004.partial":
            raise OSError(28, "No space left on device")
        write(tree, path)

    monkeypatch.setattr(checkpoints, "write_alone", fails_once)
    for _ in steps_of(tmp_path, every=2, steps=7):
        pass
    (failed,) = events(tmp_path, "checkpoint_failed")
    assert (failed["step"], failed["samples_seen"]) == (4, 4 * BATCH)
    assert "No space left on device" in failed["reason"]
    assert "older checkpoints are untouched" in failed["reason"]
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [2, 6, 7]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob(".*")] == []


def test_a_copy_that_host_memory_does_not_suffice_for_is_a_checkpoint_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(self: HostCopy, tree: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(HostCopy, "of", no_memory)
    for _ in steps_of(tmp_path, every=2, steps=3):
        pass
    (failed,) = events(tmp_path, "checkpoint_failed")
    assert "can't allocate memory" in failed["reason"]
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [3]  # the last one needs no copy


def failing(path: Path, gate: threading.Event) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = config(path, checkpoint={"every_samples": 2 * BATCH})
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            if session.step_number == 3:
                threading.Timer(0.2, gate.set).start()
                raise ZeroDivisionError("a bug of the user's")


def test_what_is_under_way_when_training_fails_is_committed_and_told(tmp_path: Path, gate: threading.Event) -> None:
    with pytest.raises(ZeroDivisionError):
        failing(tmp_path, gate)
    assert [e["kind"] for e in events(tmp_path)][-2:] == ["fault", "checkpoint"]
    assert saved_steps(tmp_path) == [2]
    trained(tmp_path, resume=True)
    assert [e["step"] for e in events(tmp_path, "resumed")] == [2]


def test_a_stop_waits_for_the_one_under_way_and_saves_its_own(tmp_path: Path, gate: threading.Event) -> None:
    for session in steps_of(tmp_path, every=2, steps=9):
        if session.step_number == 3:
            threading.Timer(0.2, gate.set).start()
            session.request_stop("enough")
    assert [(e["kind"], e["step"]) for e in events(tmp_path, "checkpoint", "stopped")] == [
        ("checkpoint", 2),
        ("checkpoint", 4),
        ("stopped", 4),
    ]


# The store


def pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mlp()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_the_store_has_one_under_way_and_says_when_it_is_written(tmp_path: Path, gate: threading.Event) -> None:
    store = CheckpointStore(tmp_path, keep=2, collective=Solo())
    assert (store.under_way, store.is_written) == (None, False)
    store.begin_save(*pair(), step=4, meta={})
    assert (store.under_way, store.is_written) == (4, False)
    with pytest.raises(AssertionError, match="finish_save"):
        store.begin_save(*pair(), step=5, meta={})
    with pytest.raises(AssertionError, match="finish_save"):
        store.save(*pair(), step=5, meta={})
    gate.set()
    path, took_s = store.finish_save()
    assert (path, store.under_way, store.is_written) == (tmp_path / "step-000000004", None, False)
    assert took_s > 0
    assert verify(path) is None


def test_a_place_that_cannot_be_written_is_a_checkpoint_error_when_it_is_finished(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = CheckpointStore(tmp_path / "file", keep=2, collective=Solo())
    store.begin_save(*pair(), step=4, meta={})
    with pytest.raises(CheckpointError, match=r"checkpoint of step 4 was not written.*training can go on"):
        store.finish_save()
    assert store.under_way is None


TREES: list[Callable[[], Any]] = [
    lambda: torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    lambda: {"a": torch.tensor(3), "b": [torch.ones(2, dtype=torch.bfloat16), 1.5, None], "c": ("x", True)},
    lambda: nn.Parameter(torch.ones(3)),
    lambda: {"betas": (0.9, 0.99), "params": ["0.weight"], "nested": {"deep": {"deeper": torch.zeros(0)}}},
]


def equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor):
        return isinstance(theirs, Tensor) and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(equal(mine[k], theirs[k]) for k in mine)
    if isinstance(mine, (list, tuple)):
        return type(mine) is type(theirs) and all(map(equal, mine, theirs))
    return bool(mine == theirs)


@pytest.mark.parametrize("make", TREES)
def test_a_host_copy_is_equal_and_stays_as_it_was_until_the_next(make: Callable[[], Any]) -> None:
    host, tree = HostCopy(), make()
    copied = host.of(tree)
    assert equal(copied, tree)
    expected = make()
    for tensor in tensors_in(tree):
        tensor.data.add_(1)
    assert equal(copied, expected)
    first = [tensor.data_ptr() for tensor in tensors_in(copied)]
    again = host.of(tree)
    assert equal(again, tree)
    assert [tensor.data_ptr() for tensor in tensors_in(again)] == first  # the memory is used again


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for value in inner for tensor in tensors_in(value)]


def test_memory_of_another_shape_is_taken_anew() -> None:
    host = HostCopy()
    host.of({"a": torch.ones(2)})
    assert torch.equal(host.of({"a": torch.ones(3)})["a"], torch.ones(3))
    assert host.of({"a": torch.ones(3, dtype=torch.int8)})["a"].dtype == torch.int8
