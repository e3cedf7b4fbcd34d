"""How is the target batch decided: by which policy, how often, and with what restraint?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from orchestrator.config.section import Broken, NameOf, Section, default_of, refuse

MEASURED_POLICIES = (
    "noise_scale",
    "tradeoff",
    "norm_test",
    "goodput",
    "expected_smoothness",
    "branched",
)  # these follow the noise scale
POLICIES = ("fixed", "schedule", "decay_to_growth", *MEASURED_POLICIES)

# The keys that one built-in policy uses and no other: their policy.
_OWNERS: Mapping[str, str] = {
    "ramp": "schedule",
    "exchange_rate": "tradeoff",
    "price_per_worker_hour": "tradeoff",
    "price_per_sample": "tradeoff",
    "theta": "norm_test",
    "objective": "goodput",
    **dict.fromkeys(("smoothness", "max_smoothness", "strong_convexity", "accuracy"), "expected_smoothness"),
    **dict.fromkeys(("branch_every_samples", "branch_samples", "branch_tolerance"), "branched"),
}
# Those of them without which the policy cannot be, and what is usual.
_NEEDED: Mapping[str, str] = {
    "ramp": "write ramp: [[20000, 64], [40000, 128]], samples seen and batch",
    "theta": "write theta: 0.5, the largest part of the gradient's norm that may be noise",
    "smoothness": "write the largest eigenvalue of the mean loss's Hessian",
    "max_smoothness": "write the largest eigenvalue of one sample's Hessian; |x|^2 of a regression",
    "strong_convexity": "write the smallest eigenvalue of the mean loss's Hessian; a ridge penalty at least",
    "branch_every_samples": "write branch_every_samples: 200000, from one round of branches to the next",
    "branch_samples": "write branch_samples: 20000, what each branch trains on before it is given up",
    "accuracy": "write the squared distance to the best weights that is near enough",
}


def _objective(value: Any) -> Any:
    """Refuses here what is neither, since an error of a union would name its branches and not the key."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value in ("time", "cost") or (is_number and 0 <= value <= 1):
        return value
    fix = "did you mean cost?" if str(value).lower() in ("costs", "money", "price") else "write time for a short run"
    rule = "must be time, cost, or a number from 0 (time) to 1 (cost)"
    refuse([Broken(keys=(), value=value, rule=rule, fix=fix)])
    return value


_RampEntry = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)]


