"""Faults of one rank among several: all recover together, or all end within seconds; nobody is left waiting."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.core.cursor import Stream
from orchestrator.errors import CheckpointError, ConfigError, RunFolderError
from orchestrator.runtime import folder, ledger
from orchestrator.runtime.checkpoints import verify
from orchestrator.runtime.sharding import shard
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp, run_fleet

pytestmark = pytest.mark.dist

PROMPT_S = 20.0  # a rank that waits for a dead one would wait for the process group's half hour
BATCH, MICRO, STEPS = 48, 4, 6


def normalised() -> nn.Module:
    """A model with buffers, which DDP sends to all ranks before each step."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32, momentum=0.01), nn.Tanh(), nn.Linear(32, 4))


class Fault:
    """What goes wrong on one rank, in one step; ``micro`` counts the micro-batches that this rank takes in it."""

    def __init__(self, kind: str, *, rank: int, step: int = 2, micro: int = 0, fits: int = 2) -> None:
        self.kind, self.rank, self.step, self.micro, self.fits = kind, rank, step, micro, fits


def starve(*_: Any) -> None:
    raise torch.OutOfMemoryError("planted: out of memory")


def train(
    rank: int,
    path: str,
    *,
    fault: Fault | None = None,
    make: Callable[[], nn.Module] = mlp,
    resume: bool = False,
    dataset: Any = None,
    **sections: Any,
) -> Session:
    base: dict[str, Any] = {
        "train": {"samples": STEPS * BATCH},
        "batch": {"initial": BATCH, "micro_batch": MICRO, "max": BATCH},
        "ledger": True,
    }
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = config(path, **(base | sections))
    with Session(
        settings, model=model, optimizer=optimizer, dataset=blobs() if dataset is None else dataset, resume=resume
    ) as session:
        for step in session:
            for number, samples in enumerate(step):
                here = fault is not None and fault.rank == rank and fault.step == session.step_number
                kind = fault.kind if fault is not None and here and number == fault.micro else None

                def loss(samples: Any = samples, kind: str | None = kind) -> Tensor:
                    small = fault is not None and len(samples[0]) <= fault.fits
                    if kind == "before the model" and not small:
                        starve()
                    model_hook = None
                    if kind == "in the model" and not small:
                        model_hook = model[-1].register_forward_pre_hook(starve)  # type: ignore[index]
                    try:
                        value = cross_entropy(session.model, samples)
                    finally:
                        if model_hook is not None:
                            model_hook.remove()
                    if kind == "after the model" and not small:
                        starve()
                    if kind == "in the backward pass" and not small:
                        value.register_hook(starve)
                    if kind == "NaN":
                        value = value * float("nan")
                    if kind == "infinite beside a finite gradient":
                        value = value + float("inf")
                    return value

                session.backward(loss)
            session.step()
    return session


def final_weights(
    rank: int, path: str, fault: Fault | None, make: Callable[[], nn.Module], sections: dict[str, Any]
) -> list[list[float]]:
    session = train(rank, path, fault=fault, make=make, **sections)
    module: Any = session.model
    return [p.detach().flatten().tolist() for p in module.parameters()]


def prompt(rank: int, function: Callable[..., Any], *args: Any) -> tuple[float, str, str]:
    """How long a rank took to end with an error, and which."""
    began = time.perf_counter()
    try:
        function(rank, *args)
    except BaseException as error:
        return time.perf_counter() - began, type(error).__name__, str(error)
    return time.perf_counter() - began, "", ""


def events(path: Path, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] in kinds]


def rows_of(path: Path, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in keys) for row in folder.surviving(path / "run" / folder.METRICS)]


# Out of memory on one rank


OOM: list[tuple[int, Fault, Callable[[], nn.Module], int]] = [
    # world size, fault, model, batch
    (2, Fault("in the model", rank=1), mlp, BATCH),
    (2, Fault("in the model", rank=0, step=0), mlp, BATCH),
    (2, Fault("in the model", rank=0, micro=5), mlp, BATCH),  # the last, which synchronises
    (2, Fault("after the model", rank=1, micro=5), mlp, BATCH),
    (2, Fault("after the model", rank=1, micro=5), normalised, BATCH),
    (2, Fault("after the model", rank=0, step=0, micro=5), normalised, BATCH),
    (2, Fault("before the model", rank=1, micro=5), mlp, BATCH),
    (2, Fault("in the backward pass", rank=1, micro=2), mlp, BATCH),
    (3, Fault("in the model", rank=2, micro=1), mlp, BATCH),
    (3, Fault("in the model", rank=0), mlp, 2 * MICRO),  # the third rank takes none
    (2, Fault("in the model", rank=1), normalised, BATCH),
    (2, Fault("in the model", rank=1), normalised, 2 * MICRO),  # the only micro-batch of its rank
    (2, Fault("before the model", rank=1), normalised, 2 * MICRO),
    (2, Fault("in the model", rank=1, fits=1), mlp, BATCH),  # twice in one step
]


