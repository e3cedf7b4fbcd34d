"""Runs that are kept at a URL, and what lies there afterwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orchestrator.config import RunConfig
from orchestrator.runtime import folder
from orchestrator.runtime.preparation import run_folder
from orchestrator.runtime.remote_store import RemoteFolder
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp

BATCH = 32


def settings(url: str, scratch: Path, *, steps: int = 10, **sections: Any) -> RunConfig:
    """With a checkpoint at every second step, two kept."""
    base: dict[str, Any] = {
        "run": {"scratch": str(scratch), "upload_patience_s": 2.0},
        "train": {"samples": steps * BATCH},
        "checkpoint": {"every_samples": 2 * BATCH, "keep": 2},
        "ledger": True,
    }
    return config(url, **(base | sections))


def train(
    given: RunConfig, *, resume: bool = False, width: int = 32, between: Callable[[int], None] | None = None
) -> list[torch.Tensor]:
    """Train, calling ``between`` before each step with its number; the weights at the end."""
    model = mlp(width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Session(given, model=model, optimizer=optimizer, dataset=blobs(), resume=resume) as session:
        for step in session:
            if between is not None:
                between(session.step_number)
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def stopping_at(step: int) -> Callable[[int], None]:
    """As if the machine were gone before that step."""

    def gone(number: int) -> None:
        if number == step:
            raise KeyboardInterrupt

    return gone


def there(given: RunConfig) -> RemoteFolder:
    """What lies at the URL."""
    return RemoteFolder(f"{given.run.dir}/{given.run.name}")


def steps_there(given: RunConfig) -> list[int]:
    """The checkpoints there, whole or not."""
    return sorted({int(name.split("/")[1].removeprefix("step-")) for name in there(given).sizes("checkpoints")})


def kinds(given: RunConfig) -> list[str]:
    """Of the events that this machine has."""
    return [row["kind"] for row in folder.rows(run_folder(given) / folder.EVENTS)]


def assert_alike(given: RunConfig) -> None:
    """Whatever a reader may want is at the URL, byte for byte, and besides only the curves of other attempts."""
    path, remote = run_folder(given), there(given)
    here = {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not file.relative_to(path).parts[0].startswith(".")
    }
    names = {name for name in remote.sizes() if name in here or not name.startswith("tensorboard/")}
    assert {name: remote.read(name) for name in names} == here


if __name__ == "__main__":
    # For a test that ends it: checkpoints come faster than a slow network takes them.
    train(settings(sys.argv[1], Path(sys.argv[2]), steps=1000), width=150, between=lambda step: time.sleep(0.2))
