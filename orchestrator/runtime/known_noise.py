"""What is known of the noise after the lines written so far: of the whole gradient, and by group.

Every rank of a group that may change takes it in alike, for any of them may have to go on with the run's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from orchestrator.core import codec, groups, noise
from orchestrator.core.groups import GroupSums
from orchestrator.core.noise import NoiseSettings, NoiseState
from orchestrator.runtime.brain import STATE_TYPES
from orchestrator.types import GradSample, NoiseStats


@final
class KnownNoise:
    def __init__(self, settings: NoiseSettings) -> None:
        self._settings = settings
        self._state = noise.init(settings)
        self._stats: NoiseStats | None = None
        self._groups: dict[str, NoiseState] = {}

    def absorb(self, sample: GradSample) -> None:
        """Take in a step of the run, in order."""
        self._state = noise.absorb(self._state, sample, self._settings)

    def stats(self, *, decides: bool) -> NoiseStats:
        """The statistics for a step's line: made anew at every decision, and repeated in between.

        They take longer than the rest of a short step's bookkeeping, and move slowly.
        """
        if decides or self._stats is None:
            self._stats = noise.stats(self._state, self._settings)
        return self._stats

    @property
    def scale(self) -> float | None:
        """The noise scale [samples] after the last step, where its interval has two ends."""
        stats = noise.stats(self._state, self._settings)
        return stats.noise_scale if stats.bounded else None

    def absorb_groups(self, sums: GroupSums, names: Sequence[str]) -> None:
        """Take in a step by group, in order; ``names`` are the groups'."""
        self._groups = groups.absorb(self._groups, sums, self._settings, names=names)

    def by_group(self) -> dict[str, Mapping[str, Any]]:
        """What a line says of each group."""
        found = {name: noise.stats(state, self._settings) for name, state in self._groups.items()}
        return {name: groups.entry(stats) for name, stats in found.items()}

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the lines after it go on as if there had been no break."""
        return {
            "noise": codec.encode(self._state),
            "noise_stats": codec.encode(self._stats),
            "groups": codec.encode(tuple(self._groups.items())),
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for what ``memory`` did not give."""
        self._state = codec.decode(memory["noise"], STATE_TYPES)
        self._stats = codec.decode(memory["noise_stats"], STATE_TYPES)
        self._groups = dict(codec.decode(memory.get("groups", []), STATE_TYPES))  # none before they were there
