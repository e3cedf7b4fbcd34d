"""FSDP2: what DDP promises holds where each rank has a shard of the weights, and no rank is left waiting.

The cases of one world size run one after the other in the same processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from orchestrator.core.cursor import Stream
from orchestrator.optim import LAMB
from orchestrator.runtime import folder, ledger
from orchestrator.runtime.checkpoints import verify
from orchestrator.runtime.parallel import replica_of
from orchestrator.runtime.sharding import shard
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from orchestrator.train import train as train_task
from tests.support import EAGER, blobs, config, cross_entropy, mlp, run_fleet

pytestmark = pytest.mark.dist

MICRO, STEPS = 4, 4
SUMS = 2e-5  # float32 sums of some thousand terms in another order, four steps long
Make = Callable[[], nn.Module]


class Net(nn.Module):
    """Blocks of 320 x 320 that are gathered by themselves, and a rest of linear layers, dropout and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2 + (dist.get_rank() if dist.is_initialized() else 0))  # rank zero's weights are to count
        self.inlet = nn.Linear(20, 320)
        self.blocks = nn.ModuleList(nn.Linear(320, 320) for _ in range(2))
        self.norm = nn.BatchNorm1d(320, momentum=0.01)
        self.dropout = nn.Dropout(0.1)
        self.outlet = nn.Linear(320, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.inlet(inputs)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        outputs: Tensor = self.outlet(self.dropout(self.norm(hidden)))
        return outputs


def small() -> nn.Module:
    return mlp(width=16)


def starve_in_backward(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.register_hook(starve)


def slow(parameters: Any, *, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr / 16)


class Planted:
    """What goes wrong on ``rank`` in a step's micro-batch ``micro`` of more than two samples."""

    def __init__(self, kind: str, *, rank: int, step: int = 1, micro: int = 0) -> None:
        self.kind, self.rank, self.step, self.micro = kind, rank, step, micro


def starve(*_: Any) -> None:
    raise torch.OutOfMemoryError("planted: out of memory")


def train(
    path: Path,
    *,
    parallel: str = "fsdp2",
    make: Make = small,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    batch: int = 2 * MICRO,
    planted: Planted | None = None,
    each_layer: bool = False,
    resume: bool = False,
    scaled: bool = False,
    **sections: Any,
) -> dict[str, Any]:
    """One run; its weights and buffers, whole, by name."""
    base: dict[str, Any] = {
        "train": {"samples": STEPS * batch},
        "batch": {"initial": batch, "micro_batch": MICRO, "max": max(batch, 64)},
        "controller": {"mode": "advise", "policy": "noise_scale"},
        "ledger": True,
    }
    sections["train"] = {**base["train"], **sections.get("train", {}), "parallel": parallel}
    settings = config(path, **(base | sections))
    worker, model = local_worker(settings), make()
    if each_layer and parallel == "fsdp2":
        for layer in model.children():
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
    shard(model, settings, worker)
    session = Session(
        settings,
        model=model,
        optimizer=optimizer(model.parameters(), lr=0.05),
        dataset=blobs(),
        worker=worker,
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None,
        resume=resume,
    )
    with session:
        for step in session:
            for number, samples in enumerate(step):
                goes_wrong = planted is not None and (planted.rank, planted.step, planted.micro) == (
                    worker.rank,
                    session.step_number,
                    number,
                )
                kind = planted.kind if planted is not None and goes_wrong and len(samples[0]) > 2 else None
                session.backward(lambda samples=samples, kind=kind: planted_loss(session.model, samples, kind))
            session.step()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().tolist()
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }


def planted_loss(model: Any, samples: Any, kind: str | None) -> Tensor:
    if kind == "before the model":
        starve()
    first, *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    handles: list[Any] = []
    if kind == "in the model":
        handles.append(last.register_forward_pre_hook(starve))
    if kind == "midway in the backward pass":
        handles.append(first.register_forward_hook(starve_in_backward))
    try:
        loss = cross_entropy(model, samples)
    finally:
        for handle in handles:
            handle.remove()
    if kind == "in the backward pass":
        loss.register_hook(starve)
    return loss * float("nan") if kind == "NaN" else loss


def failure_of(path: Path, function: Callable[..., Any], **arguments: Any) -> str:
    """How it ends."""
    try:
        function(path, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "well"


def rows(path: Path, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in keys) for row in folder.surviving(path / "run" / folder.METRICS)]


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] == kind]


