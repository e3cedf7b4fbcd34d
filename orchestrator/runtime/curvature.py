"""How is the Hessian-weighted noise scale measured in the middle of a run, without a trace in it?

It reads in orders of its own: other seeded streams over the same training set, which no step consumes. The readings are
shared out among the ranks and summed, and each is computed whole on one rank, so that the layout does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from orchestrator.config import RunConfig
from orchestrator.core import curvature
from orchestrator.core.cursor import Stream, mix
from orchestrator.core.curvature import MICRO_BATCHES, READINGS, CurvaturePlan, CurvatureReading, CurvatureStats
from orchestrator.measure.curvature import NotTwiceDifferentiableError, read
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.loader import PositionLoader
from orchestrator.runtime.memory import is_out_of_memory
from orchestrator.runtime.rng import SampleRandomness
from orchestrator.runtime.samples import generators_kept
from orchestrator.runtime.step import check_loss
from orchestrator.runtime.transfer import move
from orchestrator.runtime.worker import Worker

logger = logging.getLogger(__name__)

LossOf = Callable[[nn.Module, Any], Tensor]
_OWN_SAMPLES = 0x63757276  # keeps these streams apart from the one that is trained on


@final
class Curvature:
    """``model`` is the plain module, and ``parameters`` those of it that are trained."""

    def __init__(
        self,
        config: RunConfig,
        *,
        model: nn.Module,
        parameters: list[nn.Parameter],
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None,
        worker: Worker,
        journal: Journal,
    ) -> None:
        self.is_refused = False
        self._config = config
        self._model = model
        self._parameters = parameters
        self._dataset = dataset
        self._collate = collate
        self._worker = worker
        self._journal = journal
        self._last_call = (-1, 0)  # samples seen at it, and how many there were before it at this place

    def measure(self, loss_of: LossOf, *, micro_batch: int, step: int, samples_seen: int) -> CurvatureStats | None:
        """Collective. The statistics, also written down; ``None`` where the model does not allow it, said once.

        ``micro_batch`` is that of the plan in force: what is known to fit in memory for training.
        """
        began_s = self._worker.now()
        mine, problem = [], None
        seed = self._seed(samples_seen)
        try:
            plan = curvature.plan_curvature(len(self._dataset), micro_batch=micro_batch)
        except ValueError as error:
            self._refuse(str(error), step=step, samples_seen=samples_seen)  # on all ranks, as all see the same data
            return None
        try:
            mine = self._own_readings(loss_of, plan, seed=seed)
        except NotTwiceDifferentiableError as error:
            problem = str(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = "differentiating twice ran out of memory; it takes more than training"
        if self._worker.collective.sum([float(problem is not None)])[0]:
            problems = self._worker.collective.gather(problem)
            why = next((p for p in problems if p is not None), "another rank could not")
            self._refuse(why, step=step, samples_seen=samples_seen)
            return None
        found = curvature.stats(self._of_all_ranks(mine), confidence=self._config.controller.confidence)
        self._journal.event(
            "curvature",
            reason=_sentence(found),
            step=step,
            samples_seen=samples_seen,
            hessian_noise_scale=found.noise_scale,
            hessian_noise_low=found.low,
            hessian_noise_high=found.high,
            verdict=found.verdict.value,
            epsilon_max=found.epsilon_max,
            trace_hessian_cov=found.trace_hessian_cov,
            grad_hessian_grad=found.grad_hessian_grad,
            grad_sq=found.grad_sq,
            readings=found.readings,
            samples=READINGS * plan.samples,
            duration_s=self._worker.now() - began_s,
        )
        return found

    def _seed(self, samples_seen: int) -> int:
        """Of the samples of one measurement: each call has others, and the same ones in a run that was resumed."""
        place, before = self._last_call
        self._last_call = (samples_seen, before + 1 if samples_seen == place else 0)
        seed = mix(self._config.run.seed, _OWN_SAMPLES)
        for number in self._last_call:
            seed = mix(seed, number)
        return seed

    def _own_readings(self, loss_of: LossOf, plan: CurvaturePlan, *, seed: int) -> list[CurvatureReading]:
        """This rank's, every so-many-th."""
        loader = PositionLoader(
            self._dataset,
            self._collate,
            index_of=Stream(size=len(self._dataset), seed=seed).indices,
            seed=seed,
            seed_each_sample=self._config.data.seed_each_sample,
        )
        randomness = SampleRandomness(seed, self._worker.device)

        def loss(first: int) -> Tensor:
            batch = move(loader.take(first, plan.micro_batch), self._worker.device, non_blocking=True)
            randomness.begin(first)
            value = loss_of(self._model, batch)
            check_loss(value)
            return value

        found = []
        # Of the kernels for attention only the plain one can be differentiated twice.
        with generators_kept(), _buffers_kept(self._model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            try:
                for reading in range(self._worker.rank, READINGS, self._worker.world_size):
                    *firsts, for_hessian = plan.firsts(reading)
                    found.append(
                        read(
                            [partial(loss, first) for first in firsts],
                            partial(loss, for_hessian),
                            self._parameters,
                            signs=[1 - 2 * (mix(seed, reading * MICRO_BATCHES + j) & 1) for j in range(MICRO_BATCHES)],
                            micro_batch=plan.micro_batch,
                        )
                    )
            finally:
                randomness.end()
        return found

    def _of_all_ranks(self, mine: list[CurvatureReading]) -> list[CurvatureReading]:
        """By number, the same on every rank."""
        numbers = [0.0] * (3 * READINGS)
        for place, reading in zip(range(self._worker.rank, READINGS, self._worker.world_size), mine, strict=True):
            numbers[3 * place : 3 * place + 3] = (reading.trace_hessian_cov, reading.grad_hessian_grad, reading.grad_sq)
        numbers = self._worker.collective.sum(numbers)
        return [
            CurvatureReading(trace_hessian_cov=trace, grad_hessian_grad=product, grad_sq=grad_sq)
            for trace, product, grad_sq in zip(*(numbers[i::3] for i in range(3)), strict=True)
        ]

    def _refuse(self, why: str, *, step: int, samples_seen: int) -> None:
        """Say why on rank zero, which knows, and do not try again."""
        self.is_refused = True
        reason = f"the curvature cannot be measured, and is not tried again in this attempt: {why}"
        if self._worker.rank == 0:
            logger.warning("%s", reason)
        self._journal.event("curvature_refused", reason=reason, step=step, samples_seen=samples_seen)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers, such as running means, are after it as they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


def _sentence(found: CurvatureStats) -> str:
    if found.noise_scale is None:
        return f"no Hessian-weighted noise scale from {found.readings} readings: the curvature is not clearly positive"
    if found.low is None or found.high is None:
        return f"Hessian-weighted noise scale {found.noise_scale:.4g}, without an interval of two ends"
    return f"Hessian-weighted noise scale {found.noise_scale:.4g} [{found.low:.4g}, {found.high:.4g}]"
