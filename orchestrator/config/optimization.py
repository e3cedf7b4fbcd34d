"""With which optimizer and at which learning rate: its base, its schedule, and how it follows the batch?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from orchestrator.config.section import Broken, NameOf, Section, default_of, foreign_keys, given_keys, refuse
from orchestrator.core.companions import Memory
from orchestrator.core.families import members

# Which keys of a section belong to which name; a name that is imported gets whatever is given.
OPTIMIZER_KEYS: Mapping[str, frozenset[str]] = {
    "sgd": frozenset({"momentum", "nesterov"}),
    "adam": frozenset({"betas", "eps"}),
    "adamw": frozenset({"betas", "eps"}),
    "lars": frozenset({"momentum", "trust"}),
    "lamb": frozenset({"betas", "eps"}),
    "lans": frozenset({"betas", "eps"}),
    "clars": frozenset({"momentum", "trust", "part_samples"}),
    "vr_sgd": frozenset({"momentum", "part_samples", "ratio_floor"}),
    "vr_adam": frozenset({"betas", "eps", "part_samples", "ratio_floor", "ratio_beta"}),
    "vr_lamb": frozenset({"betas", "eps", "part_samples", "ratio_floor", "ratio_beta"}),
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
    "auto": frozenset(),
    "constant": frozenset(),
    "linear": frozenset(),
    "sqrt": frozenset(),
    "power": frozenset({"exponent"}),
    "noise_scale": frozenset({"exponent"}),
    "adascale": frozenset(),
    "surge": frozenset({"peak_batch", "floor"}),
    "sde": frozenset(),
}

_ADAPTIVE = tuple(name for name, keys in OPTIMIZER_KEYS.items() if "betas" in keys)
_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """The optimizer, and the learning rate at batch.initial."""

    name: Annotated[str, AfterValidator(NameOf(OPTIMIZER_KEYS, "an optimizer"))] = Field(
        description="[name] sgd, adam, adamw, lars, lamb, lans, clars, vr_sgd, vr_adam, vr_lamb, or module:attribute"
    )
    lr: float = Field(gt=0, description="[rate] learning rate at batch.initial; schedule and lr_rule multiply it")
    momentum: float | None = Field(
        default_factory=default_of({"sgd": 0.0, "lars": 0.9, "clars": 0.9, "vr_sgd": 0.0}),
        ge=0,
        lt=1,
        description="[fraction] sgd, lars, clars, vr_sgd: of the last update kept",
    )
    trust: float | None = Field(
        default_factory=default_of({"lars": 0.001, "clars": 0.001}),
        gt=0,
        description="[fraction] lars, clars: of its own norm that a layer moves in a step at lr 1",
    )
    nesterov: bool | None = Field(
        default_factory=default_of({"sgd": False}), description="[true or false] sgd: look ahead along the momentum"
    )
    betas: Annotated[tuple[_Beta, _Beta], Field(strict=False)] | None = Field(
        default_factory=default_of(dict.fromkeys(_ADAPTIVE, (0.9, 0.999))),
        description="[two fractions] adam, adamw, lamb, lans, vr_adam, vr_lamb: kept of the averaged gradient and of "
        "its square",
    )
    eps: float | None = Field(
        default_factory=default_of({name: 1e-6 if name in ("lamb", "lans", "vr_lamb") else 1e-8 for name in _ADAPTIVE}),
        gt=0,
        description="[gradient] adam, adamw, lamb, lans, vr_adam, vr_lamb: added to the root of the averaged square",
    )
    weight_decay: float | None = Field(
        default_factory=default_of(
            {name: 0.01 if name in ("adamw", "lamb", "lans", "vr_lamb") else 0.0 for name in OPTIMIZER_KEYS}
        ),
        ge=0,
        description="[rate] pull of the weights towards zero (adamw, vr_adam: apart from the gradient; lars, lamb, "
        "lans, clars, vr_lamb: within the layer's step, and not on biases and gains)",
    )
    part_samples: int | None = Field(
        default_factory=default_of({}),
        ge=1,
        description="[samples] clars, vr_sgd, vr_adam, vr_lamb: the parts of the batch whose gradients are compared; "
        "each is one micro-batch, whatever the layout",
    )
    ratio_floor: float | None = Field(
        default_factory=default_of(dict.fromkeys(("vr_sgd", "vr_adam", "vr_lamb"), 0.1)),
        gt=0,
        le=1,
        description="[fraction] vr_sgd, vr_adam, vr_lamb: of an element of the gradient that is kept at least, "
        "however much the parts differ",
    )
    ratio_beta: float | None = Field(
        default_factory=default_of(dict.fromkeys(("vr_adam", "vr_lamb"), 0.9)),
        ge=0,
        lt=1,
        description="[fraction] vr_adam, vr_lamb: kept of the averaged ratio of signal to noise",
    )

    @model_validator(mode="after")
    def _rules(self) -> OptimizerSection:
        broken = foreign_keys(self, "optimizer", OPTIMIZER_KEYS, common=frozenset({"name", "lr", "weight_decay"}))
        if self.name == "sgd" and self.nesterov and not self.momentum:
            rule = "nesterov needs momentum, and optimizer.momentum is 0"
            broken.append(Broken(keys=("nesterov", "momentum"), value=True, rule=rule, fix="write momentum: 0.9"))
        if self.part_samples is None and "part_samples" in OPTIMIZER_KEYS.get(self.name, ()):
            rule = f"optimizer {self.name} compares parts of the batch and must know how large they are"
            fix = "write part_samples: batch.micro_batch, or a divisor of it; smaller parts tell more"
            broken.append(Broken(keys=("part_samples", "name"), value=None, rule=rule, fix=fix))
        refuse(broken)
        return self

    def settings(self) -> dict[str, Any]:
        """What the optimizer's factory is given by name: every key that belongs to it, ``lr`` among them.

        ``part_samples`` is for the session, which cuts the batch.
        """
        return given_keys(self, without=frozenset({"name", "part_samples"}))


class ScheduleSection(Section):
    """The learning rate over the samples seen, as a fraction of optimizer.lr."""

    name: Annotated[str, AfterValidator(NameOf(SCHEDULE_KEYS, "a schedule"))] = Field(
        default="constant", description="[name] constant, cosine, linear, step, wsd, one_cycle, or module:attribute"
    )
    warmup_samples: int = Field(default=0, ge=0, description="[samples] the rate first rises over so many")
    start_fraction: float | None = Field(
        default_factory=default_of({"one_cycle": 0.04}),
        ge=0,
        le=1,
        description="[fraction] one_cycle: of the rate that the rise begins at",
    )
    final_fraction: float | None = Field(
        default_factory=default_of({"cosine": 0.0, "linear": 0.0, "wsd": 0.0, "one_cycle": 0.0}),
        ge=0,
        le=1,
        description="[fraction] cosine, linear, wsd, one_cycle: of the rate that is left at the end",
    )
    milestones_samples: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] | None = Field(
        default_factory=default_of({}), description="[list of samples] step: the rate is multiplied by gamma at each"
    )
    gamma: float | None = Field(
        default_factory=default_of({"step": 0.1}), gt=0, description="[factor] step: what each milestone multiplies by"
    )
    decay_samples: int | None = Field(
        default_factory=default_of({}), ge=1, description="[samples] wsd: the rate falls over the last so many"
    )

    @model_validator(mode="after")
    def _rules(self) -> ScheduleSection:
        broken = foreign_keys(self, "schedule", SCHEDULE_KEYS, common=frozenset({"name", "warmup_samples"}))
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
        refuse(broken)
        return self

    @property
    def lowest_fraction(self) -> float | None:
        """Of the peak, what a built-in schedule has fallen to at its end; ``None`` for one that is imported."""
        if self.gamma is not None and self.milestones_samples is not None:
            return float(self.gamma ** len(self.milestones_samples))
        return 1.0 if self.name == "constant" else self.final_fraction

    def settings(self) -> dict[str, Any]:
        """The schedule's name and every key that belongs to it."""
        return given_keys(self)


