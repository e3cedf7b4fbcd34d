"""In which metric does Adam see a gradient? Its diagonal preconditioner, as the steps before this one left it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from orchestrator.errors import SessionError

# The root of an average of n squares has a relative deviation of sqrt(1 / (2 n)), for normal gradients about zero:
# a tenth at 50. Before that the metric moves so much from step to step that readings in it are not of one quantity.
SETTLED_STEPS = 50  # at the betas that the optimizer began with
_ROUNDING = 1e-6  # of a count in float32, once restated at a jump


@final
class AdamPreconditioner:
    """P = 1 / (sqrt(v_hat) + eps) of ``torch.optim.Adam`` or ``AdamW``, with v_hat the bias-corrected second moment.

    The preconditioned noise scale measured with it is tr(P Sigma) / (G' P G), of the norms of P^(1/2) g: what
    B_noise = tr(H Sigma) / (G' H G) becomes for the update P g if the curvature H is proportional to P^-1, since
    tr(P H P Sigma) / (G' P H P G) is the general form. The other form in use, tr(P Sigma P) / |P G|^2 of the norms of
    P g, assumes H proportional to the identity (AdaptDL; Qiao et al. 2021, Pollux, arXiv:2008.12260).

    P must not know the gradients it weighs, else their squares are too small together with it: read during a step, the
    optimizer's state is that of earlier data and the same for all micro-batches and ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ``SessionError`` for another optimizer."""
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise SessionError(
                f"measure.preconditioned needs torch.optim.Adam or AdamW, whose second moments weigh each coordinate "
                f"by itself, and the optimizer is {type(optimizer).__name__}: remove measure.preconditioned"
            )
        self._optimizer = optimizer
        # By number: loading a checkpoint puts other mappings into param_groups, and rules may change the betas.
        self._group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._base_betas = [float(group["betas"][1]) for group in optimizer.param_groups]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

    def root_times(self, gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        """P^(1/2) ``gradient`` in at least float32; zero for a parameter that no step has moved yet."""
        state = self._optimizer.state.get(parameter)
        if not state:
            return torch.zeros_like(gradient)
        group = self._optimizer.param_groups[self._group_of[id(parameter)]]
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        dtype = torch.promote_types(square.dtype, torch.float32)
        correction = (1 - group["betas"][1] ** state["step"].double()).sqrt()  # in float32, 1 - 0.999 is off by 1e-5
        # Made anew for each gradient: kept for the step, it would be one more copy of the weights.
        root_of_metric = square.to(dtype).sqrt().div_(correction.to(dtype)).add_(group["eps"]).rsqrt_()
        return root_of_metric.mul_(gradient)

    def is_settled(self, parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
        """Whether each of ``parameters`` has been moved often enough: 0-D bool, without waiting for it.

        That is ``SETTLED_STEPS`` times at the betas that the optimizer began with. Where betas follow the batch, the
        count is restated at a jump so that beta2^t stays what it was; the average is as settled after it as before, so
        it is beta2^t that must have come down to what it was after that many steps. (Derived here, by no paper.)
        """
        counts = [self._steps_at_base(parameter) for parameter in parameters]
        if not counts or None in counts:
            return torch.tensor(False, device=device)
        least = torch.stack([count.to(device) for count in counts if count is not None]).min()
        return least >= SETTLED_STEPS * (1 - _ROUNDING)

    def _steps_at_base(self, parameter: nn.Parameter) -> Tensor | None:
        """The t for which base beta2^t is what beta2^step is now, 0-D, float64; ``None`` before the first step."""
        state = self._optimizer.state.get(parameter)
        if not state:
            return None
        number = self._group_of[id(parameter)]
        base, now = self._base_betas[number], float(self._optimizer.param_groups[number]["betas"][1])
        steps: Tensor = state["step"].double()
        return steps if now == base or min(now, base) <= 0 else steps * (math.log(now) / math.log(base))
