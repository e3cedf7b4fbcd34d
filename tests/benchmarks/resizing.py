"""A run whose workers come and go, and the times at which each of its steps was over, as the loop itself saw them.

The loop is a user's own, of a model of a million parameters with Adam. Every process keeps a file of lines: when it was
created, when its interpreter was up and when its imports were done; when it had warmed up; each step that it began, and
each that it took. The clock is the machine's monotonic one, which all processes share.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from orchestrator.config import RunConfig
from orchestrator.runtime import folder
from orchestrator.runtime.control_requests import Order, write_request
from orchestrator.runtime.paid_time import process_age_s
from orchestrator.runtime.worker import Worker
from orchestrator.session import Session
from tests.benchmarks.process_start import UP
from tests.support import blobs, cross_entropy, mlp

IMPORTED_S = time.monotonic()
ROOT = str(Path(__file__).resolve().parents[2])
FEATURES, WIDTH = 256, 900  # 1.05 million parameters
MICRO = 8
_PATIENCE_S = 300.0


def train(config: RunConfig, worker: Worker, *, resume: bool) -> bool:
    """What each worker runs."""
    torch.set_num_threads(1)
    times = Path(config.run.dir) / "times"
    times.mkdir(parents=True, exist_ok=True)
    with open(times / f"{os.getpid()}.jsonl", "a", buffering=1, encoding="utf-8") as lines:

        def note(kind: str, **what: Any) -> None:
            now_s = time.monotonic()
            lines.write(json.dumps({"kind": kind, "at_s": now_s, "pid": os.getpid(), **what}) + "\n")

        note(
            "process",
            created_s=time.monotonic() - process_age_s(),
            up_s=float(os.environ.get(UP, "nan")),
            imported_s=IMPORTED_S,
        )
        model = mlp(FEATURES, width=WIDTH)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        data = blobs(2048, features=FEATURES)
        with Session(config, model=model, optimizer=optimizer, dataset=data, worker=worker, resume=resume) as session:
            warm = False
            for step in session:
                rehearsing, number, began_as = session.rehearsing, session.step_number, worker.world_size
                if not rehearsing:
                    note("begun", step=number)
                for batch in step:
                    session.backward(partial(cross_entropy, session.model, batch))
                session.step()
                if not warm:
                    note("warm")
                    warm = True
                if session.step_number > number and worker.world_size == began_as:
                    note("taken", step=number, rank=worker.rank, world_size=worker.world_size)
    return session.finished


def warm_up_alone(settings: dict[str, Any]) -> None:
    """What a newcomer does until it joins, by a process that joins nobody."""
    import orchestrator.ray_train.worker  # noqa: F401  # which a newcomer imports as well
    from orchestrator.runtime.worker import local_worker

    config = RunConfig.model_validate(settings, strict=False)
    train(config, local_worker(config), resume=False)


def settings(place: Path, **sections: Any) -> RunConfig:
    """Four micro-batches a step, which the largest fleet shares out one each."""
    workers = {"initial": 4, "max": 4, "micro_batches_each": 1, "when": "always", **sections.pop("workers", {})}
    base: dict[str, Any] = {
        "run": {"name": "run", "dir": str(place), "seed": 0},
        "task": {"name": "digits"},  # not built: the loop has its own model and data
        "train": {"samples": 10**9},
        "batch": {"initial": 4 * MICRO, "micro_batch": MICRO, "max": 4 * MICRO},
        "optimizer": {"name": "adam", "lr": 1e-3},
        "controller": {"policy": "fixed", "every_samples": 8 * 4 * MICRO},
        "checkpoint": {"every_samples": 10**9},
        "ledger": True,
        "workers": workers,
    }
    return RunConfig.model_validate({**base, **sections})


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A step that was taken, by one process."""

    at_s: float
    pid: int
    step: int
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    created_s: float
    up_s: float  # its interpreter
    imported_s: float  # torch, Ray and ours
    warm_s: float


@dataclass(slots=True)
class Times:
    """Reads what the processes of a run in ``place`` have written, as it grows."""

    place: Path
    taken: list[Taken] = field(default_factory=list)
    begun: list[tuple[int, int]] = field(default_factory=list)  # process and step
    _born: dict[int, dict[str, Any]] = field(default_factory=dict)
    _warm: dict[int, float] = field(default_factory=dict)
    _read: dict[Path, int] = field(default_factory=dict)

    def look(self) -> Times:
        for path in sorted((self.place / "times").glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                self._take(json.loads(line))
        return self

    def _take(self, row: dict[str, Any]) -> None:
        kind, pid = row.pop("kind"), row["pid"]
        match kind:
            case "taken":
                self.taken.append(Taken(**row))
            case "begun":
                self.begun.append((pid, row["step"]))
            case "warm":
                self._warm[pid] = row["at_s"]
            case "process":
                self._born[pid] = row

    @property
    def processes(self) -> list[Process]:
        """Those that have warmed up."""
        return [
            Process(created_s=row["created_s"], up_s=row["up_s"], imported_s=row["imported_s"], warm_s=self._warm[pid])
            for pid, row in self._born.items()
            if pid in self._warm
        ]

    @property
    def of_rank_zero(self) -> list[Taken]:
        return sorted((one for one in self.taken if one.rank == 0), key=lambda one: one.at_s)

    def pid_of(self, rank: int) -> int:
        """The process that took the newest step as ``rank``."""
        return max((one for one in self.taken if one.rank == rank), key=lambda one: one.at_s).pid

    def wait_for(self, world_size: int, *, steps: int) -> None:
        """Until as many steps were taken by so many workers in a row."""

        def they_train() -> bool:
            newest = self.of_rank_zero[-steps:]
            return len(newest) == steps and {one.world_size for one in newest} == {world_size}

        self._until(they_train, what=f"{world_size} workers")

    def wait_for_more(self, steps: int, *, since_s: float) -> None:
        """Until as many steps were taken after that time."""
        self._until(lambda: sum(one.at_s > since_s for one in self.of_rank_zero) >= steps, what=f"{steps} steps")

    def _until(self, there: Callable[[], bool], *, what: str) -> None:
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s:
            self.look()
            if there():
                return
            time.sleep(0.05)
        raise AssertionError(f"{what} were not seen within {_PATIENCE_S:.0f} s")


def order(run: Path, what: Order, **caps: int | None) -> float:
    """Give an order; the time at which it was given."""
    write_request(run, what, caps=caps, timeout_s=_PATIENCE_S)
    return time.monotonic()


@contextmanager
def ray_cluster(cpus: int, **variables: str) -> Iterator[None]:
    import ray

    scratch = tempfile.mkdtemp(prefix="gs-")  # short: Ray puts sockets below it
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _temp_dir=scratch,
        runtime_env={
            "env_vars": {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]), **variables},
            "worker_process_setup_hook": "tests.benchmarks.process_start.mark",
        },
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def operated(config: RunConfig, operate: Callable[[Path, Times], None]) -> Times:
    """Train ``config`` while ``operate`` gives it orders, the last of them to stop; the times of all its steps."""
    from orchestrator.ray_train.trainer import AdaptiveTrainer

    place = Path(config.run.dir)
    run, times = place / config.run.name, Times(place)
    failed: list[BaseException] = []

    def operator() -> None:
        try:
            operate(run, times)
        except BaseException as error:
            failed.append(error)
        finally:
            (run / folder.STOP_REQUEST).touch()

    thread = threading.Thread(target=operator)
    thread.start()
    try:
        AdaptiveTrainer(config, train="tests.benchmarks.resizing:train").fit()
    finally:
        thread.join()
    if failed:
        raise failed[0]
    return times.look()
