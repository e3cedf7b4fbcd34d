"""Which batch, on how many workers, makes the most of time or of money? The goodput of Pollux.

Qiao et al., OSDI 2021, arXiv:2008.12260: goodput = throughput x statistical efficiency, in samples a second that are
worth as much as those of the base batch. Throughput comes from the run's own step times (``throughput.StepModel``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.core.planner import WorkerLimits
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.core.preferences import Preference, Preferred, exploring, untimed
from orchestrator.core.throughput import StepModel


def efficiency(noise_scale: float, batch: float, *, base_batch: int) -> float:
    """(S + B0) / (S + B): what a sample in a batch of B is worth, where one in a batch of B0 is worth 1.

    The statistical efficiency of Pollux (Qiao et al. 2021, arXiv:2008.12260).
    """
    return (noise_scale + base_batch) / (noise_scale + batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """What is made the most of, and among which batches [samples] and fleets (Qiao et al. 2021, arXiv:2008.12260).

    The value of a batch and a fleet of K workers is log goodput - ``cost_weight`` x log K: at 0 the run is the
    shortest; at 1, goodput for each worker, the one of fewest worker-hours; in between, a halving of the time is worth
    2^(1 / cost_weight) times the workers. ``workers`` is ``None`` where the fleet stays as it is: then time and cost
    choose the same batch. ``micro_batch`` [samples] is the most that a worker computes at once at the time, and so the
    least that a batch is shared out by.

    A larger weight never asks for a larger batch, nor a larger noise scale for a smaller one: log goodput has
    increasing differences in (batch, workers) and in (batch, noise scale), since what a step costs once does not fall
    with the workers (Topkis 1978, doi:10.1287/opre.26.2.305).
    """

    cost_weight: float
    base_batch: int
    floor: int
    ceiling: int
    workers: WorkerLimits | None

    def __post_init__(self) -> None:
        if not 0 <= self.cost_weight <= 1:
            raise ValueError(
                "controller.objective must be time, cost, or a number from 0 (time) to 1 (cost), got "
                f"{self.cost_weight}"
            )

    def value(
        self, steps: StepModel, batch: float, *, workers: int, micro_batch: int, noise_scale: float = 0.0
    ) -> float:
        # Batches are shared out by micro-batches; parts of one are allowed here, so that the value has no teeth.
        busiest = max(min(batch, micro_batch), batch / workers)
        seconds = steps.step_time_s(busiest, workers=workers)
        assert seconds is not None, f"{workers} workers were not timed"
        worth = math.log(batch / seconds) + math.log(efficiency(noise_scale, batch, base_batch=self.base_batch))
        return worth - self.cost_weight * math.log(workers)

    def best_batch(self, steps: StepModel, noise_scale: float, *, workers_now: int, micro_batch: int) -> float:
        """The batch of the best pair of batch and fleet, the fleet being one that was timed, or smaller."""
        pairs = [
            (workers, min(float(self.ceiling), max(float(self.floor), batch)))
            for workers in sorted({workers_now, *self._fleets(steps, workers_now)})
            for batch in self._peaks(steps, noise_scale, workers=workers, micro_batch=micro_batch)
        ]

        def value(pair: tuple[int, float]) -> float:
            return self.value(steps, pair[1], workers=pair[0], micro_batch=micro_batch, noise_scale=noise_scale)

        return max(pairs, key=value)[1]

    def best_workers(self, steps: StepModel, batch: int, *, workers_now: int, micro_batch: int) -> int:
        """The best fleet for ``batch``, among those that were timed, or smaller."""
        fleets = sorted({workers_now, *self._fleets(steps, workers_now)})
        return max(fleets, key=lambda k: self.value(steps, batch, workers=k, micro_batch=micro_batch))

    def _peaks(self, steps: StepModel, noise_scale: float, *, workers: int, micro_batch: int) -> tuple[float, float]:
        """Where the value of a fleet has its peaks over the batch: while one worker has all of it, and beyond.

        (t0 + t1 B / K) (1 + S / B) is least at the root of S K t0 / t1; between one micro-batch for one worker and one
        for each, a larger batch takes no longer. The root of each factor, since the product may overflow.
        """
        root = math.sqrt(noise_scale) * math.sqrt((steps.once(workers) or 0.0) / steps.sample_s)
        return min(float(micro_batch), root), max(float(micro_batch * workers), math.sqrt(workers) * root)

    def _fleets(self, steps: StepModel, workers_now: int) -> Iterable[int]:
        # A fleet outside its limits was not brought about by them: it is a launcher's, and stays as it is.
        if self.workers is None or not self.workers.minimum <= workers_now <= self.workers.maximum:
            return ()
        return range(self.workers.minimum, min(self.workers.maximum, steps.most_workers) + 1)

    def preferred(self) -> Preferred:
        """Explores until the times tell what a step costs, as ``tradeoff`` does."""

        def at(inputs: PolicyInputs) -> Preference:
            steps, workers, micro_batch = inputs.steps, inputs.workers, inputs.micro_batch
            if steps is None:
                return exploring(inputs)
            once = steps.once(workers)
            if once is None:
                return untimed(inputs)
            return Preference(
                batch_at=lambda scale: self.best_batch(steps, scale, workers_now=workers, micro_batch=micro_batch),
                words=f", steps of {once:.3g} s + {steps.sample_s:.3g} s a sample on {workers} workers",
            )

        return at
