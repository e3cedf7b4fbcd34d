"""Which services follow a run besides its folder? Addresses and keys are never here: the libraries' own variables."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from orchestrator.config.section import Broken, Section, refuse

_SECRET = re.compile(r"(api|access|secret|private)_?key|password|passwd|token|secret|credential", re.IGNORECASE)
_ADDRESS = re.compile(r"uri|url|host|address|endpoint|server", re.IGNORECASE)
_WITH_PASSWORD = re.compile(r"\w+://[^/\s]*:[^/\s]*@")
_HIDDEN = "(not shown)"
_VARIABLES = (
    "set MLFLOW_TRACKING_URI (and MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD), or WANDB_API_KEY (and "
    "WANDB_BASE_URL), in the environment of the workers"
)


def _no_secret(text: str) -> str:
    if _WITH_PASSWORD.search(text):
        rule = "holds a password, and a config is copied into the run's folder and to the services"
        refuse([Broken(keys=(), value=_HIDDEN, rule=rule, fix=f"take it out; {_VARIABLES}")])
    return text


def _plain_tags(tags: dict[str, str]) -> dict[str, str]:
    for name, value in tags.items():
        if _SECRET.search(name):
            rule = "is named like a secret, and a config is copied into the run's folder and to the services"
            refuse([Broken(keys=(name,), value=_HIDDEN, rule=rule, fix=f"take it out; {_VARIABLES}")])
        _no_secret(value)
    return tags


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_no_secret)]


class TrackingSection(Section):
    """Which services follow the run besides its folder; where they are, and who may, the environment says."""

    mlflow_experiment: Name | None = Field(
        default=None, description="[name] the MLflow experiment that gets the run; null: no MLflow"
    )
    wandb_project: Name | None = Field(
        default=None, description="[name] the Weights & Biases project that gets the run; null: no W&B"
    )
    wandb_entity: Name | None = Field(
        default=None, description="[name] the W&B team or user that the project belongs to; null: your own default"
    )
    run_name: Name | None = Field(default=None, description="[name] what the run is called there; null: run.name")
    tags: Annotated[dict[str, str], AfterValidator(_plain_tags)] = Field(
        default_factory=dict, description="[mapping] names and texts by which the run is found there"
    )
    every_s: float = Field(default=5.0, ge=0, description="[s] at least, between two points of a curve sent there")

    @model_validator(mode="before")
    @classmethod
    def _nothing_of_the_environment(cls, data: Any) -> Any:
        """Keys that people write here and that belong into the environment; their values are not repeated."""
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields and (_SECRET.search(str(key)) or _ADDRESS.search(str(key))):
                rule = "addresses and secrets are not in a config, which is copied into the run's folder"
                refuse([Broken(keys=(str(key),), value=_HIDDEN, rule=rule, fix=f"take it out; {_VARIABLES}")])
        return data

    @model_validator(mode="after")
    def _rules(self) -> TrackingSection:
        if self.wandb_entity is not None and self.wandb_project is None:
            rule, fix = "nothing is sent to W&B", "give wandb_project as well, or take it out"
            refuse([Broken(keys=("wandb_entity", "wandb_project"), value=self.wandb_entity, rule=rule, fix=fix)])
        return self
