"""What is a run told before it starts?

Every description opens with the unit in brackets; the words are those of the design: a *batch* is global, a *sample*
is one example, a *step* one optimizer step. ``None`` (``null``) means that a key was not given.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from orchestrator.config.batch_size import BatchSection, MeasureSection
from orchestrator.config.cluster import ClusterSection
from orchestrator.config.combinations import broken_combinations
from orchestrator.config.controlling import ControllerSection
from orchestrator.config.execution import (
    BudgetSection,
    CheckpointSection,
    DataSection,
    RecoverySection,
    WorkersSection,
)
from orchestrator.config.optimization import LrRuleSection, OptimizerSection, ScheduleSection
from orchestrator.config.section import Section, refuse
from orchestrator.config.tracking import TrackingSection
from orchestrator.config.training import EvaluationSection, RunSection, TaskSection, TrainSection


class RunConfig(Section):
    """Everything a user settles before a run; equal configs give equal decisions."""

    run: RunSection = Field(description="[section] which run this is, and where it is kept")
    task: TaskSection = Field(description="[section] what is trained")
    train: TrainSection = Field(description="[section] how long, and how a step is computed")
    batch: BatchSection = Field(description="[section] the global batch: where it begins, and its limits")
    optimizer: OptimizerSection = Field(description="[section] the optimizer, and the learning rate at batch.initial")
    schedule: ScheduleSection = Field(
        default_factory=ScheduleSection, description="[section] the learning rate over the samples seen"
    )
    lr_rule: LrRuleSection = Field(
        default_factory=LrRuleSection, description="[section] how the learning rate follows the batch"
    )
    controller: ControllerSection = Field(
        default_factory=ControllerSection, description="[section] how the target batch is decided"
    )
    measure: MeasureSection = Field(
        default_factory=MeasureSection, description="[section] how the gradient noise is measured"
    )
    workers: WorkersSection = Field(
        default_factory=WorkersSection, description="[section] how many workers train, and when more are asked for"
    )
    data: DataSection = Field(default_factory=DataSection, description="[section] how samples are read")
    evaluation: EvaluationSection = Field(
        default_factory=EvaluationSection, description="[section] when the held-out samples are tried"
    )
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection, description="[section] when all that a run needs to go on is saved"
    )
    recovery: RecoverySection = Field(default_factory=RecoverySection, description="[section] what a run survives")
    cluster: ClusterSection | None = Field(
        default=None,
        description="[section] image, pods and storage on a Kubernetes cluster; only groundswell k8s reads it",
    )
    tracking: TrackingSection = Field(
        default_factory=TrackingSection, description="[section] which services follow the run besides its folder"
    )
    budget: BudgetSection = Field(default_factory=BudgetSection, description="[section] what the run may cost")
    ledger: bool = Field(
        default=False, description="[true or false] write which samples each step consumed, to prove exactly-once"
    )

    @model_validator(mode="after")
    def _rules(self) -> RunConfig:
        refuse(broken_combinations(self))
        return self
