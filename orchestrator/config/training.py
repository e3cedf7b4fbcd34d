"""Which run is it, what does it train, for how long, and how often is it tried?"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from orchestrator.config.places import is_url, place_of_runs
from orchestrator.config.section import Broken, NameOf, Section, refuse

TASKS = ("digits", "char_lm")

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _run_name(name: str) -> str:
    if _RUN_NAME.fullmatch(name):
        return name
    rule = "must be a plain file name of at most 100 letters, digits, '.', '_' and '-', not beginning with a sign"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100]
    fix = f"write {plain}; run.dir says in which folder the run lies" if plain else "write a name such as my-run"
    refuse([Broken(keys=(), value=name, rule=rule, fix=fix)])
    return name


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Only plain data may pass, else the resolved file could not be read again to the same options."""

    def broken(value: Any, path: tuple[str, ...]) -> list[Broken]:
        if isinstance(value, dict):
            odd = [k for k in value if not isinstance(k, str)]
            if odd:
                rule = f"option names must be text, and {odd[0]!r} is {type(odd[0]).__name__}"
                return [Broken(keys=(".".join(path),), value=odd[0], rule=rule, fix=f'write "{odd[0]}" in quotes')]
            return [b for k, v in value.items() for b in broken(v, (*path, k))]
        if isinstance(value, list):
            return [b for i, v in enumerate(value) for b in broken(v, (*path, str(i)))]
        if isinstance(value, float) and not math.isfinite(value):
            return [Broken(keys=(".".join(path),), value=value, rule="must be finite", fix="leave the option out")]
        if value is None or type(value) in (bool, int, float, str):
            return []
        rule = f"options are plain data (text, numbers, true, false, null, lists, mappings), not {type(value).__name__}"
        return [Broken(keys=(".".join(path),), value=str(value), rule=rule)]

    refuse(broken(options, ()))
    return options


class RunSection(Section):
    """Which run this is, and where it is kept."""

    name: Annotated[str, AfterValidator(_run_name)] = Field(
        description="[name] the run's folder inside run.dir; the config file's own name when left out"
    )
    dir: Annotated[str, AfterValidator(place_of_runs)] = Field(
        default="runs",
        min_length=1,
        description="[path or URL] what holds all runs: a folder that all nodes see, or s3://bucket/runs and its like",
    )
    scratch: str | None = Field(
        default=None,
        min_length=1,
        description="[path] with a URL: where each node works; null: below the folder for temporary files",
    )
    upload_patience_s: float = Field(
        default=120.0,
        gt=0,
        description="[s] with a URL: an end waits for the last uploads until none has moved for so long",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="[number] where all randomness begins: weights, order of data, dropout"
    )

    @model_validator(mode="after")
    def _rules(self) -> RunSection:
        if self.scratch is not None and not is_url(self.dir):
            rule, fix = "only a run that is kept at a URL has one", "remove it; the run's folder is below run.dir"
            refuse([Broken(keys=("scratch", "dir"), value=self.scratch, rule=rule, fix=fix)])
        return self


class TaskSection(Section):
    """What is trained."""

    name: Annotated[str, AfterValidator(NameOf(TASKS, "a task"))] = Field(
        description="[name] digits, char_lm, or package.module:factory for a task of your own"
    )
    options: Annotated[dict[str, Any], AfterValidator(_plain_options)] = Field(
        default_factory=dict, description="[mapping] given to the task's factory by name; the task says which it knows"
    )


class TrainSection(Section):
    """How long, and how a step is computed."""

    samples: int | None = Field(
        default=None, ge=1, description="[samples] train on so many, then stop; give this or epochs"
    )
    epochs: int | None = Field(
        default=None, ge=1, description="[epochs] train so often on every sample, then stop; give this or samples"
    )
    max_grad_norm: float | None = Field(
        default=None, gt=0, description="[gradient norm] a longer gradient is cut to this length; null: never"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="[name] fp32, or bf16 for automatic mixed precision in bfloat16"
    )
    ema_half_life_samples: int | None = Field(
        default=None,
        ge=1,
        description="[samples] evaluate with an average of the weights that fades by half over so many; null: without",
    )
    reproducible: bool = Field(
        default=False,
        description="[true or false] weights to the last bit the same on any number of workers; somewhat slower",
    )
    parallel: Literal["ddp", "fsdp2"] = Field(
        default="ddp",
        description="[name] ddp, every worker has the whole model; fsdp2, each a shard of weights, gradients and "
        "optimizer state, gathered part by part for each micro-batch (torch.distributed.fsdp.fully_shard): for models "
        "too large for one device, and slower for others",
    )
    find_unused_parameters: bool = Field(
        default=False, description="[true or false] whether a step may leave parameters without a gradient; slower"
    )

    @model_validator(mode="after")
    def _rules(self) -> TrainSection:
        if self.samples is not None and self.epochs is not None:
            fix = "remove one of them"
            refuse([Broken(keys=("epochs", "samples"), value=self.epochs, rule="samples is given as well", fix=fix)])
        if self.samples is None and self.epochs is None:
            rule = "how long to train must be given, once, as samples or as epochs"
            refuse([Broken(keys=("samples", "epochs"), value=None, rule=rule, fix="write train.epochs: 10")])
        return self


class EvaluationSection(Section):
    """When the held-out samples are tried."""

    every_samples: int | None = Field(
        default=None, ge=1, description="[samples] between two evaluations; null: at the end only"
    )
