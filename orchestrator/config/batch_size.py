"""How large may the global batch be, and how is the noise measured that it follows?"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from orchestrator.config.section import Broken, NameOf, Section, refuse

ESTIMATORS = ("micro_batch", "per_example", "norm_layers", "split")
# Of the bundled language model (LR constant) the slope fell 1.8-fold after 4,096 samples, and by 8 % after this many.
CALIBRATION_SAMPLES = 8192


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
    find_micro_batch: bool = Field(
        default=False,
        description="[true or false] on a CUDA device, find before the first step the largest micro-batch that fits in "
        "memory on every worker, and take none larger; micro_batch is then the most that is tried. On the CPU, where "
        "it cannot be tried, micro_batch is taken as it is, and an event says so",
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

    estimator: Annotated[str, AfterValidator(NameOf(ESTIMATORS, "an estimator"))] = Field(
        default="micro_batch",
        description="[name] what gradients are compared: micro_batch, those of all micro-batches of a step; "
        "per_example, those of all samples (least noise, and one micro-batch is enough; a step takes up to a quarter "
        "longer, and only layers that are known can be read); norm_layers, the same of normalisation layers alone, "
        "once calibration_samples have told what these say of the whole (next to no cost then); split, those of "
        "halves: batch.micro_batch is halved, rounded up, so that there are always two (another micro-batch list, at "
        "the cost of more and smaller passes; the workers asked for stay the same, but for policy goodput); or "
        "module:factory",
    )
    calibration_samples: int | None = Field(
        default_factory=lambda given: CALIBRATION_SAMPLES if given.get("estimator") == "norm_layers" else None,
        ge=1,
        description="[samples] estimator norm_layers: so many, from the run's first on, are measured per example as "
        "well, and the second half of them says what the normalisation layers tell of the whole",
    )
    every_steps: int = Field(default=1, ge=1, description="[steps] from one measured step to the next")
    groups: Literal["none", "layers", "parameter_groups"] = Field(
        default="none",
        description="[name] also write the noise scale of each layer, or of each of the optimizer's parameter groups",
    )
    preconditioned: bool = Field(
        default=False, description="[true or false] adam, adamw: also write the noise scale in the optimizer's metric"
    )
    curvature_every_samples: int | None = Field(
        default=None,
        ge=1,
        description="[samples] between two measurements of the noise scale weighted by the loss's Hessian; each costs "
        "as much as some 300 micro-batches; null: never",
    )
    leave_out: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="[list of module paths] estimators per_example, norm_layers: what lies in these modules is trained "
        "and not measured; noise scale and gradient are then those of all the rest",
    )

    @model_validator(mode="after")
    def _rules(self) -> MeasureSection:
        broken, unused = [], f"estimator {self.estimator} does not use it"
        if self.leave_out and self.estimator in ("micro_batch", "split"):
            fix = "remove it, or write estimator: per_example"
            broken.append(Broken(keys=("leave_out", "estimator"), value=self.leave_out, rule=unused, fix=fix))
        samples = self.calibration_samples
        if samples is not None and self.estimator != "norm_layers":
            fix = "remove it, or write estimator: norm_layers"
            broken.append(Broken(keys=("calibration_samples", "estimator"), value=samples, rule=unused, fix=fix))
        refuse(broken)
        return self
