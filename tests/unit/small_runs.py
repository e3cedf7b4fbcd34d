"""Small runs, by the command or by a loop of their own, and what their folders say afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

from launch.cli import main
from orchestrator.config import RunConfig, to_yaml
from orchestrator.runtime import folder, ledger
from orchestrator.runtime.checkpoints import verify
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp

STEPS, BATCH, MICRO = 6, 32, 8
ACCEPTED = "recovery.accept_changed=[task.options]"  # the task was mended by one of its options
Damage = Callable[[Path], Any]  # done to the folder that holds a run


def settings_of(path: Path, kind: str = "sound", **sections: Any) -> RunConfig:
    """For the command: ``STEPS`` steps of the task that is known by this name."""
    base: dict[str, Any] = {
        "task": {"name": "tests.unit.broken_tasks:task", "options": {"kind": kind}},
        "train": {"samples": STEPS * BATCH},
        "batch": {"initial": BATCH, "micro_batch": MICRO, "max": BATCH},
        "ledger": True,
    }
    return config(path, **(base | sections))


def groundswell(settings: RunConfig, *arguments: str) -> Result:
    """``groundswell run`` of ``settings``, in this process."""
    run = Path(settings.run.dir)
    run.mkdir(parents=True, exist_ok=True)
    file = run / "given.yaml"
    file.write_text(to_yaml(settings))
    return CliRunner().invoke(main, ["run", str(file), "--runtime", "local", *arguments])


def trained(path: Path, *, resume: bool = False, stop_in_step: int | None = None, **more: Any) -> None:
    """A run with a checkpoint at every second step, three kept."""
    sections: dict[str, Any] = {"checkpoint": {"every_samples": 2 * BATCH, "keep": 3}, "train": {"samples": 10 * BATCH}}
    settings = config(path, **(sections | more.pop("sections", {})))
    model = more.pop("model", None) or mlp()
    factory = more.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    dataset = more.pop("dataset", None) or blobs()
    with Session(
        settings, model=model, optimizer=factory(model.parameters()), dataset=dataset, resume=resume
    ) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            if session.step_number == stop_in_step:
                session.request_stop("the test asked")
            session.step()


def events(path: Path, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(path / "run" / folder.EVENTS) if not kinds or row["kind"] in kinds]


def rows_of(path: Path, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in keys) for row in folder.surviving(path / "run" / folder.METRICS)]


def readings_of(path: Path) -> list[tuple[Any, ...]]:
    """Every step of a run with what it read: equal for runs that trained alike."""
    return rows_of(path, "step", "samples_seen", "loss", "grad_sq", "trace_cov", "noise_scale")


def saved_steps(path: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (path / "run" / "checkpoints").glob("step-0*"))


def assert_readable(path: Path) -> None:
    """Every line of the run's files can be read, and every checkpoint is whole."""
    for name in (folder.EVENTS, folder.METRICS, folder.EVALS, folder.LEDGER):
        list(folder.rows(path / "run" / name))
    for checkpoint in (path / "run" / "checkpoints").glob("step-*"):
        assert verify(checkpoint) is None, checkpoint
    if (path / "run" / folder.LEDGER).exists():
        assert ledger.verify(path / "run").violation is None
