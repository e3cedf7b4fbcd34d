"""Which batch stands at which place of the sample stream, for one rank, whoever reads its samples?

The samples and their random draws are the same for any number of loader processes, and for any cut of the stream into
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, final

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate

from orchestrator.core.cursor import mix
from orchestrator.errors import TaskError
from orchestrator.runtime.read_ahead import ReadAhead
from orchestrator.runtime.samples import Failure, IndexOf, SampleReader, generators_kept, indices_at, some
from orchestrator.runtime.transfer import pin

_SAMPLE_DRAWS = 0x5A4D  # keeps a sample's draws apart from those of dropout, which are keyed by position as well


@final
class PositionLoader:
    """Gives micro-batches of the sample stream to one rank.

    ``index_of`` maps stream positions to indices of ``dataset`` (map-style). ``collate`` makes a batch of a list of
    samples (default: torch's). ``loader_workers`` processes read along the course that was set, each ``prefetch``
    micro-batches ahead; with none, samples are read when taken.

    With ``seed_each_sample``, torch's CPU generator, ``random`` and ``numpy.random`` are seeded from (``seed``,
    position) before ``dataset[index]``, and left as found: augmentation draws the same on any rank. Generators that
    the data set owns, and those of a GPU, are its own affair. Stored tensors and lists, which draw nothing, are not
    seeded for. Without it, ``dataset.__getitems__`` is used if there.

    ``pin_memory`` does nothing where there is no CUDA device.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        index_of: IndexOf,
        seed: int,
        loader_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        seed_each_sample: bool = True,
    ) -> None:
        if loader_workers < 0 or prefetch < 1:
            raise ValueError(
                f"a loader needs loader_workers >= 0 and prefetch >= 1, got {loader_workers} and {prefetch}"
            )
        self._index_of = index_of
        self._collate = default_collate if collate is None else collate
        self._pin = pin_memory and torch.cuda.is_available()
        self._seeded = seed_each_sample and not _draws_nothing(dataset)
        self._reader = SampleReader(dataset, key=mix(seed, _SAMPLE_DRAWS) if self._seeded else None)
        plain = type(dataset) is TensorDataset and self._collate is default_collate and not loader_workers
        self._stored = dataset.tensors if plain else None
        self._ahead: ReadAhead | None = None
        if loader_workers:
            self._ahead = ReadAhead(
                self._reader, index_of=index_of, loader_workers=loader_workers, prefetch=prefetch, seed=seed
            )

    def set_course(self, spans: Iterable[tuple[int, int]]) -> None:
        """Say which ``(first position, size)`` this rank will take next, in rising order; call again at every change.

        ``spans`` may be endless; it is drawn from as loader processes become free. What was read or sent out for the
        former course is used where the new one wants it.
        """
        if self._ahead is not None:
            self._ahead.set_course(spans)

    def take(self, first_position: int, size: int, *, off_course: bool = False) -> Any:
        """The collated batch of ``size`` samples from ``first_position`` on; ``off_course`` ones are read here and now.

        Raises ``TaskError``, naming position and index, where a sample cannot be read or a batch not be made of them;
        ``GroundswellError`` where a loader process died; ``ValueError`` where the span is not on the course.
        """
        if size < 1:
            raise ValueError(f"a micro-batch has at least one sample, got size={size} at position {first_position}")
        if self._stored is not None:
            # What stacking the samples one by one would give, in one read.
            rows = torch.from_numpy(self._index_of(np.arange(first_position, first_position + size)))
            batch = [tensor[rows] for tensor in self._stored]
            return pin(batch) if self._pin else batch
        positions = list(range(first_position, first_position + size))
        ahead = None if off_course else self._ahead
        samples = self._read(positions) if ahead is None else ahead.take(positions)
        for sample in samples:
            if isinstance(sample, Failure):
                sample.throw()
        try:
            batch = self._collate(samples)
        except Exception as error:
            indices = indices_at(self._index_of, positions)
            raise TaskError(
                f"no batch could be made of the samples at stream positions {some(positions)} (dataset indices "
                f"{some(indices)}): {type(error).__name__}: {error}; make the samples alike in shape and type, or "
                "give a collate function that joins them"
            ) from error
        return pin(batch) if self._pin else batch

    def close(self) -> None:
        """End the loader processes. What they had read is gone."""
        if self._ahead is not None:
            self._ahead.close()

    def _read(self, positions: list[int]) -> list[Any]:
        with generators_kept() if self._seeded else nullcontext():
            return self._reader.read(positions, indices_at(self._index_of, positions))


def _draws_nothing(dataset: Any) -> bool:
    """Whether reading ``dataset`` surely draws no random numbers, so that seeding would only cost time."""
    if type(dataset) in (Subset, ConcatDataset):
        parts = [dataset.dataset] if type(dataset) is Subset else dataset.datasets
        return all(_draws_nothing(part) for part in parts)
    return type(dataset) in (TensorDataset, list, tuple)
