"""``TorchTrainer`` with the adaptive scaling policy in the place of Ray's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig as RayRunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError

from orchestrator.config import RunConfig
from orchestrator.errors import GroundswellError
from orchestrator.ray_train import seam
from orchestrator.ray_train.policy import AdaptiveScalingPolicy
from orchestrator.ray_train.worker import run_worker
from orchestrator.runtime.preparation import from_anywhere, prepare, run_folder

logger = logging.getLogger(__name__)

DEFAULT_TRAIN = "orchestrator.train:train"
_RAYS_LIST = "checkpoint_manager_snapshot.json"


class AdaptiveTrainer(TorchTrainer):
    """Trains ``config`` under Ray Train; ``train`` names the function that each worker runs.

    ``train`` is ``module:function``, called as ``function(config, worker, resume=True)`` and importable on the workers.
    Needs an initialised Ray. Raises ``RunFolderError`` for a run that exists, unless ``resume``.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        train: str = DEFAULT_TRAIN,
        resume: bool = False,
        answer_delay_s: float = 0.0,
        worker_runtime_env: dict[str, Any] | None = None,
    ) -> None:
        # Workers run in folders of their own, so the run's must not depend on the current one.
        config = from_anywhere(config)
        # Ray's own list of checkpoints is behind our store, which may have deleted what it names: once a controller was
        # killed, Ray would refuse the folder.
        (prepare(config, resume=resume) / _RAYS_LIST).unlink(missing_ok=True)
        self._changed = seam.changes()
        self._falls_back = _why_not_live(config, self._changed) if config.workers.resize == "live" else None
        if self._falls_back is not None:
            logger.info("workers.resize: restart, for %s", self._falls_back)
            config = config.model_copy(update={"workers": config.workers.model_copy(update={"resize": "restart"})})
        self._groundswell = config
        self._answer_delay_s = answer_delay_s
        workers = config.workers
        resources = {"CPU": float(workers.cpus_per_worker)}
        if workers.gpus_per_worker:
            resources["GPU"] = float(workers.gpus_per_worker)
        super().__init__(
            run_worker,
            train_loop_config={"config": config.model_dump(mode="json"), "train": train},
            torch_config=TorchConfig() if workers.resize == "restart" else _live_torch_config(),
            scaling_config=ScalingConfig(
                num_workers=(workers.min, workers.max),
                use_gpu=workers.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=RayRunConfig(
                name=config.run.name,
                storage_path=str(run_folder(config).parent),
                failure_config=FailureConfig(max_failures=config.recovery.max_failures),
                # Our store alone deletes; Ray is only told where the checkpoints are.
                checkpoint_config=CheckpointConfig(num_to_keep=None),
                worker_runtime_env=worker_runtime_env,
            ),
        )

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["scaling_policy"] = AdaptiveScalingPolicy(
            self.scaling_config,
            self._groundswell,
            answer_delay_s=self._answer_delay_s,
            falls_back=self._falls_back,
        )
        kwargs["failure_policy"] = _FailurePolicy(self.run_config.failure_config)
        if self._changed:
            return super()._initialize_and_run_controller(**kwargs)
        from orchestrator.ray_train.controller import Controller, LiveController, in_the_seat

        with in_the_seat(LiveController if self._groundswell.workers.resize == "live" else Controller):
            return super()._initialize_and_run_controller(**kwargs)


def _why_not_live(config: RunConfig, changed: Sequence[str]) -> str | None:
    if config.train.parallel == "fsdp2":
        return "train.parallel is fsdp2, where no worker has the whole state that another one would need"
    if changed:
        return f"this release of Ray Train is not as expected: {'; '.join(changed)}"
    return None


def _live_torch_config() -> TorchConfig:
    # Not imported above: it needs what ``seam`` has just found to be there.
    from orchestrator.ray_train.controller import LiveTorchConfig

    return LiveTorchConfig()


class _FailurePolicy(DefaultFailurePolicy):
    """Ray's, but an error that would come again by itself (a broken task, a loss that is not a number) ends the run."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if own_error(training_failed_error) is not None:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def own_error(error: BaseException) -> GroundswellError | None:
    """The error of ours that made Ray Train fail, if one did."""
    for failure in (*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)):
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, GroundswellError):
                return cause
            cause = getattr(cause, "_base_exc", None) or getattr(cause, "cause", None) or cause.__cause__
    return None