@pytest.mark.parametrize(
    ("world_size", "fault", "make", "batch"),
    OOM,
    ids=[f"{w}-{f.kind}-rank{f.rank}-micro{f.micro}-{m.__name__}-{b}" for w, f, m, b in OOM],
)
def test_one_rank_out_of_memory_and_all_take_the_same_samples_again_in_halves(
    tmp_path: Path, world_size: int, fault: Fault, make: Callable[[], nn.Module], batch: int
) -> None:
    sections = {
        "batch": {"initial": batch, "micro_batch": MICRO, "max": batch},
        "train": {"samples": STEPS * batch},
    }
    weights = run_fleet(final_weights, world_size, str(tmp_path), fault, make, sections)
    assert all(each == weights[0] for each in weights)
    halvings = 2 if fault.fits == 1 else 1
    rejected = events(tmp_path, "plan_rejected")
    assert [e["step"] for e in rejected] == [fault.step] * halvings
    assert [e["micro_batch"] for e in rejected] == [2, 1][:halvings]
    assert rows_of(tmp_path, "step", "global_batch", "micro_batch") == [
        (step, batch, MICRO if step < fault.step else MICRO >> halvings) for step in range(STEPS)
    ]
    report = ledger.verify(tmp_path / "run")
    assert (report.violation, report.samples) == (None, STEPS * batch)
    if make is mlp:
        # A sample's gradient does not depend on how the batch is cut: the losses are those of a run that had room.
        assert [loss for (loss,) in rows_of(tmp_path, "loss")] == pytest.approx(undisturbed(batch), rel=1e-5)


