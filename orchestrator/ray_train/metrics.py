"""What Prometheus can read of a run, through Ray's own metrics: each is listed here, with its meaning.

Ray exports them from every node as ``ray_`` and the name; counters end in ``_total`` there. Each carries the tag
``run``, and Ray's own (WorkerId, NodeAddress and others).

Seen of Ray 2.60: a gauge is exported once for each time it was set, and is gone two report intervals (2 x 10 s) later.
So a thread sets each that is known twice a second, whatever a step takes, a value that is no more known goes by itself,
and so do all of a worker that died or was replaced; NaN is never exported. A counter stays as long as its node does,
one for each worker, so that queries add them up. Setting a gauge takes 1.5 microseconds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, final

from ray.util.metrics import Counter, Gauge

from orchestrator.config import RunConfig
from orchestrator.core.goodput import efficiency
from orchestrator.runtime import folder
from orchestrator.runtime.preparation import run_folder
from orchestrator.types import Verdict

_EVERY_S = 0.5  # twice in the shortest report interval that Ray knows

# What rank zero knows of the newest step.
STEP_GAUGES: Mapping[str, str] = {
    "groundswell_noise_scale_samples": "gradient noise scale, tr(Sigma) / |G|^2",
    "groundswell_noise_scale_low_samples": "low end of its interval",
    "groundswell_noise_scale_high_samples": "high end of its interval; absent where it has none",
    "groundswell_global_batch_samples": "samples in an optimizer step",
    "groundswell_micro_batch_samples": "the most samples in one forward pass",
    "groundswell_accumulation_steps": "micro-batches that the busiest worker sums in a step",
    "groundswell_learning_rate": "what the optimizer stepped with",
    "groundswell_loss": "mean over the samples of the step",
    "groundswell_statistical_efficiency_ratio": "what a sample is worth beside one at batch.initial B0: "
    "(S + B0) / (S + B) at noise scale S and batch B",
    "groundswell_throughput_samples_per_second": "samples trained on in a second",
    "groundswell_samples_seen": "since the run began; goes back to the last checkpoint after a fault",
    "groundswell_samples_planned": "samples seen at which the run ends",
}
VERDICT = "groundswell_verdict"
CHECKPOINT = "groundswell_checkpoint_timestamp_seconds"
USED, LEFT = "groundswell_budget_used_worker_hours", "groundswell_budget_left_worker_hours"
WANTED, PRESENT = "groundswell_workers_wanted", "groundswell_workers_present"
OTHER_GAUGES: Mapping[str, str] = {
    VERDICT: "1 for what the noise estimate is worth, 0 for the other values of the tag verdict",
    CHECKPOINT: "Unix time of the newest checkpoint; its age is time() less this",
    USED: "of the run's budget, as of its last tenth; absent before the first, and without a budget",
    LEFT: "of the run's budget, as of its last tenth; absent before the first, and without a budget",
    WANTED: "workers that the controller asks the cluster for",
    PRESENT: "workers that train; 0 while none do",
}
DECISIONS, RESIZES = "groundswell_decisions", "groundswell_resizes"
PAUSES, FAULTS = "groundswell_resize_pause_seconds", "groundswell_faults"
COUNTERS: Mapping[str, str] = {
    DECISIONS: "decisions, by the tag outcome: grow, shrink or keep",
    RESIZES: "changes of the number of workers",
    PAUSES: "time that resizes took of training: from the word to hold until the new workers were ready, or, live, "
    "until the new group was formed",
    FAULTS: "workers that failed while the others went on, and worker groups that failed and were started again",
}


def exported_names() -> dict[str, str]:
    """Each metric as Prometheus sees it, with its meaning."""
    gauges = {f"ray_{name}": meaning for name, meaning in {**STEP_GAUGES, **OTHER_GAUGES}.items()}
    return gauges | {f"ray_{name}_total": meaning for name, meaning in COUNTERS.items()}


@final
class RunMetrics:
    """``orchestrator.ports.Tracker`` on rank zero: what its steps and events say."""

    name = "prometheus"

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._gauges = {name: _gauge(name, config) for name in (*STEP_GAUGES, CHECKPOINT, USED, LEFT)}
        self._verdict = _gauge(VERDICT, config, tag="verdict")
        self._decisions = _counter(DECISIONS, config, tag="outcome")
        self._resizes, self._pauses = _counter(RESIZES, config), _counter(PAUSES, config)
        self._target: int | None = None
        self._row: Mapping[str, Any] | None = None
        self._kept: dict[str, float] = {}  # gauges that events tell of
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="groundswell-metrics", daemon=True)
        self._thread.start()

    def step(self, row: Mapping[str, Any]) -> None:
        self._row = row

    def event(self, row: Mapping[str, Any]) -> None:
        kind = row["kind"]
        kept = dict(self._kept)  # replaced as a whole, for the thread reads it
        if kind in ("started", "resumed"):
            kept |= {"groundswell_samples_planned": row["total_samples"], **self._saved(row["checkpoint"])}
            self._target = row["global_batch"]
        elif kind == "checkpoint":
            kept[CHECKPOINT] = row["time"]
        elif kind == "budget":
            kept |= {
                name: row[key] for name, key in ((USED, "used_worker_hours"), (LEFT, "left_worker_hours")) if key in row
            }
        elif kind == "decision":
            self._decisions.inc(tags={"outcome": self._outcome(row)})
        elif kind == "resize":
            self._resizes.inc()
            if row["cost_s"]:  # unknown where a fault came between
                self._pauses.inc(row["cost_s"])
        self._kept = kept

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """The task's metrics have names of its own; the run's folder and the trackers have them."""

    def groups(self, row: Mapping[str, Any]) -> None:
        """A series a layer would be too many."""

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _outcome(self, decision: Mapping[str, Any]) -> str:
        if "effective_step" not in decision:  # what is kept is the batch in force, beside which a larger may be coming
            return "keep"
        before, self._target = self._target, decision["target_batch"]
        return "grow" if before is None or self._target > before else "shrink"

    def _saved(self, checkpoint: str | None) -> dict[str, float]:
        """When the checkpoint that a run resumes from was written."""
        events = run_folder(self._config) / folder.EVENTS
        times = [row["time"] for row in folder.rows(events) if checkpoint is not None and row.get("path") == checkpoint]
        return {CHECKPOINT: times[-1]} if times else {}

    def _run(self) -> None:
        while not self._closed.wait(_EVERY_S):
            self._publish()

    def _publish(self) -> None:
        values = {**self._kept, **({} if self._row is None else self._of_step(self._row))}
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._gauges[name].set(value)
        if self._row is not None:
            for verdict in Verdict:
                self._verdict.set(float(verdict.value == self._row["verdict"]), tags={"verdict": verdict.value})

    def _of_step(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        noise_scale, batch = row["noise_scale"], row["global_batch"]
        worth = None if noise_scale is None else efficiency(noise_scale, batch, base_batch=self._config.batch.initial)
        return {
            "groundswell_noise_scale_samples": noise_scale,
            "groundswell_noise_scale_low_samples": row["noise_low"],
            "groundswell_noise_scale_high_samples": row["noise_high"],
            "groundswell_global_batch_samples": batch,
            "groundswell_micro_batch_samples": row["micro_batch"],
            "groundswell_accumulation_steps": row["accum_steps"],
            "groundswell_learning_rate": row["lr"],
            "groundswell_loss": row["loss"],
            "groundswell_statistical_efficiency_ratio": worth,
            "groundswell_throughput_samples_per_second": row["samples_per_s"],
            "groundswell_samples_seen": row["samples_seen"],
        }


@final
class FleetMetrics:
    """What Ray Train's controller process knows, also while no worker is there.

    Made where the trainer is, and sent to that process before it is used: Ray's metrics would not survive the way.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._gauges: dict[str, Gauge] = {}
        self._faults: Counter | None = None

    def workers(self, *, wanted: int, present: int) -> None:
        """To be called again and again: a gauge that is not set is gone after two report intervals."""
        for name, value in ((WANTED, wanted), (PRESENT, present)):
            if name not in self._gauges:
                self._gauges[name] = _gauge(name, self._config)
            self._gauges[name].set(float(value))

    def faults(self, number: int = 1) -> None:
        if self._faults is None:
            self._faults = _counter(FAULTS, self._config)
        if number:
            self._faults.inc(float(number))


def _gauge(name: str, config: RunConfig, *, tag: str | None = None) -> Gauge:
    meaning = {**STEP_GAUGES, **OTHER_GAUGES}[name]
    return Gauge(name, meaning, ("run",) if tag is None else ("run", tag)).set_default_tags({"run": config.run.name})


def _counter(name: str, config: RunConfig, *, tag: str | None = None) -> Counter:
    keys = ("run",) if tag is None else ("run", tag)
    return Counter(name, COUNTERS[name], keys).set_default_tags({"run": config.run.name})
