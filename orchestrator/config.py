"""What a run is told before it starts: frozen sections that refuse nonsense where they are built.

Every description opens with the unit in brackets; the words are those of the design: a *batch* is global, a *sample*
is one example, a *step* one optimizer step. ``None`` (``null``) means that a key was not given. Rules between two keys
are collected, so that one refusal lists all of them; they are tried once every key is right by itself.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

TASKS = ("digits", "char_lm")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "linear", "step", "wsd", "one_cycle")
LR_RULES = ("auto", "constant", "linear", "sqrt", "power", "noise_scale")
POLICIES = ("fixed", "schedule", "noise_scale")

# Which keys of a section belong to which name; a name that is imported gets whatever is given.
OPTIMIZER_KEYS: Mapping[str, frozenset[str]] = {
    "sgd": frozenset({"momentum", "nesterov"}),
    "adam": frozenset({"betas", "eps"}),
    "adamw": frozenset({"betas", "eps"}),
}
SCHEDULE_KEYS: Mapping[str, frozenset[str]] = {
    "constant": frozenset(),
    "cosine": frozenset({"final_fraction"}),
    "linear": frozenset({"final_fraction"}),
    "step": frozenset({"milestones_samples", "gamma"}),
    "wsd": frozenset({"decay_samples", "final_fraction"}),
    "one_cycle": frozenset({"start_fraction", "final_fraction"}),
}
LR_RULE_KEYS: Mapping[str, frozenset[str]] = {
    **{name: frozenset() for name in LR_RULES},
    "power": frozenset({"exponent"}),
    "noise_scale": frozenset({"exponent"}),
}

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A rule that a value breaks: dotted keys below the section it was found in, the first one to blame."""

    keys: tuple[str, ...]
    value: Any
    rule: str
    fix: str | None = None


def is_import_path(name: str) -> bool:
    """Whether ``name`` reads as ``package.module:attribute``; nothing is imported."""
    return _IMPORT_PATH.fullmatch(name) is not None and not name.partition(":")[0].endswith(".py")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``word`` was probably meant to be."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def _refuse(broken: list[Broken]) -> None:
    if broken:
        text = "; ".join(f"{'.'.join(b.keys[:1])}: {b.rule}" for b in broken)
        raise PydanticCustomError("rules", "{text}", {"text": text, "broken": tuple(broken)})


def _name_of(known: tuple[str, ...], what: str) -> Callable[[str], str]:
    """A check for fields that name something built in or something to import."""

    def check(name: str) -> str:
        if name in known or is_import_path(name):
            return name
        fix = _import_hint(name)
        if fix is None and (guess := nearest(name, known)):
            fix = f"did you mean {guess}?"
        rule = f"must be one of {', '.join(known)}, or package.module:attribute for {what} of your own"
        _refuse([Broken(keys=(), value=name, rule=rule, fix=fix)])
        return name

    return check


def _import_hint(name: str) -> str | None:
    path, colon, attribute = name.partition(":")
    if path.endswith(".py") or "/" in path:
        module = path.removesuffix(".py").strip("./").replace("/", ".")
        return f"name the module as an import does: {module}:{attribute or 'attribute'}"
    if not colon and "." in path:
        module, _, attribute = path.rpartition(".")
        return f"separate module and attribute by a colon: {module}:{attribute}"
    return None


def _run_name(name: str) -> str:
    if _RUN_NAME.fullmatch(name):
        return name
    rule = "must be a plain file name of at most 100 letters, digits, '.', '_' and '-', not beginning with a sign"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100]
    fix = f"write {plain}; run.dir says in which folder the run lies" if plain else "write a name such as my-run"
    _refuse([Broken(keys=(), value=name, rule=rule, fix=fix)])
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

    _refuse(broken(options, ()))
    return options


