"""Which dataset index stands at which position of the sample stream, so that every sample is used exactly once.

The stream is epoch after epoch; each epoch is a seeded permutation of the data set that is computed, never stored:
a Feistel network over the next power of four, walked until the value falls inside the data set. A step consumes the
positions [p, p + batch), whatever ranks and micro-batches share it out, and may span epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from orchestrator.types import BatchPlan

_ROUNDS = 8
_CHUNK = 4096  # positions
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A seeded, endless stream over a data set of ``size`` samples. ``shuffle=False`` keeps the stored order."""

    size: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a sample stream needs a data set of at least one sample, got {self.size}")

    def indices(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The dataset indices, shape and order of ``positions`` (integers >= 0)."""
        p = np.asarray(positions, dtype=np.int64)
        lowest = int(p.min()) if p.size else 0
        if lowest < 0:
            raise ValueError(f"stream positions start at 0, got {lowest}")
        if self.shuffle and p.ndim == 1 and 0 < p.size < _CHUNK and int(p[-1]) - int(p[0]) == p.size - 1:
            return self._nearby(p, lowest)
        epochs, offsets = np.divmod(p, self.size)
        return _permute(offsets, epochs, size=self.size, seed=self.seed) if self.shuffle else offsets

    def _nearby(self, p: npt.NDArray[np.int64], lowest: int) -> npt.NDArray[np.int64]:
        """A short run of positions, as micro-batches ask for: taken from whole chunks, which numpy computes as fast."""
        first, last = lowest // _CHUNK, int(p.max()) // _CHUNK
        chunks = [_chunk(self, number) for number in range(first, last + 1)]
        whole = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        return whole[p - first * _CHUNK]


def steps(plan: BatchPlan, rank: int, *, position: int, total_samples: int) -> Iterator[tuple[int, int]]:
    """``(first position, size)`` of each micro-batch that ``rank`` takes from ``position`` to the end under ``plan``.

    The last step is cut short so that exactly ``total_samples`` are consumed.
    """
    while position < total_samples:
        now = last_plan(plan, remaining=total_samples - position)
        for offset, size in now.spans(rank):
            yield position + offset, size
        position += now.batch


def last_plan(plan: BatchPlan, *, remaining: int) -> BatchPlan:
    """``plan``, cut to ``remaining`` samples when fewer than a whole batch are left."""
    if remaining >= plan.batch:
        return plan
    return BatchPlan(
        generation=plan.generation,
        world_size=plan.world_size,
        batch=remaining,
        micro_batch=min(plan.micro_batch, remaining),
    )


def mix(seed: int, salt: int) -> int:
    """A 64-bit key from two integers (splitmix64's finaliser): epochs, samples and micro-batches are seeded by it."""
    x = ((seed & _MASK) * _GOLDEN + (salt + 1) * 0xD1B54A32D192ED03) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=8)
def _chunk(stream: Stream, number: int) -> npt.NDArray[np.int64]:
    found = stream.indices(np.arange(number * _CHUNK, (number + 1) * _CHUNK))
    found.flags.writeable = False
    return found


def _permute(
    offsets: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64], *, size: int, seed: int
) -> npt.NDArray[np.int64]:
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    out = offsets.astype(np.uint64)
    keys = _hash(epochs.astype(np.uint64), mix(seed, 0))
    todo = np.ones(out.shape, dtype=bool)
    # Cycle walking: the network permutes 4**half_bits >= size values, so a value that lands outside the data set
    # is sent through again; following a permutation's cycle from inside must come back inside.
    while todo.any():
        left, right, key = out[todo] >> shift, out[todo] & half_mask, keys[todo]
        for round_number in range(1, _ROUNDS + 1):
            left, right = right, left ^ (_hash(right ^ key, mix(seed, round_number)) & half_mask)
        out[todo] = (left << shift) | right
        todo = out >= np.uint64(size)
    return out.astype(np.int64)


def _hash(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    x: npt.NDArray[np.uint64] = values + np.uint64(key)  # wraps modulo 2**64, as meant
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
