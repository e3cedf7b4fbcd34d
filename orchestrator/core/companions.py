"""What of an optimizer follows the batch beside the learning rate: its settings at a step, its state at a jump?

Momentum, betas and decay are memories counted in steps. A step of ``ratio`` = batch / base batch base batches passes
``ratio`` times as many samples, so a memory that is to mean the same in samples must fade faster per step. Settings
are computed afresh from their base values at every step; at ratio 1 they are the base values, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Memory = Literal["momentum", "betas", "weight_decay"]

IN_SAMPLES: Mapping[Memory, tuple[str, ...]] = {  # the optimizers for which each is defined
    "momentum": ("sgd", "lars", "clars"),
    "betas": ("adam", "adamw", "lamb", "lans"),
    "weight_decay": ("adamw", "vr_adam"),
}
SDE_OPTIMIZERS = ("adam", "adamw")
RESCALED_OPTIMIZERS = ("adam", "adamw", "lamb")

_ROUNDING = 1e-9  # 10 * (1 - 0.9) is below 1 in floating point only


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScale:
    """What a step's batch makes of the base settings."""

    ratio: float = 1.0  # batch / base batch
    rule: float = 1.0  # the rule's factor on the learning rate, on its ramp
    schedule: float = 1.0

    @property
    def lr(self) -> float:
        return self.schedule * self.rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Jump:
    """A change of the target batch [samples]; ``noise_scale`` [samples] was measured at its decision, if at all."""

    old_batch: int
    new_batch: int
    noise_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """Which settings follow the batch; none when left out.

    ``momentum`` in samples: m -> m^ratio. The rate at which weights move in the long run is lr / (1 - m), and it is
    this rate that the rule means, so lr is multiplied by (1 - m^ratio) / (1 - m) besides (Smith and Le 2018,
    arXiv:1710.06451, write the noise by the same lr / (1 - m)). SGD's buffer, which holds about 1 / (1 - m) gradients,
    is restated at a jump. Where lr is part of the buffer, as in LARS and CLARS, it goes on at the old rate and adapts
    by itself. Derived here from the sum of the geometric series; the step-by-step likeness to the smaller batch is a
    limit, ratio (1 - m) << 1: at momentum 0.9 and ratio 8 the memory is two steps long and the likeness gone.

    ``betas`` in samples: beta -> beta^ratio, for both: the same half-life in samples at any ratio, with no limit on it.
    With the rule ``sqrt`` this is the rule ``sde`` to first order in ratio (1 - beta), but for eps.

    ``weight_decay`` in samples, for decay apart from the gradient (AdamW, VR-Adam): weights shrink by lr decay each
    step, so by lr decay / batch each sample; that is constant when decay -> decay ratio / (factor of the rule), which
    is 1 under ``linear`` and sqrt(ratio) under ``sqrt``. A schedule goes on to act on it, as it does at a fixed batch.

    ``sde``: the square-root rule of Malladi et al. 2022, arXiv:2205.10287: lr x sqrt(ratio), 1 - beta -> ratio
    (1 - beta), eps -> eps / sqrt(ratio). A beta of 0 has no memory to shorten and stays 0, which is the rule for
    RMSProp. The update then is the same per sample while noise dominates the gradient, to first order in
    ratio (1 - beta), and the rule ends where that product reaches 1.

    Adam corrects its averages by 1 - beta^t, which takes all t steps for steps of today's beta. When betas change, the
    count is restated so that beta2^t stays what it was; else an early jump of ratio 8 would make steps up to sqrt(8)
    times too large. (No paper says so; both follow from the definition of the average.)

    ``rescale_second_moment``: Adam's average of squared gradients tends to |G|^2 (1 + S / B), S the noise scale. At a
    jump from B0 to B it is multiplied by (1 + S / B) / (1 + S / B0), where it would have gone by itself over its own
    memory. It is never zeroed, and is left as it is where S is not known. Growing, the average left alone makes steps
    too small for a while, which is safe; shrinking, too large at once, by up to the root of the ratio.
    """

    in_samples: frozenset[str] = frozenset()
    sde: bool = False
    rescale_second_moment: bool = False
    lr_in_buffer: bool = False  # the momentum buffer is in units of the weights, as that of LARS and CLARS

    def settings(self, base: Mapping[str, Any], scale: StepScale) -> dict[str, Any]:
        """A parameter group's settings for a step: those of ``base`` that follow the batch, ``lr`` among them."""
        ratio = scale.ratio
        found: dict[str, Any] = {"lr": base["lr"] * scale.lr}
        if "momentum" in self.in_samples:
            found["momentum"] = base["momentum"] ** ratio
            found["lr"] *= (1 - found["momentum"]) / (1 - base["momentum"])
        if "weight_decay" in self.in_samples:
            found["weight_decay"] = base["weight_decay"] * (ratio / scale.rule)
        if self.moves_betas:
            found["betas"] = self.betas(base, ratio)
        if self.sde:
            found["eps"] = base["eps"] / math.sqrt(ratio)
        return found

    def state_factors(self, base: Mapping[str, Any], jump: Jump, *, base_batch: int) -> dict[str, float]:
        """What the optimizer's state of a group is multiplied by, once, where ``jump`` takes effect: by state key."""
        old, new = jump.old_batch / base_batch, jump.new_batch / base_batch
        found: dict[str, float] = {}
        if self.moves_betas:
            before, after = self.betas(base, old)[1], self.betas(base, new)[1]
            if before > 0 and after > 0:
                found["step"] = math.log(before) / math.log(after)
        if "momentum" in self.in_samples and not self.lr_in_buffer:
            momentum = base["momentum"]
            found["momentum_buffer"] = (1 - momentum**old) / (1 - momentum**new)
        if self.rescale_second_moment and jump.noise_scale is not None:
            found["exp_avg_sq"] = second_moment_factor(jump)
            found["max_exp_avg_sq"] = found["exp_avg_sq"]
        return found

    def missing(self, group: Mapping[str, Any]) -> Iterator[str]:
        """The settings that would have to follow the batch and that ``group`` does not have."""
        needed = [*self.in_samples, *(("betas", "eps") if self.sde else ())]
        return (key for key in sorted(set(needed)) if key not in group)

    @property
    def moves_betas(self) -> bool:
        return self.sde or "betas" in self.in_samples

    def betas(self, base: Mapping[str, Any], ratio: float) -> tuple[float, ...]:
        """Where they move: those for a batch of ``ratio`` base batches."""
        at = sde_beta if self.sde else beta_in_samples
        return tuple(at(beta, ratio) for beta in base["betas"])


