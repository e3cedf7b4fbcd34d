"""On what does a run compute: how many workers, how samples are read, what it saves, survives and may cost?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.config.section import Broken, Section, refuse
from orchestrator.config.suggestions import nearest

# Changes of these keys are refused when a run goes on, unless they are accepted by name: whoever makes them may know
# that model and samples are still the same.
ACCEPTABLE: Mapping[str, str] = {
    "task.name": "it says what is trained",
    "task.options": "they may change the model or the samples",
    "data.seed_each_sample": "augmentation would be drawn otherwise",
}


class WorkersSection(Section):
    """How many workers train, and when more are asked for."""

    initial: int = Field(default=1, ge=1, description="[workers] that training begins with")
    min: int = Field(default=1, ge=1, description="[workers] the fewest that training goes on with")
    max: int = Field(default=1, ge=1, description="[workers] the most that are ever asked for")
    micro_batches_each: int = Field(
        default=2, ge=1, description="[micro-batches] a further worker is asked for when each would get so many"
    )
    when: Literal["saves_time", "always", "never"] = Field(
        default="saves_time", description="[name] ask when it saves more time than a resize costs, always, or never"
    )
    resize: Literal["live", "restart"] = Field(
        default="live", description="[name] workers come and go while the others train, or all are started again"
    )
    resize_cost_s: float = Field(
        default=10.0, ge=0, description="[s] what a resize is taken to cost until one was measured"
    )
    patience_s: float = Field(
        default=600.0, gt=0, description="[s] after which workers that do not come are given up; below min the run ends"
    )
    retry_samples: int | None = Field(
        default=None,
        ge=1,
        description="[samples] until workers that were given up are asked for again; null: not before workers restart",
    )
    cpus_per_worker: float = Field(default=1.0, gt=0, description="[CPU cores] reserved for each worker")
    gpus_per_worker: float = Field(
        default=0.0, ge=0, description="[GPUs] reserved for each worker; 0 trains on the CPU"
    )
    threads: int = Field(default=1, ge=1, description="[threads] that torch computes with in each worker")

    @model_validator(mode="after")
    def _rules(self) -> WorkersSection:
        broken = []
        if self.initial < self.min:
            rule, fix = f"fewer than workers.min, {self.min}", f"write {self.min} or more, or lower workers.min"
            broken.append(Broken(keys=("initial", "min"), value=self.initial, rule=rule, fix=fix))
        if self.max < self.initial:
            rule = f"fewer than workers.initial, {self.initial}"
            fix = f"write {self.initial} or more, or begin with fewer workers"
            broken.append(Broken(keys=("max", "initial"), value=self.max, rule=rule, fix=fix))
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            rule = "above one, GPUs are reserved whole"
            fix = f"write {math.ceil(self.gpus_per_worker)}"
            broken.append(Broken(keys=("gpus_per_worker",), value=self.gpus_per_worker, rule=rule, fix=fix))
        refuse(broken)
        return self


class DataSection(Section):
    """How samples are read."""

    loader_workers: int = Field(
        default=0,
        ge=0,
        description="[processes] that read samples ahead, for each worker; 0 reads in the worker itself",
    )
    prefetch: int = Field(default=2, ge=1, description="[micro-batches] read ahead by each loader process")
    pin_memory: bool = Field(default=False, description="[true or false] faster copies from the host to a GPU")
    seed_each_sample: bool = Field(
        default=True, description="[true or false] augmentation draws from the seed and the sample's position"
    )


class CheckpointSection(Section):
    """When all that a run needs to go on is saved."""

    every_samples: int | None = Field(
        default=None, ge=1, description="[samples] between two checkpoints; null: at the end only"
    )
    keep: int = Field(default=2, ge=1, description="[checkpoints] the newest so many are kept")
    asynchronous: bool = Field(
        default=True,
        description="[true or false] regular ones are copied to host memory and written while training goes on",
    )


class RecoverySection(Section):
    """What a run survives."""

    max_failures: int = Field(
        default=3, ge=0, description="[failures] a run goes on from its last checkpoint so often; 0: never"
    )
    hang_timeout_s: float | None = Field(
        default=600.0,
        gt=0,
        description="[s] a worker that does nothing for so long, while others wait for it, is given up; null: never",
    )
    storage_patience_s: float = Field(
        default=1800.0,
        ge=0,
        description="[s] a run whose folder cannot be written goes on for so long, then stops with what can be saved",
    )
    accept_changed: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="[list of keys] task.name, task.options or data.seed_each_sample: go on though they are others now",
    )

    @model_validator(mode="after")
    def _rules(self) -> RecoverySection:
        broken = []
        for i, key in enumerate(self.accept_changed):
            if any(key == known or key.startswith(f"{known}.") for known in ACCEPTABLE):
                continue
            near = nearest(key, ACCEPTABLE)
            fix = f"did you mean {near}?" if near else f"write one of {', '.join(ACCEPTABLE)}"
            rule = "is no key whose change can be accepted: others may change anyway, or cannot at all"
            broken.append(Broken(keys=("accept_changed", str(i)), value=key, rule=rule, fix=fix))
        refuse(broken)
        return self


class BudgetSection(Section):
    """What the run may cost, all of its attempts together; it ends in order before that is used up."""

    worker_hours: float | None = Field(
        default=None, gt=0, description="[worker-hours] that may be used, from a worker's start to its end"
    )
    money: float | None = Field(
        default=None, gt=0, description="[any currency] that may be spent, at the price of a worker-hour"
    )
    price_per_worker_hour: float | None = Field(
        default=None, gt=0, description="[money] what an hour of a worker costs, in the currency of budget.money"
    )

    @model_validator(mode="after")
    def _rules(self) -> BudgetSection:
        if (self.money is None) == (self.price_per_worker_hour is None):
            return self
        given, missing = "money", "price_per_worker_hour"
        fix = "write price_per_worker_hour as well, or worker_hours instead"
        if self.money is None:
            given, missing = missing, given
            fix = "write money as well, or leave it out"
        rule = f"money and the price of a worker-hour go together, and {missing} is not given"
        refuse([Broken(keys=(given, missing), value=getattr(self, given), rule=rule, fix=fix)])
        return self

    @property
    def limit_worker_hours(self) -> float | None:
        """The tighter of the two, or ``None`` where there is no budget."""
        limits = [] if self.worker_hours is None else [self.worker_hours]
        if self.money is not None and self.price_per_worker_hour is not None:
            limits.append(self.money / self.price_per_worker_hour)
        return min(limits, default=None)