def _default_of(by_name: Mapping[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """A default that depends on the section's ``name``; ``None`` where the key does not belong to it."""
    return lambda given: by_name.get(given.get("name", ""))


def _foreign_keys(
    section: BaseModel, what: str, keys: Mapping[str, frozenset[str]], *, common: frozenset[str]
) -> list[Broken]:
    name: str = section.name  # type: ignore[attr-defined]  # only sections with a name are checked
    if name not in keys:
        return []
    broken = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        if value is None or key in keys[name] or key in common:
            continue
        users = [user for user in keys if key in keys[user]]
        fix = f"remove it, or choose {what} that uses it: {', '.join(users)}"
        broken.append(Broken(keys=(key, "name"), value=value, rule=f"{what} {name} does not use it", fix=fix))
    return broken


def _given(section: BaseModel, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    values = {key: getattr(section, key) for key in type(section).model_fields if key not in without}
    return {key: value for key, value in values.items() if value is not None}


class Section(BaseModel):
    """Frozen and strict; a known key that is ``None`` counts as not given."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}


class RunSection(Section):
    """Which run this is, and where it is kept."""

    name: Annotated[str, AfterValidator(_run_name)] = Field(
        description="[name] the run's folder inside run.dir; the config file's own name when left out"
    )
    dir: str = Field(
        default="runs", min_length=1, description="[path] folder, or s3://, gs:// address, that holds all runs"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="[number] where all randomness begins: weights, order of data, dropout"
    )


class TaskSection(Section):
    """What is trained."""

    name: Annotated[str, AfterValidator(_name_of(TASKS, "a task"))] = Field(
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
    find_unused_parameters: bool = Field(
        default=False, description="[true or false] whether a step may leave parameters without a gradient; slower"
    )

    @model_validator(mode="after")
    def _rules(self) -> TrainSection:
        if self.samples is not None and self.epochs is not None:
            fix = "remove one of them"
            _refuse([Broken(keys=("epochs", "samples"), value=self.epochs, rule="samples is given as well", fix=fix)])
        if self.samples is None and self.epochs is None:
            rule = "how long to train must be given, once, as samples or as epochs"
            _refuse([Broken(keys=("samples", "epochs"), value=None, rule=rule, fix="write train.epochs: 10")])
        return self


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
        _refuse(broken)
        return self


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """The optimizer, and the learning rate at batch.initial."""

    name: Annotated[str, AfterValidator(_name_of(OPTIMIZERS, "an optimizer"))] = Field(
        description="[name] sgd, adam, adamw, or package.module:attribute"
    )
    lr: float = Field(gt=0, description="[rate] learning rate at batch.initial; schedule and lr_rule multiply it")
    momentum: float | None = Field(
        default_factory=_default_of({"sgd": 0.0}), ge=0, lt=1, description="[fraction] sgd: of the last update kept"
    )
    nesterov: bool | None = Field(
        default_factory=_default_of({"sgd": False}), description="[true or false] sgd: look ahead along the momentum"
    )
    betas: Annotated[tuple[_Beta, _Beta], Field(strict=False)] | None = Field(
        default_factory=_default_of({"adam": (0.9, 0.999), "adamw": (0.9, 0.999)}),
        description="[two fractions] adam, adamw: kept of the averaged gradient and of its square",
    )
    eps: float | None = Field(
        default_factory=_default_of({"adam": 1e-8, "adamw": 1e-8}),
        gt=0,
        description="[gradient] adam, adamw: added to the root of the averaged square",
    )
    weight_decay: float | None = Field(
        default_factory=_default_of({"sgd": 0.0, "adam": 0.0, "adamw": 0.01}),
        ge=0,
        description="[rate] pull of the weights towards zero (adamw: apart from the gradient)",
    )

    @model_validator(mode="after")
    def _rules(self) -> OptimizerSection:
        broken = _foreign_keys(self, "optimizer", OPTIMIZER_KEYS, common=frozenset({"name", "lr", "weight_decay"}))
        if self.name == "sgd" and self.nesterov and not self.momentum:
            rule = "nesterov needs momentum, and optimizer.momentum is 0"
            broken.append(Broken(keys=("nesterov", "momentum"), value=True, rule=rule, fix="write momentum: 0.9"))
        _refuse(broken)
        return self

    def settings(self) -> dict[str, Any]:
        """What the optimizer's factory is given by name: every key that belongs to it, ``lr`` among them."""
        return _given(self, without=frozenset({"name"}))


class ScheduleSection(Section):
    """The learning rate over the samples seen, as a fraction of optimizer.lr."""

    name: Annotated[str, AfterValidator(_name_of(SCHEDULES, "a schedule"))] = Field(
        default="constant", description="[name] constant, cosine, linear, step, wsd, one_cycle, or module:attribute"
    )
    warmup_samples: int = Field(default=0, ge=0, description="[samples] the rate first rises over so many")
    start_fraction: float | None = Field(
        default_factory=_default_of({"one_cycle": 0.04}),
        ge=0,
        le=1,
        description="[fraction] one_cycle: of the rate that the rise begins at",
    )
    final_fraction: float | None = Field(
        default_factory=_default_of({"cosine": 0.0, "linear": 0.0, "wsd": 0.0, "one_cycle": 0.0}),
        ge=0,
        le=1,
        description="[fraction] cosine, linear, wsd, one_cycle: of the rate that is left at the end",
    )
    milestones_samples: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] | None = Field(
        default_factory=_default_of({}), description="[list of samples] step: the rate is multiplied by gamma at each"
    )
    gamma: float | None = Field(
        default_factory=_default_of({"step": 0.1}), gt=0, description="[factor] step: what each milestone multiplies by"
    )
    decay_samples: int | None = Field(
        default_factory=_default_of({}), ge=1, description="[samples] wsd: the rate falls over the last so many"
    )

    @model_validator(mode="after")
    def _rules(self) -> ScheduleSection:
        broken = _foreign_keys(self, "schedule", SCHEDULE_KEYS, common=frozenset({"name", "warmup_samples"}))
        if self.name == "step" and not self.milestones_samples:
            fix = "write milestones_samples: [20000, 40000]"
            rule = "schedule step needs at least one milestone"
            broken.append(Broken(keys=("milestones_samples", "name"), value=None, rule=rule, fix=fix))
        if self.name == "wsd" and self.decay_samples is None:
            rule, fix = "schedule wsd needs the length of its decay", "about a fifth of the run is usual"
            broken.append(Broken(keys=("decay_samples", "name"), value=None, rule=rule, fix=fix))
        if self.name == "one_cycle" and self.warmup_samples == 0:
            rule, fix = "schedule one_cycle rises first, over warmup_samples", "about a third of the run is usual"
            broken.append(Broken(keys=("warmup_samples", "name"), value=0, rule=rule, fix=fix))
        times = self.milestones_samples or ()
        if any(a >= b for a, b in pairwise(times)):
            rule = "milestones must rise from one to the next"
            fix = f"write {sorted(set(times))}"
            broken.append(Broken(keys=("milestones_samples",), value=times, rule=rule, fix=fix))
        if times and min(times) <= self.warmup_samples:
            rule = f"a milestone lies within the warm-up of {self.warmup_samples} samples"
            fix = "move it behind the warm-up, or shorten schedule.warmup_samples"
            broken.append(Broken(keys=("milestones_samples", "warmup_samples"), value=times, rule=rule, fix=fix))
        _refuse(broken)
        return self

    def settings(self) -> dict[str, Any]:
        """The schedule's name and every key that belongs to it."""
        return _given(self)


class LrRuleSection(Section):
    """How the learning rate follows the batch."""

    name: Annotated[str, AfterValidator(_name_of(LR_RULES, "a rule"))] = Field(
        default="auto",
        description="[name] auto (noise_scale for sgd, sqrt for adam, adamw), constant, linear, sqrt, power, "
        "noise_scale, or module:attribute",
    )
    exponent: float | None = Field(
        default_factory=_default_of({"noise_scale": 1.0}),
        gt=0,
        le=1,
        description="[exponent] power: of batch / batch.initial; noise_scale: of its gain (1 for sgd, 0.5 for adam)",
    )

    @model_validator(mode="after")
    def _rules(self) -> LrRuleSection:
        broken = _foreign_keys(self, "lr_rule", LR_RULE_KEYS, common=frozenset({"name"}))
        if self.name == "power" and self.exponent is None:
            rule, fix = "lr_rule power needs its exponent", "between 0.5 (as sqrt does) and 1.0 (as linear does)"
            broken.append(Broken(keys=("exponent", "name"), value=None, rule=rule, fix=fix))
        _refuse(broken)
        return self


_RampEntry = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)]


