"""Faults in mid-run on a Ray cluster of several nodes on one machine, drawn by seed and injected at given samples.

``python -m tests.chaos RUN.YAML SEED ROUNDS`` trains the run while it injects ``ROUNDS`` rounds of five kinds of
fault, in a process of its own: two clusters in one confuse each other. Positions are samples, so that the schedule is
the same wherever it is run; a fault waits until the one before it is over, that is until workers join again or the
fleet is as large as its nodes allow.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import nn

from orchestrator.config import RunConfig, load_config, to_yaml
from orchestrator.runtime import folder
from orchestrator.runtime.control_requests import write_request
from orchestrator.runtime.export import export_weights
from orchestrator.runtime.ledger import verify
from orchestrator.runtime.worker import local_worker
from orchestrator.train import train
from tests.ray.tasks import Slow
from tests.support import config, free_port

ROOT = Path(__file__).resolve().parents[1]
NODES = 3
# The first two of nodes by turns, and the last two of kills.
KINDS = ("kill", "hang", "add", "remove", "remove after notice", "kill after join", "kill after leave")
FAULTS_A_ROUND = 5
FIRST_SAMPLES = 600
APART_SAMPLES = 1100
AFTER_SAMPLES = 1600  # for the last fault to be over before the run is
NOTICE_S = 30.0
_PATIENCE_S = 90.0

Kind = Literal["kill", "hang", "add", "remove", "remove after notice", "kill after join", "kill after leave"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """``place`` chooses among the ranks, or the nodes, that are there then: that part of the way through them."""

    kind: Kind
    at_samples: int
    place: float

    def __str__(self) -> str:
        return f"{self.kind} at {self.at_samples} samples, {self.place:.3f} of the way through those that are there"


def schedule(seed: int, *, rounds: int) -> list[Fault]:
    """Each round has five kinds once, in an order drawn; a node comes back within the round that took it away."""
    draws = random.Random(seed)
    faults: list[Fault] = []
    for number in range(rounds):
        goes, dies = KINDS[3 + (number + seed) % 2], KINDS[5 + number % 2]
        kinds: list[Any] = [*KINDS[:3], goes, dies]
        draws.shuffle(kinds)
        there = sorted((kinds.index(goes), kinds.index("add")))
        kinds[there[0]], kinds[there[1]] = goes, "add"  # so that there is always room for two workers
        for kind in kinds:
            at = FIRST_SAMPLES + len(faults) * APART_SAMPLES + draws.randrange(APART_SAMPLES // 2)
            faults.append(Fault(kind=kind, at_samples=at, place=draws.random()))
    return faults


def chaos_config(path: Path, *, rounds: int, step_s: float, **workers: Any) -> RunConfig:
    """The same weights in the end whatever ``workers`` are asked for and however long a micro-batch takes."""
    samples = FIRST_SAMPLES + rounds * FAULTS_A_ROUND * APART_SAMPLES + AFTER_SAMPLES
    (path / "pids").mkdir(parents=True, exist_ok=True)
    return config(
        path,
        run={"seed": 3},
        task={"name": "tests.chaos:dropping", "options": {"step_s": step_s, "pids": str(path / "pids")}},
        train={"samples": samples, "reproducible": True, "ema_half_life_samples": 500},
        batch={"initial": 16, "micro_batch": 4, "min": 16, "max": 64},
        optimizer={"name": "adamw", "lr": 0.01, "momentum": None},
        controller={"policy": "schedule", "ramp": ramp(samples), "every_samples": 40, "shrink": True},
        checkpoint={"every_samples": 64, "keep": 2},
        evaluation={"every_samples": 500},
        recovery={"hang_timeout_s": 8.0, "max_failures": 100},
        workers=workers,
        ledger=True,
    )


def ramp(samples: int) -> list[list[int]]:
    """Decisions to grow and to shrink, all through the run: most often the batch is large enough for all workers."""
    batches = (48, 64, 32, 64, 48)
    return [[200 + 900 * i, batches[i % len(batches)]] for i in range(samples // 900)]


@final
class Dropping(Slow):
    def model(self) -> nn.Module:
        plain = super().model()
        return nn.Sequential(nn.Dropout(0.2), plain)


def dropping(step_s: float = 0.0, pids: str = ".") -> Dropping:
    return Dropping(size=400, step_s=step_s, pids=pids, slow_save_s=0.0)


class Injector:
    """Watches a run's folder, and breaks what it runs on."""

    def __init__(self, settings: RunConfig, cluster: Any, nodes: list[Any], *, over: Callable[[], bool]) -> None:
        self._run = Path(settings.run.dir) / settings.run.name
        self._pids = Path(settings.task.options["pids"])
        self._cluster = cluster
        self._nodes = nodes
        self._over = over

    def inject(self, faults: list[Fault]) -> None:
        for fault in faults:
            self._until(lambda fault=fault: self._last("samples_seen") >= fault.at_samples)
            self._until(lambda: self._last("world_size") >= 2, patience_s=_PATIENCE_S)
            if self._over():
                raise AssertionError(f"the run ended before this could be injected: {fault}")
            if fault.kind == "kill after join":
                # One goes, so that another one joins.
                self._until_more(self._joins, after=lambda fault=fault: self._signal(signal.SIGKILL, fault.place))
            elif fault.kind == "kill after leave":
                self._until_more(self._leaves, after=lambda: self._cap(self._last("world_size") - 1))
                self._cap(None)
            print(f"{time.strftime('%X')} {self._last('samples_seen')} samples: {fault}", flush=True)
            match fault.kind:
                case "kill" | "kill after join" | "kill after leave":
                    self._signal(signal.SIGKILL, fault.place)
                case "hang":
                    self._signal(signal.SIGSTOP, fault.place)
                case "remove" | "remove after notice":
                    node = self._nodes.pop(int(fault.place * len(self._nodes)))
                    if fault.kind == "remove after notice":
                        self._give_notice(node.node_id)
                    self._cluster.remove_node(node, allow_graceful=False)
                case "add":
                    self._nodes.append(self._cluster.add_node(num_cpus=1))

    def _signal(self, number: signal.Signals, place: float) -> None:
        """One of those that train, wherever they are in changing."""

        def sent() -> bool:
            pids = self._alive()  # who has just become another rank says so in its next step
            if len(pids) < self._last("world_size"):
                return False
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[int(place * len(pids))], number)
                return True
            return False

        self._until(sent, patience_s=_PATIENCE_S)

    def _alive(self) -> list[int]:
        """The processes that train at present, by rank."""
        found = []
        for rank in range(int(self._last("world_size"))):
            with contextlib.suppress(OSError, ValueError):
                pid = int((self._pids / str(rank)).read_text())
                if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def _give_notice(self, node_id: str) -> None:
        """As a cloud does before it takes a spot instance; the time is then over."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        began_s, preempted = time.monotonic(), autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int(1e3 * (time.time() + NOTICE_S))
        accepted, why = GcsClient(address=self._cluster.address).drain_node(node_id, preempted, "spot", deadline_ms)
        assert accepted, why
        self._until(lambda: not self._trains_on(node_id), patience_s=NOTICE_S)
        left_s = NOTICE_S - (time.monotonic() - began_s)
        print(f"{time.strftime('%X')} nobody trains there any more, {left_s:.1f} s before the node goes", flush=True)
        assert left_s > 0, "the workers of a node that was given notice still trained there when it went"

    def _trains_on(self, node_id: str) -> bool:
        from ray._private import state  # the public way asks the dashboard, which a busy machine is slow to serve

        actors = state.actors().values()
        on_node = [actor for actor in actors if actor["Address"]["NodeID"] == node_id and actor["State"] == "ALIVE"]
        return any("RayTrainWorker" in actor["ActorClassName"] for actor in on_node)

    def _cap(self, workers: int | None) -> None:
        write_request(self._run, "cap", caps={"max_workers": workers}, timeout_s=_PATIENCE_S)

    def _joins(self) -> int:
        return sum(row["to_workers"] > row["from_workers"] for row in self._resizes())

    def _leaves(self) -> int:
        return sum(row["to_workers"] < row["from_workers"] for row in self._resizes())

    def _resizes(self) -> list[dict[str, Any]]:
        return [row for row in folder.rows(self._run / folder.EVENTS) if row["kind"] == "resize"]

    def _until_more(self, count: Callable[[], int], *, after: Callable[[], None]) -> None:
        before = count()
        after()
        self._until(lambda: count() > before, patience_s=_PATIENCE_S)

    def _last(self, key: str) -> Any:
        rows = list(folder.rows(self._run / folder.METRICS))
        return rows[-1][key] if rows else 0

    def _until(self, there: Callable[[], bool], *, patience_s: float = 300.0) -> None:
        """Or until the run is over, or patience is."""
        end_s = time.monotonic() + patience_s
        while not there() and not self._over() and time.monotonic() < end_s:
            time.sleep(0.05)


@contextlib.contextmanager
def cluster() -> Iterator[tuple[Any, list[Any]]]:
    """A head without CPUs, and nodes with room for one worker each."""
    os.environ |= {
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    import ray
    from ray.cluster_utils import Cluster

    scratch = tempfile.mkdtemp(prefix="gc-", dir="/tmp")  # short: Ray puts sockets below it
    # Ray Train asks the dashboard now and then.
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port(), "temp_dir": scratch}
    there = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [there.add_node(num_cpus=1) for _ in range(NODES)]
        os.environ["RAY_ADDRESS"] = there.address  # for what Ray Train starts, where other clusters are
        ray.init(address=there.address, logging_level="warning")
        yield there, nodes
    finally:
        ray.shutdown()
        there.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def main(file: str, seed: int, rounds: int) -> int:
    settings = load_config(Path(file))
    faults = schedule(seed, rounds=rounds)
    print(f"seed {seed}:", *faults, sep="\n  ", flush=True)
    ended: list[BaseException | None] = []
    with cluster() as (there, nodes):

        def fit() -> None:
            from orchestrator.ray_train.trainer import AdaptiveTrainer

            try:
                AdaptiveTrainer(settings).fit()
                ended.append(None)
            except BaseException as error:
                ended.append(error)
                raise

        training = threading.Thread(target=fit, daemon=True)
        training.start()
        # Nodes can be added in the main thread only.
        Injector(settings, there, nodes, over=lambda: bool(ended)).inject(faults)
        training.join()
    return int(ended != [None])


def run_in_chaos(path: Path, *, seed: int, rounds: int) -> Path:
    """The folder of a run that has finished among ``rounds`` rounds of faults; prints them, and what became of each."""
    settings = chaos_config(
        path, rounds=rounds, step_s=0.05, initial=2, max=NODES, micro_batches_each=4, when="always", resize="live"
    )
    file, said, run = path / "run.yaml", path / "said", path / "run"
    file.write_text(to_yaml(settings))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.chaos", str(file), str(seed), str(rounds)]
    with said.open("w") as out:
        code = subprocess.run(
            command, stdout=out, stderr=out, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, check=False
        ).returncode
    lines = said.read_text().splitlines()
    print(*(line for line in lines if " samples" in line and "TrainWorker" not in line), sep="\n")
    for event in folder.rows(run / folder.EVENTS):
        if event["kind"] in ("fault", "resize", "resumed", "workers_failed", "finished"):
            print({key: event.get(key) for key in ("kind", "attempt", "step", "samples_seen", "reason", "cost_s")})
    assert code == 0, "\n".join(lines[-60:])
    return run


def check_against_peace(run: Path, path: Path, *, rounds: int) -> None:
    """The run has lost nothing, and its weights are those of the same decisions in one process, to the last bit."""
    settings = chaos_config(path, rounds=rounds, step_s=0.0)
    assert train(settings, local_worker(settings), resume=False)
    peace = path / "run"
    report = verify(run)
    assert report.violation is None
    assert report.samples == settings.train.samples
    assert _steps(run) == _steps(peace)
    for averaged in (False, True):
        ours, theirs = _weights(run, averaged=averaged), _weights(peace, averaged=averaged)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    events = list(folder.rows(run / folder.EVENTS))
    assert events[-1]["kind"] == "finished"
    changes = [row for row in events if row["kind"] == "resize"]
    saved = {row["samples_seen"] for row in events if row["kind"] == "checkpoint"}
    for goes in (False, True):
        right_after = [row["samples_seen"] for row in changes if (row["to_workers"] < row["from_workers"]) == goes]
        assert any(at < sample <= at + 2 * 64 for at in right_after for sample in saved)


def _steps(run: Path) -> list[tuple[int, int, int]]:
    """Of each step its number, the samples behind it and its batch, which is what was decided."""
    rows = folder.surviving(run / folder.METRICS)
    return [(row["step"], row["samples_seen"], row["global_batch"]) for row in rows]


def _weights(run: Path, *, averaged: bool) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*"), key=lambda found: found.name)
    file = run.parent / "weights.pt"
    export_weights(newest, file, averaged=averaged)
    weights: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return {name: weight for name, weight in weights.items() if isinstance(weight, torch.Tensor)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
