"""What a run that goes on is refused for: a folder that a rank does not see, another run's state, another version's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.config.differences import Difference, differences, refuse_changes
from orchestrator.errors import CheckpointError, RunFolderError
from orchestrator.ports import Collective
from orchestrator.runtime import folder

NOT_OF_THIS_VERSION = (KeyError, TypeError, ValueError)  # what comes of reading what another version wrote


def check_shared(run: Path, collective: Collective) -> None:
    """Collective. Checkpoints are written by all ranks into one folder, so all must see the one that rank zero made."""
    unseen = [0.0] * collective.world_size
    unseen[collective.rank] = float(not (run / folder.CONFIG).exists())
    blind = [rank for rank, missing in enumerate(collective.sum(unseen)) if missing]
    if blind:
        raise RunFolderError(
            f"rank {', '.join(map(str, blind))} does not see the run's folder {run}, which rank 0 writes: "
            "put run.dir (or --run-dir) on storage that all nodes share"
        )


def refuse_another_run(meta: Mapping[str, Any], path: Path, *, seed: int, dataset_size: int) -> None:
    """Raises ``CheckpointError`` where the samples that the checkpoint at ``path`` has seen were of another stream."""
    for key, now in (("seed", seed), ("dataset_size", dataset_size)):
        if meta[key] != now:
            raise CheckpointError(
                f"checkpoint {path} was written with {key} {meta[key]}, and it is {now} now: the sample stream "
                "would be another one; resume with the same data and seed, or begin a new run"
            )


def changes_of_config(meta: Mapping[str, Any], path: Path, config: RunConfig) -> list[Difference]:
    """What is told of how ``config`` differs from that of the checkpoint at ``path``.

    Raises ``ConfigError`` for what the run cannot go on with.
    """
    before = meta.get("config")
    if before is None:  # of a version that did not keep it
        return []
    found = differences(before, config)
    refuse_changes(found, accepted=config.recovery.accept_changed, source=str(path))
    return [difference for difference in found if difference.is_told or difference.refused]


def of_another_version(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the metadata of checkpoint {path} is of another version of Groundswell ({type(error).__name__}: {error}); "
        "resume with the version that wrote it, or begin a new run"
    )


def events_of_another_version(run: Path, error: Exception) -> RunFolderError:
    return RunFolderError(
        f"{run / folder.EVENTS} holds an event of another version of Groundswell ({type(error).__name__}: {error}); "
        "resume with the version that wrote it, or begin a new run"
    )
