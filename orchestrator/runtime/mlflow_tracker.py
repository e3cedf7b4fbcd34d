"""A run in MLflow: curves against samples seen, the resolved config as parameters, decisions, and how it ended.

MLflow finds its server, and who we are there, in its own environment variables.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, final

from orchestrator.config import RunConfig
from orchestrator.runtime.scalars import evaluation_scalars, group_scalars, step_scalars

_ENDINGS = {"finished": "FINISHED", "stopped": "KILLED", "fault": "FAILED"}
_AT_ONCE = 100  # parameters in one request; MLflow refuses more
_LONGEST_PARAMETER, _LONGEST_TAG = 6000, 5000  # characters that MLflow stores


@final
class MlflowTracker:
    """``orchestrator.runtime.queued_tracker.ServiceTracker``; ``run_id`` is that of an earlier attempt, if any.

    A curve's x-axis, MLflow's ``step``, is samples seen; the optimizer's steps are the curve ``train/step``.
    """

    name = "mlflow"

    def __init__(self, config: RunConfig, *, run_id: str | None) -> None:
        from mlflow.tracking import MlflowClient

        tracking = config.tracking
        assert tracking.mlflow_experiment is not None, "no MLflow without an experiment"
        self._client: Any = MlflowClient()
        self._ending: str | None = None
        if run_id is None:
            experiment = self._experiment(tracking.mlflow_experiment)
            named = tracking.run_name or config.run.name
            created = self._client.create_run(experiment, run_name=named, tags=dict(tracking.tags))
            self.run_id: str = created.info.run_id
        else:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
        self.address: str | None = None  # the server's would be in the environment, perhaps with a password in it
        self._write_parameters(flat(config.model_dump(mode="json")))

    def step(self, row: Mapping[str, Any]) -> None:
        self._log({**step_scalars(row), "train/step": row["step"]}, row)

    def event(self, row: Mapping[str, Any]) -> None:
        kind = row["kind"]
        if kind == "decision":
            self._log({"decision/target_batch": row["target_batch"]}, row)
            self._tag("decision", row["reason"])
        elif kind in _ENDINGS:
            self._ending = _ENDINGS[kind]
            self._tag("ending", f"{kind}: {row['reason']}")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._log(evaluation_scalars(row), row)

    def groups(self, row: Mapping[str, Any]) -> None:
        self._log(group_scalars(row), row)

    def close(self) -> None:
        """Without an ending the run stays open: a resize, after which another process goes on with it."""
        if self._ending is not None:
            self._client.set_terminated(self.run_id, status=self._ending)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        created: str = found.experiment_id if found is not None else self._client.create_experiment(name)
        return created

    def _write_parameters(self, parameters: Mapping[str, str]) -> None:
        """MLflow keeps a parameter as first written; what a resumed run has otherwise becomes a tag."""
        from mlflow.entities import Param

        kept: Mapping[str, str] = self._client.get_run(self.run_id).data.params
        new = [Param(name, value) for name, value in parameters.items() if name not in kept]
        for first in range(0, len(new), _AT_ONCE):
            self._client.log_batch(self.run_id, params=new[first : first + _AT_ONCE])
        for name, value in parameters.items():
            if name in kept and kept[name] != value:
                self._tag(f"resumed_with.{name}", value)

    def _log(self, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        at_ms = int(1000 * row.get("time", time.time()))
        metrics = [Metric(_plain(name), float(value), at_ms, row["samples_seen"]) for name, value in scalars.items()]
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)

    def _tag(self, name: str, text: str) -> None:
        self._client.set_tag(self.run_id, f"groundswell.{name}", text[:_LONGEST_TAG])


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys as dotted ones; keys that are ``None`` were not given."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[_plain(f"{prefix}{key}")] = str(value)[:_LONGEST_PARAMETER]
    return found


def _plain(name: str) -> str:
    """``name`` as MLflow allows it: letters, digits, and ``_-./ :``."""
    return "".join(char if char.isalnum() or char in "_-./ :" else "_" for char in name)