class Crooked(nn.Module):
    """Goes through its layers in an order that depends on the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, inputs: Tensor) -> Tensor:
        layers = [self.first, self.second]
        for layer in layers if dist.get_rank() else reversed(layers):
            inputs = layer(inputs)
        return inputs


class Rows(nn.Module):
    """An embedding whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(8, 4, sparse=True)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.rows(inputs.long().clamp(0, 7)).sum(1)
        return found


def unsharded(path: Path, *, before: bool) -> None:
    """Without ``shard``, or with it after the optimizer was built."""
    settings, model = config(path, train={"parallel": "fsdp2"}), small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if before:
        shard(model, settings, local_worker(settings))
    Session(settings, model=model, optimizer=optimizer, dataset=blobs())


def sharded_for_ddp(path: Path) -> None:
    model = small()
    fully_shard(model)
    Session(config(path), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), dataset=blobs())


def curvature(path: Path) -> None:
    settings, model = config(path, train={"parallel": "fsdp2"}), small()
    shard(model, settings, local_worker(settings))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        session.measure_curvature(cross_entropy)


def trained_task(path: Path, *, parallel: str) -> None:
    """Evaluated with averaged weights, the held-out samples in 23 batches."""
    settings = config(
        path,
        train={"samples": 192, "parallel": parallel, "ema_half_life_samples": 64},
        batch={"initial": 64, "micro_batch": 16, "max": 64},
        evaluation={"every_samples": 64},
    )
    train_task(settings, local_worker(settings), resume=False)


def looked_at_twice(path: Path, *, parallel: str) -> tuple[float, float]:
    """The loss of some samples with the weights of the last step, and right after with the averaged ones."""
    settings = config(path, train={"samples": 96, "parallel": parallel, "ema_half_life_samples": 32})
    worker, model = local_worker(settings), small()
    shard(model, settings, worker)
    optimizer, samples = torch.optim.SGD(model.parameters(), lr=0.5), blobs().tensors
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), worker=worker) as session:
        for step in session:
            for batch in step:
                session.backward(cross_entropy(session.model, batch))
            session.step()
        with torch.no_grad():
            own = float(cross_entropy(model, samples))
            with session.ema_weights():
                return own, float(cross_entropy(model, samples))


def units_of(path: Path, *, make: Make) -> list[str]:
    """What is gathered by itself."""
    settings = config(path, train={"parallel": "fsdp2"})
    model = shard(make(), settings, local_worker(settings))
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def run_all(rank: int, cases: dict[str, Callable[[Path], Any]], root: str) -> dict[str, Any]:
    return {name: case(Path(root) / name) for name, case in cases.items()}


