"""What the ranks tell each other now and then, in one small all-reduce: requests, and the sums of the steps since.

Every rank adds its sums and its wish to stop; rank zero adds what the controller asked for. Summed, the vector says the
same to all, so that all adopt a plan, save or stop at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.types import ApplyPlan, BatchPlan, Target

_HEAD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSums:
    """Of one step: one rank's part, or the sum of all parts."""

    weighted_sq_sum: float  # sum over micro-batches of b_i |g_i|^2
    loss_sum: float  # over samples
    part_weighted_sq_sum: float = 0.0  # the first, of a part that is read besides the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """One rank's part, or the sum of all parts."""

    stop: bool = False
    hold: bool = False  # save, then wait to be resized
    save: bool = False
    regroup: bool = False  # go on as another group
    saved_step: int | None = None  # a checkpoint of this step, written behind training's back, can be finished
    rest_steps: int = 0  # so many steps may pass without an exchange
    plan: ApplyPlan | None = None
    sums: tuple[StepSums, ...] = ()

    @property
    def interrupts(self) -> bool:
        """Whether something is asked for that is done at a boundary of the run itself."""
        return self.stop or self.hold or self.save or self.regroup

    def encode(self) -> list[float]:
        saved = 0.0 if self.saved_step is None else 1.0 + self.saved_step
        flags = [
            float(self.stop),
            float(self.hold),
            float(self.save),
            float(self.rest_steps),
            saved,
            float(self.regroup),
        ]
        sums = [
            number for step in self.sums for number in (step.weighted_sq_sum, step.loss_sum, step.part_weighted_sq_sum)
        ]
        if self.plan is None:
            return flags + [0.0] * (_HEAD - len(flags)) + sums
        plan, target = self.plan.plan, self.plan.target
        return [
            *flags,
            1.0,
            float(plan.generation),
            float(plan.world_size),
            float(plan.batch),
            float(plan.micro_batch),
            float(self.plan.effective_step),
            self.plan.lr_factor,
            float(target.noise_scale is not None),
            0.0 if target.noise_scale is None else target.noise_scale,
            float(target.fresh),
            *sums,
        ]

    @staticmethod
    def decode(values: Sequence[float]) -> Announcement:
        stop, hold, save, rest_steps, saved, regroup, has_plan = values[:7]
        numbers = iter(values[_HEAD:])
        rows = zip(numbers, numbers, numbers, strict=True)
        said = Announcement(
            stop=stop > 0,
            hold=hold > 0,
            save=save > 0,
            regroup=regroup > 0,
            rest_steps=int(rest_steps),
            saved_step=int(saved) - 1 if saved else None,
            sums=tuple(StepSums(weighted_sq_sum=w, loss_sum=loss, part_weighted_sq_sum=p) for w, loss, p in rows),
        )
        if not has_plan:
            return said
        generation, world_size, batch, micro_batch, step = (int(v) for v in values[7:12])
        factor, noise_known, noise_scale, fresh = values[12:_HEAD]
        plan = BatchPlan(generation=generation, world_size=world_size, batch=batch, micro_batch=micro_batch)
        target = Target(batch=batch, noise_scale=noise_scale if noise_known else None, fresh=bool(fresh))
        return replace(
            said,
            plan=ApplyPlan(plan=plan, target=target, lr_factor=factor, effective_step=step, reason="announced"),
        )

    def or_else(self, other: Announcement) -> Announcement:
        """What either asks for, with ``other``'s plan if it has one; the sums were taken in by then."""
        return Announcement(
            stop=self.stop or other.stop,
            hold=self.hold or other.hold,
            save=self.save or other.save,
            regroup=self.regroup or other.regroup,
            saved_step=self.saved_step if other.saved_step is None else other.saved_step,
            plan=self.plan if other.plan is None else other.plan,
        )