class ControllerSection(Section):
    """How the target batch is decided."""

    mode: Literal["act", "advise"] = Field(
        default="act", description="[name] act, or advise: measure and say what would be done, but never do it"
    )
    policy: Annotated[str, AfterValidator(_name_of(POLICIES, "a policy"))] = Field(
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
        default_factory=_default_of({}),
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
        _refuse(broken)
        return self


class MeasureSection(Section):
    """How the gradient noise is measured."""

    estimator: Literal["micro_batch"] = Field(
        default="micro_batch", description="[name] what gradients are compared: those of all micro-batches of a step"
    )
    every_steps: int = Field(default=1, ge=1, description="[steps] from one measured step to the next")


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
    resize_cost_s: float = Field(
        default=10.0, ge=0, description="[s] what a resize is taken to cost until one was measured"
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
        _refuse(broken)
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


class EvaluationSection(Section):
    """When the held-out samples are tried."""

    every_samples: int | None = Field(
        default=None, ge=1, description="[samples] between two evaluations; null: at the end only"
    )


class CheckpointSection(Section):
    """When all that a run needs to go on is saved."""

    every_samples: int | None = Field(
        default=None, ge=1, description="[samples] between two checkpoints; null: at the end only"
    )
    keep: int = Field(default=2, ge=1, description="[checkpoints] the newest so many are kept")


class RecoverySection(Section):
    """What a run survives."""

    max_failures: int = Field(
        default=3, ge=0, description="[failures] a run goes on from its last checkpoint so often; 0: never"
    )


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
    ledger: bool = Field(
        default=False, description="[true or false] write which samples each step consumed, to prove exactly-once"
    )

    @model_validator(mode="after")
    def _rules(self) -> RunConfig:
        _refuse([*self._batch_rules(), *self._clock_rules(), *self._lr_rules()])
        return self

    def _batch_rules(self) -> list[Broken]:
        broken = []
        batch, controller, workers = self.batch, self.controller, self.workers
        acts = controller.mode == "act" and controller.policy == "noise_scale"
        may_shrink = controller.shrink and batch.min < batch.initial
        if acts and batch.max == batch.initial and not may_shrink:
            rule = "controller.mode act with policy noise_scale has no room: batch.max equals batch.initial"
            fix = f"write batch.max: {16 * batch.initial}, or controller.mode: advise, or controller.policy: fixed"
            keys: tuple[str, ...] = ("batch.max", "batch.initial", "controller.mode", "controller.policy")
            broken.append(Broken(keys=keys, value=batch.max, rule=rule, fix=fix))
        key = "batch.min" if may_shrink else "batch.initial"
        lowest = batch.min if may_shrink else batch.initial
        if acts and lowest < 2:
            rule = "noise is measured between the micro-batches of a step, and one sample makes only one of them"
            keys = (key, "controller.policy")
            broken.append(Broken(keys=keys, value=lowest, rule=rule, fix="write 2 or more"))
        if workers.initial > batch.initial:
            rule = f"more workers than batch.initial has samples, {batch.initial}: some would have nothing to do"
            fix = f"write {batch.initial} or fewer, or begin with a larger batch"
            keys = ("workers.initial", "batch.initial")
            broken.append(Broken(keys=keys, value=workers.initial, rule=rule, fix=fix))
        for samples, size in controller.ramp or ():
            floor = batch.min if controller.shrink else batch.initial
            if not floor <= size <= batch.max:
                rule = f"the ramp wants a batch of {size} at {samples} samples, outside {floor} to {batch.max}"
                fix = "change the entry, or batch.max, batch.initial, batch.min (below initial with shrink: true)"
                keys = ("controller.ramp", "batch.max", "batch.initial", "batch.min", "controller.shrink")
                broken.append(Broken(keys=keys, value=controller.ramp, rule=rule, fix=fix))
        return broken

    def _clock_rules(self) -> list[Broken]:
        """What must happen before the last sample; with epochs the total is known only with the data."""
        total = self.train.samples
        if total is None:
            return []
        broken = []

        def late(key: str, value: Any, rule: str, fix: str, *others: str) -> None:
            broken.append(Broken(keys=(key, *others, "train.samples"), value=value, rule=rule, fix=fix))

        schedule, controller = self.schedule, self.controller
        warmup, decay = schedule.warmup_samples, schedule.decay_samples or 0
        ends = f"and train.samples is {total}"
        if self.batch.initial > total:
            late("batch.initial", self.batch.initial, f"the first step takes all there is, {ends}", "write less")
        if warmup >= total:
            late("schedule.warmup_samples", warmup, f"the warm-up never ends, {ends}", "a tenth of the run is usual")
        elif warmup + decay > total:
            rule = f"warm-up ({warmup}) and decay do not fit, {ends}"
            late("schedule.decay_samples", decay, rule, "shorten one", "schedule.warmup_samples")
        times = schedule.milestones_samples or ()
        if times and max(times) >= total:
            late("schedule.milestones_samples", times, f"the last milestone is never reached, {ends}", "remove it")
        if controller.ramp and controller.ramp[-1][0] >= total:
            late("controller.ramp", controller.ramp, f"the ramp's last entry is never reached, {ends}", "remove it")
        if controller.mode == "act" and controller.policy != "fixed" and controller.every_samples >= total:
            rule = f"the first decision is never reached, {ends}"
            fix = f"write {max(1, total // 16)}, or controller.policy: fixed"
            late("controller.every_samples", controller.every_samples, rule, fix, "controller.policy")
        return broken

    def _lr_rules(self) -> list[Broken]:
        if self.lr_rule.name != "auto" or self.optimizer.name in OPTIMIZERS:
            return []
        rule = f"auto chooses by the optimizer's family, and that of {self.optimizer.name} is not known"
        fix = "name the rule: linear suits sgd-like optimizers, sqrt suits adam-like ones"
        return [Broken(keys=("lr_rule.name", "optimizer.name"), value="auto", rule=rule, fix=fix)]