BRANCHED = {
    **EAGER,
    "policy": "branched",
    "branch_every_samples": 256,
    "branch_samples": 256,
    "branch_tolerance": 0.05,
}
DECIDES = {"mode": "advise", "policy": "noise_scale", "every_samples": 48}
GROWS = {"mode": "act", "policy": "schedule", "ramp": [[48, 40]], "every_samples": 16, "deadband": 1.0}
# By the number of ranks: what is trained under DDP and under FSDP2.
TWINS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "one micro-batch each": {"each_layer": True},
        "three each, clipped": {"make": Net, "batch": 6 * MICRO, "train": {"max_grad_norm": 0.5}},
        "three on two ranks": {"make": Net, "batch": 3 * MICRO},
        "the batch grows": {"batch": 16, "train": {"samples": 200}, "controller": GROWS},
        "AdamW and a loss scale": {"batch": 24, "optimizer": torch.optim.AdamW, "scaled": True},
        "LAMB, by layer": {"batch": 24, "optimizer": LAMB, "measure": {"groups": "layers"}, "controller": DECIDES},
        "branches": {"make": mlp, "batch": 16, "optimizer": slow, "train": {"samples": 800}, "controller": BRANCHED},
        "one split": {"batch": MICRO, "measure": {"estimator": "split"}},
    },
    4: {
        "one micro-batch each": {"each_layer": True, "batch": 16},
        "three each": {"make": Net, "batch": 48},
        "two on four ranks": {"batch": 8, "each_layer": True},
        "saved": {"batch": 24, "optimizer": torch.optim.Adam},
    },
}
LATER = {"saved": {"batch": 24, "optimizer": torch.optim.Adam, "resume": True, "train": {"samples": 8 * 24}}}
# Three micro-batches each, but where the batch is told.
STARVED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "at the first layer of the run": {"planted": Planted("before the model", rank=0, step=0)},
        "in the run's first pass": {"planted": Planted("in the model", rank=1, step=0), "each_layer": True},
        "in the first backward pass": {"planted": Planted("in the backward pass", rank=0, step=0), "each_layer": True},
        "in a later pass": {"planted": Planted("in the model", rank=0, step=2, micro=1), "each_layer": True},
        "midway": {"planted": Planted("midway in the backward pass", rank=1, step=1, micro=2), "each_layer": True},
        "in company": {"planted": Planted("in the model", rank=1, step=1, micro=1), "batch": 3 * MICRO},
    },
    4: {"on four": {"planted": Planted("midway in the backward pass", rank=2, step=0), "each_layer": True}},
}


def cases_of(world_size: int) -> dict[str, Callable[[Path], Any]]:
    cases: dict[str, Callable[[Path], Any]] = {}
    for name, case in TWINS[world_size].items():
        cases |= {f"{parallel}: {name}": partial(train, parallel=parallel, **case) for parallel in ("ddp", "fsdp2")}
    starved = {name: {"batch": 24} | case for name, case in STARVED[world_size].items()}
    cases |= {f"starved {name}": partial(train, **case) for name, case in starved.items()}
    if world_size == 4:
        return cases
    for parallel in ("ddp", "fsdp2"):
        later = partial(train, parallel=parallel, **LATER["saved"])
        cases |= {f"{parallel}: saved": later, f"{parallel}: task": partial(trained_task, parallel=parallel)}
        cases[f"{parallel} twice"] = partial(looked_at_twice, parallel=parallel)
        cases[f"{parallel}: passed over"] = partial(
            train, parallel=parallel, scaled=True, optimizer=slow, planted=Planted("NaN", rank=1, step=1, micro=0)
        )
    return cases | {
        "unmeasured": partial(train, **TWINS[2]["three each, clipped"], measure={"every_steps": 1000}),
        "not finite": partial(failure_of, function=train, planted=Planted("NaN", rank=1, step=2)),
        "crooked": partial(failure_of, function=train, make=Crooked, each_layer=True),
        "optimizer first": partial(failure_of, function=unsharded, before=True),
        "never sharded": partial(failure_of, function=unsharded, before=False),
        "sharded for ddp": partial(failure_of, function=sharded_for_ddp),
        "curvature": partial(failure_of, function=curvature),
        "sparse": partial(failure_of, function=train, make=Rows),
        "units": partial(units_of, make=Net),
    }


@dataclass(frozen=True)
class Found:
    """What every case of both fleets gave, by rank, and where its run lies."""

    results: dict[int, list[dict[str, Any]]]
    root: Path

    def path(self, world_size: int, name: str) -> Path:
        return self.root / str(world_size) / name


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    root = tmp_path_factory.mktemp("sharded")
    results = {4: run_fleet(run_all, 4, cases_of(4), str(root / "4"))}
    for parallel in ("ddp", "fsdp2"):  # goes on at two
        shutil.copytree(root / "4" / f"{parallel}: saved", root / "2" / f"{parallel}: saved")
    results[2] = run_fleet(run_all, 2, cases_of(2), str(root / "2"))
    return Found(results, root)


