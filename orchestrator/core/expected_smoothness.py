"""Which batch lets SGD reach an accuracy with the fewest samples, by the expected-smoothness theory?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.core.preferences import Preference, Preferred


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedSmoothness:
    """The optimal batch of Alfarra et al. 2020, arXiv:2005.01097, derived here again and tested by enumeration.

    For a loss that is the mean of ``dataset_size`` = n convex f_i with smoothness L_i, whose mean has ``smoothness`` L
    and is mu-strongly convex, and for steps on uniform subsets of tau samples without replacement (tau-nice sampling):

    - any n vectors d_i of mean D have E|mean over the subset|^2 = (n - tau) / (tau (n - 1)) mean|d_i|^2
      + n (tau - 1) / (tau (n - 1)) |D|^2;
    - for d_i = grad f_i(w) - grad f_i(w*), mean|d_i|^2 <= 2 max L_i (f(w) - f*) and |D|^2 <= 2 L (f(w) - f*), which
      gives ``expected``; for d_i = grad f_i(w*), whose mean is zero, it gives ``noise``, h being mean|d_i|^2;
    - SGD with the step 1/2 min(1 / L(tau), eps mu / (2 sigma(tau))) is within |w - w*|^2 <= eps after
      2 max(L(tau) / mu, 2 sigma(tau) / (eps mu^2)) log(2 |w0 - w*|^2 / eps) steps (Gower et al. 2019,
      arXiv:1901.09401). Times tau this is ``cost``, up to a factor that no tau changes: a line that rises and one that
      falls, so that the fewest samples are where they meet.

    h is taken at the present weights, as in the paper, where it is tr(Sigma) + |G|^2. It falls on the way to w*, and
    the best batch with it, which a run follows only where it may shrink. Before that h overrates the noise at w*: a
    coarse accuracy, reached early, has been seen to take 1.7 times the samples of the best fixed batch, a fine one 1.1
    to 1.3 times. The theory's step is not set by the policy; the LR rule goes on as configured.

    What our stream means for this: an epoch is one seeded permutation cut into consecutive batches, so a batch inside
    an epoch is by itself tau-nice, which is all that L(tau) and sigma(tau) ask. But the batches of an epoch are
    disjoint and so not independent, as the bound on the steps assumes; for it we have no proof, only the tests.

    Raises ``ValueError`` for constants that are missing, not positive, or of no n functions.
    """

    smoothness: float | None  # L [loss per squared weight]
    max_smoothness: float | None  # max L_i
    strong_convexity: float | None  # mu
    accuracy: float | None  # eps [squared weight]
    dataset_size: int  # n

    def __post_init__(self) -> None:
        for key in ("smoothness", "max_smoothness", "strong_convexity", "accuracy"):
            value: float | None = getattr(self, key)
            if value is None:
                raise ValueError(f"controller.{key} is missing: policy expected_smoothness needs it")
            if not 0 < value < math.inf:
                raise ValueError(f"controller.{key} must be a positive number, got {value}")
        mu, L, most = self._constants[:3]
        if not mu <= L <= most <= self.dataset_size * L:
            raise ValueError(
                "no loss has these constants: controller.strong_convexity <= smoothness <= max_smoothness <= "
                f"smoothness x {self.dataset_size} samples must hold, got {mu:g}, {L:g}, {most:g}"
            )

    @property
    def _constants(self) -> tuple[float, float, float, float]:
        """mu, L, max L_i and eps."""
        return (
            self.strong_convexity or 0.0, self.smoothness or 0.0, self.max_smoothness or 0.0, self.accuracy or 0.0
        )  # fmt: skip

    def expected(self, batch: float) -> float:
        """L(tau), with E|grad f_S(w) - grad f_S(w*)|^2 <= 2 L(tau) (f(w) - f*)."""
        _, L, most, _ = self._constants
        n, tau = self.dataset_size, batch
        return most if n == 1 else (n * (tau - 1) * L + (n - tau) * most) / (tau * (n - 1))

    def noise(self, batch: float, mean_sq: float) -> float:
        """sigma(tau), the mean squared length of a batch's gradient at w*; ``mean_sq`` is h, that of a sample's."""
        n, tau = self.dataset_size, batch
        return 0.0 if n == 1 else (n - tau) / (tau * (n - 1)) * mean_sq

    def cost(self, batch: float, mean_sq: float) -> float:
        """Samples to the accuracy, but for a factor that is the same for all batches."""
        mu, _, _, eps = self._constants
        return batch * max(self.expected(batch), 2 * self.noise(batch, mean_sq) / (eps * mu))

    def best_batch(self, mean_sq: float) -> float:
        """Where the two lines of ``cost`` meet; 1 where the falling one is below from the beginning."""
        mu, L, most, eps = self._constants
        n = self.dataset_size
        slope = 2 * (mean_sq / eps / mu) + (n * L - most)
        # n (c + L - max L_i) / (c + n L - max L_i), written so that it cannot fall as c rises, even by rounding.
        return max(1.0, n - n * ((n - 1) * L / slope)) if slope > 0 else 1.0

    def preferred(self) -> Preferred:
        """h = |G|^2 (1 + noise scale): where the interval is wide, all of its width is laid on tr(Sigma)."""

        def at(inputs: PolicyInputs) -> Preference:
            grad_sq = inputs.stats.grad_sq
            if grad_sq is None or grad_sq <= 0:
                return Preference(batch_at=lambda scale: float(inputs.batch), words="; |G|^2 was not measured")
            return Preference(
                batch_at=lambda scale: self.best_batch(grad_sq * (1 + scale)),
                words=f" and |G|^2 {grad_sq:.4g} give the mean squared gradient of a sample",
            )

        return at
