"""Worlds whose noise is known, driven by the real controller: what it decides is compared with what is true.

A world is asked for one step at a time and answers with that step's reading; the controller's target is obeyed as a
session obeys it. No gradient is computed by torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from orchestrator.core import controller
from orchestrator.core.controller import ControllerState, Rules
from orchestrator.core.lr_rules import build_rule
from orchestrator.core.noise import NoiseSettings, moments
from orchestrator.core.planner import WorkerLimits
from orchestrator.core.policies import PLANNED, PolicySettings, build_policy, goodput_of, sees_clock
from orchestrator.core.policy_inputs import Policy, PolicyInputs
from orchestrator.types import Action, ApplyPlan, Decision, Event, GradMeasured, GradSample, Keep, RequestWorkers

COOLDOWN = 4096
EVERY = 1024


def rules(**changes: Any) -> Rules:
    """Small valid rules: one worker, batch 32 in micro-batches of 8, the noise-scale policy at its defaults.

    Names that ``PolicySettings`` knows and ``Rules`` does not (ceiling, deadband, shrink, ...) go to the policy.
    """
    policy_alone = PolicySettings.__dataclass_fields__.keys() - Rules.__dataclass_fields__.keys()
    of_policy = {key: changes.pop(key) for key in list(changes) if key in policy_alone}
    base: dict[str, Any] = {
        "total_samples": 200_000,
        "base_batch": 32,
        "micro_batch": 8,
        "act": True,
        "measurable": True,
        "every_samples": EVERY,
        "lag_steps": 2,
        "noise": NoiseSettings(half_life_samples=4096),
        "lr_rule": build_rule("constant"),
        "schedule": lambda samples: 1.0,
        "workers": WorkerLimits(minimum=1, maximum=1, micro_batches_each=2),
        "resize_when": "never",
        "resize_cost_s": 10.0,
    }
    floor = changes.get("base_batch", 32)
    restraints = {"cooldown_samples": COOLDOWN, "floor": floor, "ceiling": 16_384, "base_batch": floor}
    both = base | changes
    fleet = {"workers": None if both["resize_when"] == "never" else both["workers"]}
    settings = PolicySettings(**({"name": "noise_scale"} | restraints | fleet | of_policy))
    base |= {"policy": build_policy(settings), "sees_clock": sees_clock(settings), "planned": settings.name in PLANNED}
    base["goodput"] = goodput_of(settings) if settings.name == "goodput" else None
    return Rules(**(base | changes))


def without_guard(policy: Policy) -> Policy:
    """The same policy, with all of the noise scale credited."""
    return lambda inputs: policy(replace(inputs, credit=None))


def measured(step: int, seen: int, batch: int, **more: Any) -> GradMeasured:
    """A step's event; ``step_time_s`` and fields of ``GradSample`` by name."""
    time = more.pop("step_time_s", None)
    fields: dict[str, Any] = {"micro_batches": max(2, -(-batch // 8)), "loss": 1.0, "lr": 0.1} | more
    return GradMeasured(sample=GradSample(step=step, samples_seen=seen, batch=batch, **fields), step_time_s=time)


class World(Protocol):
    """``(samples seen before the step, its batch, factor on the LR)`` -> the fields of its ``GradSample``."""

    def __call__(self, seen: int, batch: int, factor: float) -> dict[str, Any]: ...


@dataclass
class Run:
    """What was fed and what was answered, in order; ``batches`` holds (samples seen, new batch)."""

    state: ControllerState
    history: list[tuple[Event, Action]] = field(default_factory=list)
    batches: list[tuple[int, int]] = field(default_factory=list)

    @property
    def largest(self) -> int:
        return max(batch for _, batch in self.batches)

    @property
    def plans(self) -> list[tuple[int, ApplyPlan]]:
        """(samples seen, plan) of every decision that changed the target."""
        return [
            (event.sample.samples_seen, action)
            for event, action in self.history
            if isinstance(event, GradMeasured) and isinstance(action, ApplyPlan)
        ]


def drive(
    settled: Rules,
    world: World,
    *,
    between: Callable[[int], Iterable[Event]] = lambda step: (),
    time_s: float | Callable[[int, int], float] = 0.01,
) -> Run:
    """One whole run; ``between(step)`` gives events that arrive after that step.

    A step takes ``time_s``, or as long as that says of its batch and the workers.
    """
    run = Run(controller.init(settled, world_size=1), batches=[(0, settled.base_batch)])
    seen = step = 0
    factor, coming = 1.0, None

    def take(event: Event) -> Action:
        run.state, action = controller.advance(run.state, event, settled)
        run.history.append((event, action))
        return action

    while seen < settled.total_samples:
        if coming is not None and step >= coming.effective_step:
            factor, coming = coming.lr_factor, None
        batch = min(run.state.target.batch, settled.total_samples - seen)
        if run.state.target.batch != run.batches[-1][1]:
            run.batches.append((seen, run.state.target.batch))
        reading = world(seen, batch, factor)
        seen += batch
        took = time_s(batch, run.state.world_size) if callable(time_s) else time_s
        action = take(measured(step, seen, batch, step_time_s=took, **reading))
        if isinstance(action, ApplyPlan):
            coming = action
        for event in between(step):
            take(event)
        step += 1
    return run


def gaussian(
    noise_scale: Callable[[int], float], *, seed: int, louder: bool = False, dim: int = 64, micro_batch: int = 8
) -> World:
    """Micro-gradients N(G, s^2 I / b), with tr(Sigma) / |G|^2 = dim s^2 / |G|^2 as planted.

    A larger noise scale is a smaller |G| beside s = 1, or with ``louder`` a larger s beside |G|^2 = dim. The loss says
    nothing: a level with noise.
    """
    rng = np.random.default_rng(seed)

    def world(seen: int, batch: int, factor: float) -> dict[str, Any]:
        scale = noise_scale(seen)
        mean, sigma = (1.0, math.sqrt(scale)) if louder else (1.0 / math.sqrt(scale), 1.0)
        full, rest = divmod(batch, micro_batch)
        sizes = np.array([micro_batch] * full + [rest] * (rest > 0), dtype=float)
        if len(sizes) == 1:
            sizes = np.array([batch - batch // 2, batch // 2], dtype=float)
        gradients = mean + sigma * rng.standard_normal((len(sizes), dim)) / np.sqrt(sizes)[:, None]
        whole = sizes @ gradients / batch
        found = moments([int(b) for b in sizes], (gradients**2).sum(axis=1).tolist(), float(whole @ whole))
        assert found is not None
        grad_sq, trace_cov = found
        loss = 1.0 + float(rng.standard_normal()) / math.sqrt(batch)
        return {"grad_sq": grad_sq, "trace_cov": trace_cov, "micro_batches": len(sizes), "loss": loss, "lr": 0.1}

    return world


def quadratic(
    curvatures: list[float],
    *,
    seed: int,
    start: float | None = None,
    lr: Callable[[int], float] = lambda seen: 1.0,
    each: int = 10,
    base_batch: int = 32,
) -> World:
    """SGD on the loss 1 + sum h w^2 / 2 with gradient noise of covariance I per sample.

    It begins at ``start`` in every direction, or in the stationary distribution of ``base_batch`` and the first LR,
    where the noise scale is 2 tr(Sigma) / tr(H Sigma) x batch / LR to leading order in LR (theory G1).
    """
    rng = np.random.default_rng(seed)
    h = np.repeat(np.array(curvatures), each)
    spread = np.sqrt(lr(0) / (base_batch * h * (2.0 - lr(0) * h)))
    w = rng.standard_normal(h.size) * spread if start is None else np.full(h.size, start)

    def world(seen: int, batch: int, factor: float) -> dict[str, Any]:
        nonlocal w
        rate = lr(seen) * factor
        pieces = max(2, -(-batch // 8))
        loss = 1.0 + 0.5 * float(h @ (w * w)) + float(rng.standard_normal()) / math.sqrt(batch)
        gradient = h * w + rng.standard_normal(h.size) / math.sqrt(batch)
        # The spread of the pieces is independent of their mean, and chi-squared.
        trace_cov = float(rng.chisquare((pieces - 1) * h.size)) / (pieces - 1)
        grad_sq = float(gradient @ gradient) - trace_cov / batch
        w = w - rate * gradient
        return {"grad_sq": grad_sq, "trace_cov": trace_cov, "micro_batches": pieces, "loss": loss, "lr": rate}

    return world


def plateau_ratio(curvatures: list[float], *, lr: float = 1.0) -> float:
    """Noise scale / batch in the stationary distribution of ``quadratic``, exactly: tr(Sigma) / E|Hw|^2 / batch."""
    return len(curvatures) / sum(lr * h / (2.0 - lr * h) for h in curvatures)


def scripted(*, grow_at: dict[int, int]) -> Policy:
    """A policy that wants ``grow_at[n]`` once n samples were seen, and otherwise what there is."""

    def propose(inputs: PolicyInputs) -> Decision:
        wanted = [batch for seen, batch in sorted(grow_at.items()) if seen <= inputs.samples_seen]
        return Decision(target_batch=wanted[-1] if wanted else inputs.batch, reason=f"the script at {len(wanted)}")

    return propose


def level(seen: int, batch: int, factor: float) -> dict[str, Any]:
    """Every step reads the same."""
    return {"grad_sq": 1.0, "trace_cov": 50.0, "loss": 1.0, "lr": 0.1}


def steps(settled: Rules, count: int, *, world_size: int = 1, **more: Any) -> tuple[ControllerState, list[Action]]:
    """``count`` steps at the target, and their actions."""
    state = controller.init(settled, world_size=world_size)
    actions: list[Action] = []
    for step in range(count):
        batch = state.target.batch
        state, action = controller.advance(state, measured(step, state.samples_seen + batch, batch, **more), settled)
        actions.append(action)
    return state, actions


def wandering(seed: int) -> World:
    """A noise scale that rises thirty-fold over the run, by planted Gaussian micro-gradients."""
    return gaussian(lambda seen: 30.0 * 30.0 ** (seen / 60_000), seed=seed)


LIVELY: dict[str, Any] = {
    "workers": WorkerLimits(minimum=1, maximum=4, micro_batches_each=2),
    "resize_when": "saves_time",
    "resize_cost_s": 0.01,
    "lr_rule": build_rule("noise_scale"),
}


def requests(actions: list[Action]) -> list[tuple[int, int]]:
    """(step, workers) of every request, whether alone or beside a decision to hold."""
    asked = [action.workers if isinstance(action, Keep) else action for action in actions]
    return [(i, a.num_workers) for i, a in enumerate(asked) if isinstance(a, RequestWorkers)]