def largest(values: Any) -> float:
    return float(torch.tensor(values).abs().max())


def differ(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference of a weight, in terms of the largest weight of its tensor."""
    assert mine.keys() == theirs.keys()
    return max(
        float((torch.tensor(mine[name]) - torch.tensor(theirs[name])).abs().max()) / max(largest(theirs[name]), 1e-3)
        for name in mine
    )


BUFFERS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
EVERY = [(world_size, name) for world_size, twins in TWINS.items() for name in twins] + [(2, "saved")]


@pytest.mark.parametrize(("world_size", "name"), EVERY)
def test_losses_moments_and_weights_are_those_of_ddp(found: Found, world_size: int, name: str) -> None:
    sharded, ddp = f"fsdp2: {name}", f"ddp: {name}"
    keys = ("step", "global_batch", "accum_steps", "verdict")
    assert rows(found.path(world_size, sharded), *keys) == rows(found.path(world_size, ddp), *keys)
    numbers = ("loss", "lr", "grad_sq", "trace_cov")
    for mine, theirs in zip(
        rows(found.path(world_size, sharded), *numbers), rows(found.path(world_size, ddp), *numbers), strict=True
    ):
        assert mine[:2] == pytest.approx(theirs[:2], rel=SUMS)
        # The moments are differences of sums of this size.
        assert mine[2:] == pytest.approx(theirs[2:], abs=SUMS * (abs(theirs[2]) + abs(theirs[3])))
    for each in found.results[world_size]:  # buffers are each rank's own within a step
        assert differ(each[sharded], each[ddp]) < SUMS
    assert ledger.verify(found.path(world_size, sharded) / "run").violation is None


def test_every_rank_holds_the_same_weights_and_the_measured_runs_measured(found: Found) -> None:
    for results in found.results.values():
        for name in (name for name in results[0] if name.startswith(("fsdp2: ", "starved")) and "task" not in name):
            weights = [{k: v for k, v in each[name].items() if k not in BUFFERS} for each in results]
            assert all(each == weights[0] for each in weights), name
    for world_size, name in EVERY:
        assert all(noise is not None for (noise,) in rows(found.path(world_size, f"fsdp2: {name}"), "trace_cov"))
    assert events(found.path(2, "fsdp2: branches"), "branches")
    batches = [batch for (batch,) in rows(found.path(2, "fsdp2: the batch grows"), "global_batch")]
    assert {16, 40} <= set(batches)


def test_measuring_leaves_every_bit_of_losses_and_weights_as_it_is(found: Found) -> None:
    measured, silent = "fsdp2: three each, clipped", "unmeasured"
    assert rows(found.path(2, measured), "loss") == rows(found.path(2, silent), "loss")
    assert rows(found.path(2, silent), "trace_cov")[1:] == [(None,)] * (STEPS - 1)
    for each in found.results[2]:
        assert each[measured] == each[silent]


def test_the_noise_of_each_layer_is_that_of_ddp(found: Found) -> None:
    mine, theirs = (
        list(folder.rows(found.path(2, f"{parallel}: LAMB, by layer") / "run" / folder.GROUPS))
        for parallel in ("fsdp2", "ddp")
    )
    assert len(mine) == len(theirs) > 0
    for own, other in zip(mine, theirs, strict=True):
        assert list(own["groups"]) == list(other["groups"]) == ["0", "2", "4"]
        for layer, ddp in other["groups"].items():
            size = abs(ddp["grad_sq"]) + abs(ddp["trace_cov"])
            for key in ("grad_sq", "trace_cov"):
                assert own["groups"][layer][key] == pytest.approx(ddp[key], abs=SUMS * size)


def test_a_task_evaluates_as_under_ddp_also_where_the_ranks_have_unequal_shares(found: Found) -> None:
    mine, theirs = (
        list(folder.rows(found.path(2, f"{parallel}: task") / "run" / folder.EVALS)) for parallel in ("fsdp2", "ddp")
    )
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == [0, 1, 2]
    for own, other in zip(mine, theirs, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=SUMS)
        assert own["accuracy"] == pytest.approx(other["accuracy"], abs=1 / 300)


def test_averaged_weights_are_used_right_after_those_of_the_last_step(found: Found) -> None:
    for each in found.results[2]:
        own, averaged = each["fsdp2 twice"]
        assert (own, averaged) == pytest.approx(each["ddp twice"], rel=SUMS)
        assert abs(own - averaged) > 0.01


def test_what_was_saved_at_four_goes_on_at_two(found: Found) -> None:
    assert rows(found.path(2, "fsdp2: saved"), "step", "world_size") == [(n, 4 if n < 4 else 2) for n in range(8)]


def test_a_sharded_checkpoint_goes_on_in_one_process_without_shards(found: Found, tmp_path: Path) -> None:
    shutil.copytree(found.path(4, "fsdp2: saved"), tmp_path / "one")
    alone = train(tmp_path / "one", **LATER["saved"])
    assert differ(alone, found.results[2][0]["ddp: saved"]) < SUMS


def test_a_gradient_scaler_passes_over_a_step_on_all_ranks_alike(found: Found) -> None:
    for each in found.results[2]:
        assert differ(each["fsdp2: passed over"], each["ddp: passed over"]) < SUMS
    taken = rows(found.path(2, "fsdp2: passed over"), "step", "loss")
    assert [loss is None for _, loss in taken] == [step == 1 for step, _ in taken]


STARVED_CASES = [(world_size, name) for world_size, starved in STARVED.items() for name in starved]


@pytest.mark.parametrize(("world_size", "name"), STARVED_CASES)
def test_memory_that_runs_out_anywhere_on_one_rank_halves_the_micro_batch_on_all(
    found: Found, world_size: int, name: str
) -> None:
    path, case = found.path(world_size, f"starved {name}"), STARVED[world_size][name]
    (rejected,) = events(path, "plan_rejected")
    step, batch = case["planted"].step, case.get("batch", 24)
    assert (rejected["step"], rejected["micro_batch"]) == (step, 2)
    assert rows(path, "step", "micro_batch") == [(n, MICRO if n < step else 2) for n in range(STEPS)]
    report = ledger.verify(path / "run")
    assert (report.violation, report.samples) == (None, STEPS * batch)
    # A sample's gradient does not depend on how the batch is cut.
    assert [loss for (loss,) in rows(path, "loss")] == pytest.approx(undisturbed(batch), rel=1e-5)


def undisturbed(batch: int) -> list[float]:
    """The losses of the same run in plain torch, on one process."""
    data, model = blobs(), small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    stream, losses = Stream(size=len(data), seed=0), []
    for step in range(STEPS):
        samples = [data[int(i)] for i in stream.indices(range(step * batch, (step + 1) * batch))]
        loss = cross_entropy(model, tuple(torch.stack(column) for column in zip(*samples, strict=True)))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_a_loss_of_one_rank_that_is_not_finite_ends_all_and_the_weights_before_are_saved(found: Found) -> None:
    (told,) = {each["not finite"] for each in found.results[2]}
    checkpoint = found.path(2, "not finite") / "run" / "checkpoints" / "step-000000002"
    assert told.startswith("NonFiniteError: step 2: the loss is not finite")
    assert str(checkpoint) in told
    assert verify(checkpoint) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("crooked", "go through the model in different orders"),
        ("optimizer first", "the optimizer holds 6 parameters that are not the model's"),
        ("never sharded", "call orchestrator.shard(model, config, worker)"),
        ("sharded for ddp", "write train.parallel: fsdp2"),
        ("curvature", "differentiates the loss twice"),
        ("sparse", "module rows has sparse gradients"),
    ],
)
def test_what_cannot_be_sharded_is_refused_on_all_ranks_alike(found: Found, name: str, words: str) -> None:
    (told,) = {each[name] for each in found.results[2]}
    assert told.startswith("SessionError")
    assert words in told


def test_blocks_are_gathered_by_themselves_and_all_the_rest_together(found: Found) -> None:
    assert found.results[2][0]["units"] == ["", "blocks.0", "blocks.1"]