class ControllerSection(Section):
    """How the target batch is decided."""

    mode: Literal["act", "advise"] = Field(
        default="act", description="[name] act, or advise: measure and say what would be done, but never do it"
    )
    policy: Annotated[str, AfterValidator(NameOf(POLICIES, "a policy"))] = Field(
        default="noise_scale",
        description="[name] fixed, schedule (the ramp), decay_to_growth (the batch grows where the LR schedule would "
        "decay), noise_scale, tradeoff (steps against samples), norm_test, goodput (samples a second x what they are "
        "worth), expected_smoothness (fewest samples of a convex loss), branched (the noise scale x a factor that "
        "trial branches find), or module:factory",
    )
    every_samples: int = Field(default=1024, ge=1, description="[samples] between two decisions")
    lag_steps: int = Field(
        default=4, ge=1, description="[steps] a decision takes effect so much later, on every worker at once"
    )
    cooldown_samples: int = Field(
        default=12288,
        ge=0,
        description="[samples] after a change, or a jump of the learning rate, the next one waits at least so long",
    )
    deadband: float = Field(
        default=1.5, ge=1, description="[ratio] a wish nearer than this to the present batch changes nothing"
    )
    max_growth: float = Field(
        default=2.0, gt=1, description="[ratio] the most that one decision multiplies the batch by"
    )
    kappa: float = Field(
        default=1.0, gt=0, description="[ratio] policy noise_scale: target batch = kappa x noise scale"
    )
    exchange_rate: float | None = Field(
        default_factory=default_of({}),
        gt=0,
        description="[samples per step] policy tradeoff: how many samples one saved step is worth; target batch = "
        "root of exchange_rate x noise scale; left out: what the run's own step times say",
    )
    price_per_worker_hour: float | None = Field(
        default_factory=default_of({}),
        gt=0,
        description="[money per worker and hour] policy tradeoff without exchange_rate: the cheapest run is wanted; "
        "goes with price_per_sample",
    )
    price_per_sample: float | None = Field(
        default_factory=default_of({}),
        ge=0,
        description="[money per sample] policy tradeoff without exchange_rate: what a sample costs besides its "
        "computing, as a label or a simulation",
    )
    objective: Annotated[str | float, BeforeValidator(_objective)] | None = Field(
        default_factory=lambda given: "time" if given.get("policy") == "goodput" else None,
        description="[name or fraction] policy goodput: time for the shortest run, cost for the fewest worker-hours, "
        "or a number from 0 (time) to 1 (cost) between them; under torchrun and local the workers stay, and all of "
        "these choose the same batch",
    )
    theta: float | None = Field(
        default_factory=default_of({}),
        gt=0,
        description="[ratio] policy norm_test: the gradient's noise is at most theta x its norm; target batch = "
        "noise scale / theta^2",
    )
    smoothness: float | None = Field(
        default_factory=default_of({}),
        gt=0,
        description="[loss per squared weight] policy expected_smoothness: of the mean loss, its Hessian's largest "
        "eigenvalue",
    )
    max_smoothness: float | None = Field(
        default_factory=default_of({}),
        gt=0,
        description="[loss per squared weight] policy expected_smoothness: the same of the worst single sample",
    )
    strong_convexity: float | None = Field(
        default_factory=default_of({}),
        gt=0,
        description="[loss per squared weight] policy expected_smoothness: of the mean loss, its Hessian's smallest "
        "eigenvalue",
    )
    accuracy: float | None = Field(
        default_factory=default_of({}),
        gt=0,
        description="[squared weight] policy expected_smoothness: squared distance to the best weights to be reached",
    )
    branch_every_samples: int | None = Field(
        default_factory=default_of({}),
        ge=1,
        description="[samples] policy branched: from one round of branches to the next",
    )
    branch_samples: int | None = Field(
        default_factory=default_of({}),
        ge=1,
        description="[samples] policy branched: what each branch (1, 2, 4, 8 times the batch) trains on before it is "
        "given up; a round trains on up to four times as many",
    )
    branch_tolerance: float | None = Field(
        default_factory=lambda given: 0.01 if given.get("policy") == "branched" else None,
        ge=0,
        description="[loss] policy branched: a branch no more than this above every smaller one has lost nothing",
    )
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
        for key, owner in _OWNERS.items():
            value = getattr(self, key)
            if self.policy == owner and key in _NEEDED and not value:
                rule = f"policy {owner} needs it"
                broken.append(Broken(keys=(key, "policy"), value=value, rule=rule, fix=_NEEDED[key]))
            elif self.policy in POLICIES and self.policy != owner and value is not None:
                rule, fix = f"policy {self.policy} does not use it", f"remove it, or write policy: {owner}"
                broken.append(Broken(keys=(key, "policy"), value=value, rule=rule, fix=fix))
        if self.policy in POLICIES and self.policy != "noise_scale" and self.kappa != 1:
            own = {"tradeoff": "exchange_rate", "norm_test": "theta"}.get(self.policy)
            rule = f"policy {self.policy} does not use it"
            fix = f"remove it{f' and set {own}' if own else ''}, or write policy: noise_scale"
            broken.append(Broken(keys=("kappa", "policy"), value=self.kappa, rule=rule, fix=fix))
        broken += [*self._price_rules(), *self._smoothness_rules()]
        if any(a[0] >= b[0] for a, b in pairwise(ramp)):
            rule = "the ramp's samples must rise from one entry to the next"
            broken.append(Broken(keys=("ramp",), value=self.ramp, rule=rule, fix="put its entries in order"))
        if not self.shrink and any(a[1] > b[1] for a, b in pairwise(ramp)):
            rule = "the ramp's batch becomes smaller, and controller.shrink is false"
            broken.append(Broken(keys=("ramp", "shrink"), value=self.ramp, rule=rule, fix="write shrink: true"))
        refuse(broken)
        return self

    def _price_rules(self) -> list[Broken]:
        if self.policy in POLICIES and self.policy != "tradeoff":
            return []  # refused already
        hour, sample = self.price_per_worker_hour, self.price_per_sample
        if self.exchange_rate is not None and self.policy == "tradeoff":
            given = [key for key in ("price_per_worker_hour", "price_per_sample") if getattr(self, key) is not None]
            rule, fix = "exchange_rate is given as well, and says the same", "remove one of them"
            return [Broken(keys=(key, "exchange_rate"), value=getattr(self, key), rule=rule, fix=fix) for key in given]
        if (hour is None) == (sample is None):
            return []
        key, other = ("price_per_sample", "price_per_worker_hour")[:: 1 if hour is None else -1]
        rule = f"only the ratio of the two prices counts, and {other} is missing"
        return [Broken(keys=(key, other), value=getattr(self, key), rule=rule, fix=f"give {other} as well")]

    def _smoothness_rules(self) -> list[Broken]:
        broken, rising = [], ("strong_convexity", "smoothness", "max_smoothness")
        for low, high in pairwise(rising):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                rule = f"{low} is {least:g}, and no loss has less {high}"
                broken.append(Broken(keys=(high, low), value=most, rule=rule, fix=f"write {least:g} or more"))
        return broken

    @property
    def cost_weight(self) -> float:
        """``objective`` as a number: 0 for time, 1 for cost."""
        if isinstance(self.objective, str):
            return {"time": 0.0, "cost": 1.0}[self.objective]
        return self.objective or 0.0
