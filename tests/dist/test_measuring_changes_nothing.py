"""Promise 2: in advise mode losses and weights are bit-identical to plain DDP of the same layout."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.core.cursor import Stream
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp, run_fleet

STEPS, MICRO = 12, 4


def model_of(estimator: str) -> nn.Module:
    model = mlp()
    return nn.Sequential(nn.LayerNorm(20), model) if estimator == "norm_layers" else model


def plain_loop(rank: int, accumulation: int, seed: int, estimator: str) -> tuple[list[float], list[Tensor]]:
    """What a user writes by hand, without the library; it only takes the samples in the library's order."""
    world = dist.get_world_size()
    data, model = blobs(), model_of(estimator)
    ddp: nn.Module = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    stream, losses, position = Stream(size=len(data), seed=seed), [], 0
    for _ in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(accumulation):
            first = position + (rank * accumulation + i) * MICRO
            indices = stream.indices(range(first, first + MICRO))
            samples = [data[int(j)] for j in indices]
            inputs, labels = (torch.stack(column) for column in zip(*samples, strict=True))
            if i < accumulation - 1:
                with ddp.no_sync():  # type: ignore[operator]  # DDP's method
                    loss = nn.functional.cross_entropy(ddp(inputs), labels)
                    (loss / accumulation).backward()
            else:
                loss = nn.functional.cross_entropy(ddp(inputs), labels)
                (loss / accumulation).backward()
            total += loss.detach().double() * MICRO
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        batch = MICRO * accumulation * world
        losses.append(float(total) / batch)
        position += batch
    return losses, [p.detach().clone() for p in model.parameters()]


def with_the_library(
    rank: int, accumulation: int, seed: int, folder: str, estimator: str
) -> tuple[list[float], list[Tensor]]:
    batch = MICRO * accumulation * dist.get_world_size()
    settings = config(
        folder,
        run={"seed": seed},
        train={"samples": STEPS * batch},
        # Of two halves each: then the list is that of the plain loop.
        batch={"initial": batch, "micro_batch": 2 * MICRO if estimator == "split" else MICRO, "max": 200},
        measure={"estimator": estimator}
        | ({"calibration_samples": STEPS * batch // 2} if estimator == "norm_layers" else {}),
        controller={"mode": "advise", "policy": "noise_scale", "every_samples": 2 * batch, "cooldown_samples": 0},
    )
    model = model_of(estimator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses = []
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            total = torch.zeros((), dtype=torch.float64)
            for batch_of_samples in step:
                loss = session.backward(cross_entropy(session.model, batch_of_samples))
                assert loss is not None
                total += loss.double() * MICRO
            size = session.plan.batch
            session.step()
            dist.all_reduce(total)
            losses.append(float(total) / size)
    return losses, [p.detach().clone() for p in model.parameters()]


def both(rank: int, accumulation: int, seed: int, folder: str, estimator: str) -> bool:
    plain_losses, plain_weights = plain_loop(rank, accumulation, seed, estimator)
    losses, weights = with_the_library(rank, accumulation, seed, folder, estimator)
    assert losses == plain_losses
    for mine, theirs in zip(weights, plain_weights, strict=True):
        assert torch.equal(mine, theirs)
    return True


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("estimator", ["micro_batch", "per_example", "norm_layers", "split"])
def test_advising_leaves_losses_and_weights_bit_identical_to_plain_ddp(
    tmp_path: Path, world_size: int, accumulation: int, estimator: str
) -> None:
    if estimator == "split" and world_size * accumulation == 1:
        accumulation = 2  # a list of one part is no list of halves
    assert run_fleet(both, world_size, accumulation, 5, str(tmp_path), estimator) == [True] * world_size