def undisturbed(batch: int) -> list[float]:
    """The losses of the same run in plain torch, on one process."""
    data, model = blobs(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    stream, losses = Stream(size=len(data), seed=0), []
    for step in range(STEPS):
        samples = [data[int(i)] for i in stream.indices(range(step * batch, (step + 1) * batch))]
        loss = cross_entropy(model, tuple(torch.stack(column) for column in zip(*samples, strict=True)))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("world_size", [2, 3])
def test_when_one_sample_does_not_fit_on_one_rank_all_ranks_say_so(tmp_path: Path, world_size: int) -> None:
    fault = Fault("in the model", rank=world_size - 1, fits=0)
    found = run_fleet(prompt, world_size, oom, str(tmp_path), fault)
    for took_s, kind, told in found:
        assert took_s < PROMPT_S
        assert kind == "SessionError"
        assert f"rank {world_size - 1}: a micro-batch of one sample does not fit in memory" in told
    assert [e["reason"] for e in events(tmp_path, "fault")]
    assert ledger.verify(tmp_path / "run").violation is None


def oom(rank: int, path: str, fault: Fault) -> None:
    train(rank, path, fault=fault)


def test_memory_that_runs_out_while_gradients_are_exchanged_ends_all_ranks(tmp_path: Path) -> None:
    found = run_fleet(prompt, 2, oom, str(tmp_path), Fault("in the backward pass", rank=1, micro=5))
    assert found[1][1:] == ("OutOfMemoryError", "planted: out of memory")
    assert all(took_s < PROMPT_S and kind for took_s, kind, _ in found)
    assert len(events(tmp_path, "fault")) == 1


# A fault of one rank that cannot be mended


class OneBroken:
    """A data set whose sample at one stream position cannot be read."""

    def __init__(self, index: int) -> None:
        self._samples, self._index = blobs(), index

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        if index == self._index:
            raise ValueError("broken jpeg")
        return self._samples[index]


def reads(rank: int, path: str, index: int, loader_workers: int) -> None:
    train(rank, path, dataset=OneBroken(index), data={"loader_workers": loader_workers})


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_sample_that_one_rank_cannot_read_ends_all_ranks_and_is_named(tmp_path: Path, loader_workers: int) -> None:
    position = 2 * BATCH + BATCH - 1  # the second rank's last sample of step 2
    index = int(Stream(size=256, seed=0).indices([position])[0])
    found = run_fleet(prompt, 2, reads, str(tmp_path), index, loader_workers)
    assert found[1][1] == "TaskError"
    assert f"stream position {position} (dataset index {index})" in found[1][2]
    assert "broken jpeg" in found[1][2]
    assert all(took_s < PROMPT_S and kind for took_s, kind, _ in found)
    # Both steps before it were taken; the line of the second may still have waited for its exchange.
    assert rows_of(tmp_path, "step") in ([(0,)], [(0,), (1,)])
    assert ledger.verify(tmp_path / "run").violation is None


@pytest.mark.parametrize("kind", ["NaN", "infinite beside a finite gradient"])
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_loss_of_one_rank_that_is_not_finite_is_an_error_on_all_and_the_weights_before_are_saved(
    tmp_path: Path, guilty: int, kind: str
) -> None:
    found = run_fleet(prompt, 2, oom, str(tmp_path), Fault(kind, rank=guilty, micro=3))
    assert found[0][1:] == found[1][1:]
    _, kind, told = found[0]
    assert kind == "NonFiniteError"
    assert "step 2: the loss is not finite" in told
    assert f"stream positions {2 * BATCH} to {3 * BATCH - 1}" in told
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000002"
    assert str(checkpoint) in told
    assert verify(checkpoint) is None


def lengths_differ(rank: int, path: str) -> None:
    train(rank, path, dataset=blobs(256 + rank))


def test_data_sets_of_different_length_are_refused_on_all_ranks(tmp_path: Path) -> None:
    for took_s, kind, told in run_fleet(prompt, 2, lengths_differ, str(tmp_path)):
        assert took_s < PROMPT_S
        assert kind == "TaskError"
        assert "256" in told
        assert "257" in told


def on_its_own_disk(rank: int, path: str) -> None:
    train(rank, f"{path}/of-rank-{rank}")


def test_ranks_that_do_not_share_the_runs_folder_say_so_before_they_train(tmp_path: Path) -> None:
    found = run_fleet(prompt, 2, on_its_own_disk, str(tmp_path))
    for took_s, kind, told in found:
        assert took_s < PROMPT_S
        assert kind == "RunFolderError"
        assert "rank 1 does not see the run's folder" in told
        assert "storage that all nodes share" in told


def begins(rank: int, path: str, width: int, resume: bool, seed: int, size: int = 256) -> None:
    train(rank, path, make=lambda: mlp(width=width), resume=resume, run={"seed": seed}, dataset=blobs(size))


def test_what_is_refused_is_refused_on_all_ranks_with_the_same_words(tmp_path: Path) -> None:
    run_fleet(begins, 2, str(tmp_path), 32, False, 0)
    for args, error, words in (
        ((32, False, 0), RunFolderError, ["already holds a run"]),
        ((16, True, 0), CheckpointError, ["does not fit this model"]),
        ((32, True, 1), ConfigError, ["run.seed: 1", "trained with 0"]),
        ((32, True, 0, 255), CheckpointError, ["dataset_size 256, and it is 255 now"]),
    ):
        found = run_fleet(prompt, 2, begins, str(tmp_path), *args)
        assert found[0][1:] == found[1][1:]
        for took_s, kind, told in found:
            assert took_s < PROMPT_S
            assert kind == error.__name__
            assert all(each in told for each in words)
    # Only rank zero reads the events.
    written = tmp_path / "run" / folder.EVENTS
    sound = written.read_text()
    control = {"attempt": 1, "time": 0.0, "kind": "control", "step": 1, "samples_seen": 1, "request": None}
    written.write_text(sound + json.dumps(control | {"order": None, "reason": "", "cause": {"$": "Gone"}}) + "\n")
    found = run_fleet(prompt, 2, begins, str(tmp_path), 32, True, 0)
    assert [(kind, f"{written} holds an event of another" in told) for _, kind, told in found] == [
        ("RunFolderError", True)
    ] * 2
    written.write_text(sound)
    for file in (tmp_path / "run" / "checkpoints").glob("*/*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    found = run_fleet(prompt, 2, begins, str(tmp_path), 32, True, 0)
    assert [(kind, "is whole" in told) for _, kind, told in found] == [("CheckpointError", True)] * 2


# Storage


def on_full_disk(rank: int, path: str, parallel: str, full_rank: int, last: bool) -> None:
    """Checkpoints after steps 1, 3 and 5; the disk of one rank is full from step 2 on, to the end or to step 4."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = mlp(width=300)
    settings = config(
        path,
        train={"samples": STEPS * BATCH, "parallel": parallel},
        batch={"initial": BATCH, "micro_batch": MICRO, "max": BATCH},
        checkpoint={"every_samples": 2 * BATCH, "asynchronous": False},  # all ranks wait for it
        ledger=True,
    )
    worker = local_worker(settings)
    shard(model, settings, worker)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), worker=worker) as session:
        for step in session:
            full = rank == full_rank and session.step_number >= 2 and (last or session.step_number < 4)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000 if full else resource.RLIM_INFINITY, hard))
            for samples in step:
                session.backward(lambda samples=samples: cross_entropy(session.model, samples))  # type: ignore[misc]
            session.step()


# Rank zero writes what all ranks hold, and each rank its own shards.
WRITERS = [("ddp", 0), ("fsdp2", 0), ("fsdp2", 1)]


@pytest.mark.parametrize(("parallel", "full_rank"), WRITERS)
def test_a_full_disk_of_a_rank_that_writes_costs_the_checkpoint_and_no_training(
    tmp_path: Path, parallel: str, full_rank: int
) -> None:
    run_fleet(on_full_disk, 2, str(tmp_path), parallel, full_rank, False)
    assert [e["step"] for e in events(tmp_path, "checkpoint_failed")] == [4]
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [2, 6]
    assert len(rows_of(tmp_path, "step")) == STEPS
    assert ledger.verify(tmp_path / "run").violation is None


def test_a_full_disk_of_a_rank_that_writes_nothing_costs_nothing(tmp_path: Path) -> None:
    run_fleet(on_full_disk, 2, str(tmp_path), "ddp", 1, True)
    assert [e["step"] for e in events(tmp_path, "checkpoint", "checkpoint_failed")] == [2, 4, 6]
    assert verify(tmp_path / "run" / "checkpoints" / "step-000000006") is None


@pytest.mark.parametrize(("parallel", "full_rank"), WRITERS)
def test_when_the_last_checkpoint_fails_on_one_rank_all_ranks_end_with_an_error(
    tmp_path: Path, parallel: str, full_rank: int
) -> None:
    found = run_fleet(prompt, 2, on_full_disk, str(tmp_path), parallel, full_rank, True)
    for took_s, kind, told in found:
        assert took_s < PROMPT_S
        assert kind == "CheckpointError"
        assert f"checkpoint of step {STEPS} was not written" in told
    left = tmp_path / "run" / "checkpoints"
    assert [p.name for p in left.iterdir()] == ["step-000000002"]
    assert verify(left / "step-000000002") is None


# Resuming on another number of ranks, past a broken checkpoint


def part(rank: int, path: str, resume: bool, stop: int | None) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = config(
        path,
        train={"samples": 10 * BATCH},
        batch={"initial": BATCH, "micro_batch": MICRO, "max": BATCH},
        checkpoint={"every_samples": BATCH, "keep": 3},
        ledger=True,
    )
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), resume=resume) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            if rank == 1 and session.step_number == stop:
                session.request_stop("the second rank was asked")
            session.step()


def test_a_run_goes_on_at_another_world_size_past_a_broken_checkpoint_with_the_same_losses(tmp_path: Path) -> None:
    run_fleet(part, 1, str(tmp_path / "whole"), False, None)
    run_fleet(part, 2, str(tmp_path / "parts"), False, 3)
    assert [e["step"] for e in events(tmp_path / "parts", "stopped")] == [4]  # asked of one rank, done by both
    for newest in (tmp_path / "parts" / "run" / "checkpoints").glob("step-000000004/*.distcp"):
        newest.write_bytes(newest.read_bytes()[:-1])
    run_fleet(part, 3, str(tmp_path / "parts"), True, 6)
    run_fleet(part, 1, str(tmp_path / "parts"), True, None)
    parts, whole = rows_of(tmp_path / "parts", "step", "loss"), rows_of(tmp_path / "whole", "step", "loss")
    assert [step for step, _ in parts] == [step for step, _ in whole] == list(range(10))
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=1e-5)
    assert [e["step"] for e in events(tmp_path / "parts", "resumed")] == [3, 7]
    assert len(events(tmp_path / "parts", "checkpoint_passed_over")) >= 1
    assert ledger.verify(tmp_path / "parts" / "run").violation is None