class LrRuleSection(Section):
    """How the learning rate follows the batch."""

    name: Annotated[str, AfterValidator(NameOf(LR_RULE_KEYS, "a rule"))] = Field(
        default="auto",
        description=f"[name] auto (noise_scale for {', '.join(members('sgd'))}; sqrt for {', '.join(members('adam'))}),"
        " constant, linear, sqrt, power, noise_scale, adascale (noise_scale with exponent 1), surge, sde (sqrt, with "
        "betas and eps that follow: adam, adamw), or module:attribute",
    )
    exponent: float | None = Field(
        default_factory=default_of({"noise_scale": 1.0}),
        gt=0,
        le=1,
        description="[exponent] power: of batch / batch.initial; noise_scale: of its gain (1 for sgd, 0.5 for adam)",
    )
    peak_batch: int | None = Field(
        default_factory=default_of({}),
        ge=1,
        description="[samples] surge: batch at which the best rate is highest, found by trials; not the noise scale",
    )
    floor: float | None = Field(
        default_factory=default_of({"surge": 0.5}),
        gt=0,
        le=1,
        description="[fraction] surge: of the rate at peak_batch that is kept however far the batch is above it",
    )
    ramp_samples: int = Field(
        default=0,
        ge=0,
        description="[samples] after a change of the batch the rate goes to its new value over so many; 0: at once",
    )
    in_samples: Annotated[tuple[Memory, ...], Field(strict=False)] = Field(
        default=(),
        description="[list of names, samples] what keeps its meaning per sample at any batch: momentum (sgd, lars, "
        "clars), betas (adam, adamw, lamb, lans), weight_decay (adamw, vr_adam)",
    )
    second_moment: Literal["keep", "rescale"] = Field(
        default="keep",
        description="[name] at a change of the batch: keep, or rescale what adam, adamw and lamb average of squared "
        "gradients to the new batch's noise; where the batch shrinks, this or ramp_samples spares steps too large",
    )

    @model_validator(mode="after")
    def _rules(self) -> LrRuleSection:
        common = frozenset({"name", "ramp_samples", "in_samples", "second_moment"})
        broken = foreign_keys(self, "lr_rule", LR_RULE_KEYS, common=common)
        if len(set(self.in_samples)) < len(self.in_samples):
            rule, fix = "a name is given twice", f"write [{', '.join(dict.fromkeys(self.in_samples))}]"
            broken.append(Broken(keys=("in_samples",), value=self.in_samples, rule=rule, fix=fix))
        if self.name == "sde" and "betas" in self.in_samples:
            rule = "lr_rule sde brings betas of its own, which follow the batch"
            fix = "take betas out of in_samples, or write lr_rule.name: sqrt, which goes with betas in samples"
            broken.append(Broken(keys=("in_samples", "name"), value=self.in_samples, rule=rule, fix=fix))
        if self.name == "power" and self.exponent is None:
            rule, fix = "lr_rule power needs its exponent", "between 0.5 (as sqrt does) and 1.0 (as linear does)"
            broken.append(Broken(keys=("exponent", "name"), value=None, rule=rule, fix=fix))
        if self.name == "surge" and self.peak_batch is None:
            rule = "lr_rule surge needs the batch at which the best rate is highest"
            fix = "write the one found by trials at several batches; without trials, lr_rule.name: sqrt suits adam"
            broken.append(Broken(keys=("peak_batch", "name"), value=None, rule=rule, fix=fix))
        for key in ("peak_batch", "floor"):
            if self.name not in LR_RULE_KEYS and getattr(self, key) is not None:
                rule, fix = "a rule of your own is given exponent alone", "remove it, or write lr_rule.name: surge"
                broken.append(Broken(keys=(key, "name"), value=getattr(self, key), rule=rule, fix=fix))
        refuse(broken)
        return self
