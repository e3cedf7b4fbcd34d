"""A run in Weights & Biases: curves against samples seen, the resolved config, decisions, and how it ended.

W&B finds its server, and who we are there, in its own environment variables (or what ``wandb login`` has left).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from orchestrator.config import RunConfig
from orchestrator.runtime.scalars import evaluation_scalars, group_scalars, step_scalars

_ENDINGS = ("finished", "stopped", "fault")


@final
class WandbTracker:
    """``orchestrator.runtime.queued_tracker.ServiceTracker``; ``run_id`` is that of an earlier attempt, if any.

    W&B's files lie in ``folder``/wandb. Every curve's x-axis is ``samples_seen``.
    """

    name = "wandb"

    def __init__(self, config: RunConfig, *, folder: Path, run_id: str | None) -> None:
        import wandb

        tracking = config.tracking
        self.run_id = uuid.uuid4().hex[:12] if run_id is None else run_id
        self._failed = False
        self._run: Any = wandb.init(
            entity=tracking.wandb_entity,
            project=tracking.wandb_project,
            id=self.run_id,
            resume="allow",
            name=tracking.run_name or config.run.name,
            tags=[f"{name}:{value}"[:64] for name, value in tracking.tags.items()],  # W&B's tags are short words
            config=config.model_dump(mode="json"),
            allow_val_change=True,  # a resumed run may be longer
            dir=str(folder),
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",  # what this process prints is not only this run's
                login_timeout=1.0,  # nobody answers a question here: without a key it ends in an error
            ),
        )
        self.address: str | None = self._run.url
        self._run.define_metric("samples_seen")
        self._run.define_metric("*", step_metric="samples_seen")

    def step(self, row: Mapping[str, Any]) -> None:
        self._log({**step_scalars(row), "train/step": row["step"]}, row)

    def event(self, row: Mapping[str, Any]) -> None:
        kind = row["kind"]
        if kind == "decision":
            self._log({"decision/target_batch": row["target_batch"]}, row)
            self._run.summary["decision"] = row["reason"]
        elif kind in _ENDINGS:
            self._failed = kind == "fault"
            self._run.summary["ending"] = f"{kind}: {row['reason']}"

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._log(evaluation_scalars(row), row)

    def groups(self, row: Mapping[str, Any]) -> None:
        self._log(group_scalars(row), row)

    def close(self) -> None:
        self._run.finish(exit_code=int(self._failed))

    def _log(self, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        if scalars:
            self._run.log({**scalars, "samples_seen": row["samples_seen"]})
