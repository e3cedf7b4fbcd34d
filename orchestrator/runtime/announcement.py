"""What the ranks tell each other in the one small all-reduce of a step.

Every rank adds its sums and its wishes to stop; rank zero adds what the controller asked for. Summed, the vector
says the same to all, so that all adopt a plan, save or stop at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.types import ApplyPlan, BatchPlan, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """One rank's part, or the sum of all parts."""

    weighted_sq_sum: float = 0.0  # sum over micro-batches of b_i |g_i|^2
    mean_grad_sq: float = 0.0  # |mean gradient|^2
    loss_sum: float = 0.0  # over samples
    rejected: bool = False  # a micro-batch ran out of memory
    stop: bool = False
    hold: bool = False  # save, then wait to be resized
    save: bool = False
    plan: ApplyPlan | None = None

    def encode(self) -> list[float]:
        head = [self.weighted_sq_sum, self.mean_grad_sq, self.loss_sum]
        flags = [float(self.rejected), float(self.stop), float(self.hold), float(self.save)]
        if self.plan is None:
            return head + flags + [0.0] * 9
        plan, noise_scale = self.plan.plan, self.plan.target.noise_scale
        return [
            *head,
            *flags,
            1.0,
            float(plan.generation),
            float(plan.world_size),
            float(plan.batch),
            float(plan.micro_batch),
            float(self.plan.effective_step),
            self.plan.lr_factor,
            float(noise_scale is not None),
            0.0 if noise_scale is None else noise_scale,
        ]

    @staticmethod
    def decode(values: list[float]) -> Announcement:
        weighted, mean_sq, loss_sum, rejected, stop, hold, save, has_plan = values[:8]
        said = Announcement(
            weighted_sq_sum=weighted,
            mean_grad_sq=mean_sq,
            loss_sum=loss_sum,
            rejected=rejected > 0,
            stop=stop > 0,
            hold=hold > 0,
            save=save > 0,
        )
        if not has_plan:
            return said
        generation, world_size, batch, micro_batch, step = (int(v) for v in values[8:13])
        factor, noise_known, noise_scale = values[13:]
        plan = BatchPlan(generation=generation, world_size=world_size, batch=batch, micro_batch=micro_batch)
        target = Target(batch=batch, noise_scale=noise_scale if noise_known else None)
        return replace(
            said,
            plan=ApplyPlan(plan=plan, target=target, lr_factor=factor, effective_step=step, reason="announced"),
        )

    def including(self, earlier: Announcement) -> Announcement:
        """The requests of ``earlier`` too: it was heard in a step that had to be done again."""
        return replace(
            self,
            stop=self.stop or earlier.stop,
            hold=self.hold or earlier.hold,
            save=self.save or earlier.save,
        )
