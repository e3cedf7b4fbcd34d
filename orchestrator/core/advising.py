"""What would the batch have been, and what would that have saved? Said at the end of a run that only advised.

The run measured at a fixed batch. Its record is gone through again with a *virtual* batch, which the policy decides as
it would have: with its limits, growth cap, dead-band and cooldown, and with the guard. What both cost follows from the
empirical model of McCandlish et al. 2018, arXiv:1812.06162, section 2 and appendix D: at noise scale S a step of batch
B makes 1 / (1 + S / B) of the progress of a step without noise. The same progress therefore takes 1 + S / B steps and
S + B samples, whichever the batch.

What is neglected: the noise scale is taken to belong to the progress made, not to the batch, though on a plateau it
rises with batch / LR (there the guard holds, but finds less to hold than in a run); a larger batch would be measured
with other intervals; the learning rate is taken to follow the batch as well as it can; and times are not known.

A policy that carries out a plan (a ramp, a decay that becomes growth) needs none of this: nothing is measured for it,
and its plan is one over the very samples of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.core import controller
from orchestrator.core.controller import Rules
from orchestrator.types import ApplyPlan, GradMeasured, GradSample, NoiseStats

_ROUNDING = 1e-6  # [steps] of a sum of many parts of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """What a run at a fixed batch recorded from one decision to the next; all but the first two are those at its end.

    ``kappa`` is what branches had found by then, where the policy trains them.
    """

    samples: int
    mean_loss: float
    lr: float
    stats: NoiseStats
    kappa: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The same progress twice: as the run made it, and as the policy would have; for a plan, the same samples.

    ``schedule`` holds (samples seen, batch) of each change, ready to be a ``controller.ramp`` beside the same
    ``every_samples`` and ``lag_steps``. For ``unmeasured_samples`` of the run's own the noise scale was not known, and
    the last one known (at first: the first one) stands for it.
    """

    schedule: tuple[tuple[int, int], ...]
    steps: int
    samples: int
    fixed_steps: int
    fixed_samples: int
    unmeasured_samples: int

    def sentence(self) -> str:
        """The changes, and what both ways cost."""
        steps = f"{self.steps:,} steps instead of {self.fixed_steps:,}"
        samples = f"{self.samples:,} samples instead of {self.fixed_samples:,}"
        if not self.schedule:
            return f"the batch would have stayed as it was, for {self.fixed_steps:,} steps"
        changes = ", ".join(f"{batch:,} from {seen:,} samples on" for seen, batch in self.schedule)
        if self.samples == self.fixed_samples:
            return f"batch {changes} would have taken {steps} for the same {self.samples:,} samples"
        unsure = f"; for {self.unmeasured_samples:,} of the run's own samples the noise scale was not known" * (
            self.unmeasured_samples > 0
        )
        return f"batch {changes} would have made the same progress in {steps}, with {samples}{unsure}"


