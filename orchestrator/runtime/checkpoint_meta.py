"""What does a checkpoint keep besides tensors, and what does a run that goes on take up from it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from orchestrator.config import RunConfig
from orchestrator.config.differences import Difference
from orchestrator.core import codec
from orchestrator.core.ramp import InForce, Ramp
from orchestrator.ports import BrainRecord
from orchestrator.runtime.brain import STATE_TYPES
from orchestrator.runtime.calibration import Calibration
from orchestrator.runtime.ema import tied_names
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.progress import Moment
from orchestrator.runtime.resume_checks import (
    NOT_OF_THIS_VERSION,
    changes_of_config,
    of_another_version,
    refuse_another_run,
)
from orchestrator.runtime.rng import restore_rng, save_rng
from orchestrator.runtime.trained import Trained
from orchestrator.runtime.worker import Worker
from orchestrator.types import Target

_IN_FORCE_TYPES: Mapping[str, type] = {cls.__name__: cls for cls in (InForce, Ramp, Target)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenUp:
    """What a run begins from: a checkpoint's, or nothing."""

    at: Moment = field(default_factory=lambda: Moment(step=0, samples_seen=0))
    record: BrainRecord = field(default_factory=BrainRecord)
    in_force: InForce | None = None  # with the last step of the checkpoint
    checkpoint: Path | None = None
    changes: Sequence[Difference] = ()  # of the config since, which are told


@final
class CheckpointMeta:
    def __init__(
        self,
        config: RunConfig,
        *,
        worker: Worker,
        trained: Trained,
        journal: Journal,
        calibration: Calibration,
        dataset_size: int,
    ) -> None:
        self._config = config
        self._worker = worker
        self._trained = trained
        self._journal = journal
        self._calibration = calibration
        self._dataset_size = dataset_size

    def collect(self, at: Moment, in_force: InForce | None) -> dict[str, Any]:
        """What the checkpoint of that moment keeps; rank zero's, and empty elsewhere."""
        if self._worker.rank != 0:
            return {}
        controller, scaler = self._worker.controller, self._trained.scaler
        # Decisions that are not due yet are part of what the checkpoint knows, so they are written down with it.
        self._journal.decisions(controller.answer)
        record = controller.record()
        return {
            "step": at.step,
            "samples_seen": at.samples_seen,
            "seed": self._config.run.seed,
            "dataset_size": self._dataset_size,
            "config": self._config.model_dump(mode="json"),
            "world_size": self._worker.world_size,
            "controller": record.state,
            "controller_tail": codec.encode(record.tail),
            "in_force": codec.encode(in_force),
            **self._journal.noise.memory(),
            **self._calibration.memory(),
            "tied": tied_names(self._trained.model),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": save_rng(),
        }

    def take_up(self, meta: Mapping[str, Any], path: Path) -> TakenUp:
        """Go on from what the checkpoint at ``path`` kept.

        Raises ``ConfigError`` and ``CheckpointError`` where the run cannot.
        """
        changes = changes_of_config(meta, path, self._config)
        scaler = self._trained.scaler
        try:
            refuse_another_run(meta, path, seed=self._config.run.seed, dataset_size=self._dataset_size)
            found = TakenUp(
                at=Moment(step=meta["step"], samples_seen=meta["samples_seen"]),
                record=BrainRecord(state=meta["controller"], tail=codec.decode(meta["controller_tail"], STATE_TYPES)),
                in_force=codec.decode(meta["in_force"], _IN_FORCE_TYPES),
                checkpoint=path,
                changes=changes,
            )
            self._journal.noise.remember(meta)
            self._calibration.remember(meta)
            restore_rng(meta["rng"])
            if scaler is not None and meta["scaler"] is not None:
                scaler.load_state_dict(meta["scaler"])
        except NOT_OF_THIS_VERSION as error:
            raise of_another_version(path, error) from error
        return found
