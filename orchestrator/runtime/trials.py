"""Does a micro-batch of so many samples fit in memory? Tried out with a forward and a backward pass of real samples.

They come in an order of their own, and beside them lies all that training holds: gradients, the optimizer's state,
what measures the noise. Nothing of a trial is left afterwards. A size fits where it fits on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final

import torch
from torch import nn

from orchestrator.config import RunConfig
from orchestrator.core.cursor import Stream, mix
from orchestrator.errors import SessionError
from orchestrator.measure.meter import Meter
from orchestrator.runtime.curvature import LossOf
from orchestrator.runtime.group_noise import GroupNoise
from orchestrator.runtime.kept import Kept
from orchestrator.runtime.loader import PositionLoader
from orchestrator.runtime.memory import is_out_of_memory
from orchestrator.runtime.rng import SampleRandomness
from orchestrator.runtime.step import backward_seed, check_loss
from orchestrator.runtime.transfer import move
from orchestrator.runtime.update import WeightUpdate
from orchestrator.runtime.worker import Worker

_OWN_SAMPLES = 0x666974  # keeps this stream apart from the one that is trained on
# Of the memory that was free: samples of unlike length, fragmentation and libraries' workspaces want some later on.
_MARGIN = 0.1


class DeviceMemory(Protocol):
    def suffices_for(self, trial: Callable[[], None]) -> bool:
        """Run ``trial``, and say whether it left a margin; what it raises comes through."""
        ...


@final
class CudaMemory:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def suffices_for(self, trial: Callable[[], None]) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        ours = torch.cuda.memory_reserved(self._device)
        trial()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) <= (1 - _MARGIN) * (free + ours)


# By type of device. The CPU is not among them: a process that takes too much there is ended, and hears nothing before.
MEMORIES: dict[str, Callable[[torch.device], DeviceMemory]] = {"cuda": CudaMemory}


@final
class Trials:
    """``model`` is the plain module. All ranks make the same calls."""

    def __init__(
        self,
        config: RunConfig,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None,
        worker: Worker,
        update: WeightUpdate,
        meter: Meter,
        groups: GroupNoise,
    ) -> None:
        self._seed = mix(config.run.seed, _OWN_SAMPLES)
        self._seed_each_sample = config.data.seed_each_sample
        self._model = model
        self._optimizer = optimizer
        self._dataset = dataset
        self._collate = collate
        self._worker = worker
        self._update = update
        self._meter = meter
        self._groups = groups
        self._kept: Kept | None = None

    @contextmanager
    def of(self, loss_of: LossOf, memory: DeviceMemory) -> Iterator[Callable[[int], bool]]:
        """Gives what tells of a number of samples whether they fit; model and optimizer are not the run's meanwhile."""
        try:
            yield lambda size: self._fits(size, loss_of, memory)
        finally:
            if self._kept is not None:
                self._kept.put_back()
                self._kept = None
            self._update.discard()

    def _fits(self, size: int, loss_of: LossOf, memory: DeviceMemory) -> bool:
        """Collective. An error other than of memory is raised on all ranks."""
        fits, problem = False, None
        try:
            self._hold_what_training_holds()
            fits = memory.suffices_for(lambda: self._compute(size, loss_of))
        except Exception as error:
            if not is_out_of_memory(error):
                problem = error  # raised below, so that no rank is left waiting
        self._meter.close()
        self._groups.close()
        too_many, failed = self._worker.collective.sum([float(not fits), float(problem is not None)])
        if problem is not None:
            raise problem
        if failed:
            raise SessionError(
                f"another rank could not compute a micro-batch of {size} samples; its own error says why"
            )
        return not too_many

    def _hold_what_training_holds(self) -> None:
        """Gradients, which accumulation adds to, and the optimizer's state, as every step but the first finds them.

        The copy of the weights is more than training holds, and so part of the margin.
        """
        if self._kept is not None:
            return
        kept = Kept(self._model, self._optimizer, None, self._worker.device)
        try:
            # A gradient of zero would not do for those that are to be sparse.
            sparse = {id(m.weight) for m in self._model.modules() if getattr(m, "sparse", False)}
            for parameter in self._update.trained:
                if id(parameter) not in sparse:
                    parameter.grad = torch.zeros_like(parameter)
            self._optimizer.step()
        except Exception:
            kept.put_back()
            raise
        self._kept = kept

    def _compute(self, size: int, loss_of: LossOf) -> None:
        loader = PositionLoader(
            self._dataset,
            self._collate,
            index_of=Stream(size=len(self._dataset), seed=self._seed).indices,
            seed=self._seed,
            seed_each_sample=self._seed_each_sample,
        )
        batch = move(loader.take(0, size), self._worker.device, non_blocking=True)
        randomness = SampleRandomness(self._seed, self._worker.device)
        randomness.begin(0)
        try:
            self._meter.begin_step(measure=True)
            self._groups.begin_step(measure=True)
            loss = loss_of(self._model, batch)
            check_loss(loss)
            loss.backward(backward_seed(loss))
            self._meter.end_micro_batch(size=size, loss=loss.detach(), loss_scale=1.0)
            self._groups.end_micro_batch(size=size, loss_scale=1.0)
        finally:
            randomness.end()