def advise(stretches: Sequence[Stretch], rules: Rules) -> Advice | None:
    """Go through a run's record again with the policy at the wheel; ``None`` if no noise scale was ever measured.

    McCandlish et al. 2018, arXiv:1812.06162, appendix D. The run took every step with ``rules.base_batch``. The virtual
    run decides where its own samples pass a multiple of ``rules.every_samples``, and its decisions take effect
    ``rules.lag_steps`` later.
    """
    base = rules.base_batch
    track = _track(stretches, batch=base)
    if track is None:
        return None
    rules = replace(rules, act=True)
    state = controller.init(rules, world_size=1)
    place, steps, samples = _Place(), 0.0, 0.0
    schedule: list[tuple[int, int]] = []
    while True:
        batch, before = state.target.batch, state.samples_seen
        due = before - before % rules.every_samples + rules.every_samples
        num = -(-(due - before) // batch)
        if state.pending is not None:
            num = min(num, state.pending.effective_step - state.step - 1)
        place, taken, losses = _go(track, place, steps=num, batch=batch)
        steps, samples = steps + taken, samples + taken * batch
        if place.stretch == len(track):
            break
        seen = before + num * batch
        state = controller.with_due_target(
            replace(
                state,
                step=state.step + num,
                samples_seen=seen,
                peak_lr_fraction=max(state.peak_lr_fraction, *map(rules.schedule, range(before, seen, batch))),
                loss_sum=state.loss_sum + losses * batch,
                loss_samples=state.loss_samples + num * batch,
            )
        )
        if state.samples_seen < due:
            continue
        found, target = stretches[max(0, place.stretch - 1)], state.target  # what was known by then
        state = replace(state, kappa=found.kappa)
        factor = rules.lr_rule(target.batch / base, noise_scale=target.noise_scale, base_batch=base)
        state, action = controller.decide(state, stats=found.stats, lr=found.lr * factor, rules=rules)
        if isinstance(action, ApplyPlan):
            schedule.append((state.samples_seen, action.target.batch))
    fixed_samples = sum(stretch.samples for stretch in stretches)
    return Advice(
        schedule=tuple(schedule),
        steps=math.ceil(steps - _ROUNDING),
        samples=round(samples),
        fixed_steps=-(-fixed_samples // base),
        fixed_samples=fixed_samples,
        unmeasured_samples=sum(stretch.samples for stretch in stretches if not stretch.stats.bounded),
    )


def follow_plan(rules: Rules, *, samples: int) -> Advice:
    """What a policy that carries out a plan does over the ``samples`` of a run: the controller itself takes the steps.

    ``rules.planned``: what a step measured is not looked at, so that none of it needs to be known.
    """
    rules = replace(rules, act=True, total_samples=samples)
    state, schedule = controller.init(rules, world_size=1), []
    while state.samples_seen < samples:
        batch = min(state.target.batch, samples - state.samples_seen)
        seen = state.samples_seen + batch
        sample = GradSample(step=state.step + 1, samples_seen=seen, batch=batch, micro_batches=1, loss=0.0, lr=1.0)
        state, action = controller.advance(state, GradMeasured(sample=sample), rules)
        if isinstance(action, ApplyPlan):
            schedule.append((seen, action.target.batch))
    return Advice(
        schedule=tuple(schedule),
        steps=state.step + 1,
        samples=samples,
        fixed_steps=-(-samples // rules.base_batch),
        fixed_samples=samples,
        unmeasured_samples=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leg:
    """A stretch of the run as progress [steps without noise], with what was measured there."""

    progress: float
    noise_scale: float  # samples
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    stretch: int = 0
    done: float = 0.0  # of its progress


def _track(stretches: Sequence[Stretch], *, batch: int) -> list[_Leg] | None:
    known = [s.stats.noise_scale if s.stats.bounded else None for s in stretches]
    scale = next((x for x in known if x is not None), None)
    if scale is None:
        return None
    legs = []
    for stretch, here in zip(stretches, known, strict=True):
        scale = scale if here is None else here
        legs.append(_Leg(progress=stretch.samples / (batch + scale), noise_scale=scale, loss=stretch.mean_loss))
    return legs


def _go(track: Sequence[_Leg], place: _Place, *, steps: int, batch: int) -> tuple[_Place, float, float]:
    """``(place, steps taken, sum of their losses)`` after up to ``steps`` of ``batch``; fewer where the track ends."""
    left, losses = float(steps), 0.0
    while left > 0 and place.stretch < len(track):
        leg = track[place.stretch]
        each = 1.0 + leg.noise_scale / batch  # steps for one without noise
        needed = (leg.progress - place.done) * each
        taken = min(left, needed)
        left, losses = left - taken, losses + taken * leg.loss
        if needed - taken < _ROUNDING:
            place = _Place(stretch=place.stretch + 1)
        else:
            place = _Place(stretch=place.stretch, done=place.done + taken / each)
    return place, steps - left, losses