def beta_in_samples(beta: float, ratio: float) -> float:
    """The fraction kept over ``ratio`` base batches: beta^ratio."""
    return float(beta**ratio)


def sde_beta(beta: float, ratio: float) -> float:
    """1 - ratio (1 - beta), and 0 for 0; ``largest_batch`` says how far that goes."""
    # Written so that ratio 1 gives beta itself.
    return beta - (ratio - 1.0) * (1.0 - beta) if beta > 0 else 0.0


def largest_batch(betas: tuple[float, ...], *, base_batch: int) -> int | None:
    """The largest batch at which ratio (1 - beta) < 1 holds for all, as the rule ``sde`` needs; ``None``: any."""
    fastest = max((1 - beta for beta in betas if beta > 0), default=0.0)
    return math.ceil(base_batch * (1 - _ROUNDING) / fastest) - 1 if fastest else None


def second_moment_factor(jump: Jump) -> float:
    """(1 + S / new batch) / (1 + S / old batch), and 1 where S is not known."""
    if jump.noise_scale is None:
        return 1.0
    return (1 + jump.noise_scale / jump.new_batch) / (1 + jump.noise_scale / jump.old_batch)


def ema_weight(batch: int, *, samples_seen: int, half_life_samples: float) -> float:
    """The weight of the newest weights in their average, after a step of ``batch`` samples; ``samples_seen`` with it.

    A step leaves 2^(-batch / half-life) of what was averaged before, which is the scaling rule rho -> rho^ratio of
    Busbridge et al. 2023, arXiv:2307.13813, at every batch. (Their rule for the number kept was read in the abstract
    and derived again: what is kept over a number of samples must not depend on how they are cut into steps.) All
    weights averaged sum to one from the first step on, so that the average does not remember where training began:
    the newest gets (1 - 2^(-batch / half-life)) / (1 - 2^(-samples seen / half-life)).
    """
    rate = math.log(2) / half_life_samples
    return math.expm1(-rate * batch) / math.expm1(-rate * samples_seen)
