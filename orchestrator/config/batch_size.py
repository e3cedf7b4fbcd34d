"""How large is the global batch: its limits, how the noise is measured, and how the target is decided?"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from orchestrator.config.section import Broken, Section, default_of, name_of, refuse

POLICIES = ("fixed", "schedule", "noise_scale")


class BatchSection(Section):
    """The global batch: where it begins, and its limits."""

    initial: int = Field(ge=1, description="[samples] global batch that training begins with")
    micro_batch: int = Field(
        ge=1, description="[samples] the most that one device takes in one forward pass; larger batches accumulate"
    )
    max: int = Field(
        default_factory=lambda given: given["initial"],
        ge=1,
        description="[samples] ceiling of the global batch; the same as initial when left out",
    )
    min: int = Field(
        default_factory=lambda given: given["initial"],
        ge=1,
        description="[samples] floor of the global batch when it may shrink; the same as initial when left out",
    )

    @model_validator(mode="after")
    def _rules(self) -> BatchSection:
        broken = []
        if self.max < self.initial:
            rule = f"the ceiling is below batch.initial, {self.initial}"
            fix = f"write {self.initial} or more, or begin with a smaller batch"
            broken.append(Broken(keys=("max", "initial"), value=self.max, rule=rule, fix=fix))
        elif self.micro_batch > self.max:
            rule = f"no batch is ever that large: batch.max is {self.max}"
            fix = f"write {self.max} or less, or raise batch.max"
            broken.append(Broken(keys=("micro_batch", "max"), value=self.micro_batch, rule=rule, fix=fix))
        if self.min > self.initial:
            rule = f"the floor is above batch.initial, {self.initial}"
            fix = f"write {self.initial} or less, or begin with a larger batch"
            broken.append(Broken(keys=("min", "initial"), value=self.min, rule=rule, fix=fix))
        refuse(broken)
        return self


class MeasureSection(Section):
    """How the gradient noise is measured."""

    estimator: Literal["micro_batch"] = Field(
        default="micro_batch", description="[name] what gradients are compared: those of all micro-batches of a step"
    )
    every_steps: int = Field(default=1, ge=1, description="[steps] from one measured step to the next")


_RampEntry = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)]


class ControllerSection(Section):
    """How the target batch is decided."""

    mode: Literal["act", "advise"] = Field(
        default="act", description="[name] act, or advise: measure and say what would be done, but never do it"
    )
    policy: Annotated[str, AfterValidator(name_of(POLICIES, "a policy"))] = Field(
        default="noise_scale", description="[name] fixed, schedule (the ramp), noise_scale, or module:attribute"
    )
    every_samples: int = Field(default=1024, ge=1, description="[samples] between two decisions")
    lag_steps: int = Field(
        default=4, ge=1, description="[steps] a decision takes effect so much later, on every worker at once"
    )
    cooldown_samples: int = Field(
        default=12288, ge=0, description="[samples] after a change, the next one waits at least so long"
    )
    deadband: float = Field(
        default=1.5, ge=1, description="[ratio] a wish nearer than this to the present batch changes nothing"
    )
    max_growth: float = Field(
        default=2.0, gt=1, description="[ratio] the most that one decision multiplies the batch by"
    )
    kappa: float = Field(default=1.0, gt=0, description="[ratio] target batch = kappa x noise scale")
    shrink: bool = Field(default=False, description="[true or false] whether the batch may become smaller again")
    ramp: Annotated[tuple[_RampEntry, ...], Field(strict=False)] | None = Field(
        default_factory=default_of({}),
        description="[list of samples, batch] policy schedule: from so many samples seen on, this batch",
    )
    half_life_samples: int = Field(
        default=2048, ge=1, description="[samples] after so many, a measurement counts half in the average"
    )
    confidence: float = Field(
        default=0.95, gt=0, lt=1, description="[fraction] of the noise scale's interval; 0.95 is usual"
    )

    @model_validator(mode="after")
    def _rules(self) -> ControllerSection:
        broken = []
        ramp = self.ramp or ()
        if self.policy == "schedule" and not ramp:
            fix = "write ramp: [[20000, 64], [40000, 128]], samples seen and batch"
            rule = "policy schedule needs a ramp"
            broken.append(Broken(keys=("ramp", "policy"), value=self.ramp, rule=rule, fix=fix))
        elif self.policy != "schedule" and self.ramp is not None:
            fix = "remove it, or write policy: schedule"
            rule = f"policy {self.policy} does not use a ramp"
            broken.append(Broken(keys=("ramp", "policy"), value=self.ramp, rule=rule, fix=fix))
        if any(a[0] >= b[0] for a, b in pairwise(ramp)):
            rule = "the ramp's samples must rise from one entry to the next"
            broken.append(Broken(keys=("ramp",), value=self.ramp, rule=rule, fix="put its entries in order"))
        if not self.shrink and any(a[1] > b[1] for a, b in pairwise(ramp)):
            rule = "the ramp's batch becomes smaller, and controller.shrink is false"
            broken.append(Broken(keys=("ramp", "shrink"), value=self.ramp, rule=rule, fix="write shrink: true"))
        refuse(broken)
        return self
