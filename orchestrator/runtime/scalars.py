"""A run's curves, against samples seen: which numbers of a line are drawn, by which name, and TensorBoard's picture.

All trackers use the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

_EVERY_S = 0.5  # a curve needs no more points, and a short step must not pay for one each time
_CURVES = (
    "loss", "lr", "global_batch", "accum_steps", "world_size", "noise_scale", "noise_low", "noise_high",
    "samples_per_s",
)  # fmt: skip


def step_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The curves of a line of ``metrics.jsonl``; what is not known, or not finite, is left out."""
    return {f"train/{name}": row[name] for name in _CURVES if _known(row[name])}


def evaluation_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The curves of a line of ``evals.jsonl``."""
    metrics = {name: value for name, value in row.items() if name not in ("step", "samples_seen") and _known(value)}
    return {f"evaluation/{name}": value for name, value in metrics.items()}


def group_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The curves of a line of ``groups.jsonl``."""
    noise_scales = {name: entry["noise_scale"] for name, entry in row["groups"].items()}
    return {f"noise_scale/{name}": value for name, value in noise_scales.items() if _known(value)}


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


@final
class ScalarBoard:
    """``orchestrator.ports.Tracker`` that writes TensorBoard's files."""

    name = "tensorboard"

    def __init__(self, folder: Path, *, now: Callable[[], float]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and only rank zero needs it

        self._writer = SummaryWriter(str(folder))
        self._now = now
        self._last_s = float("-inf")

    def step(self, row: Mapping[str, Any]) -> None:
        now = self._now()
        if now - self._last_s >= _EVERY_S:
            self._last_s = now
            self._draw(step_scalars(row), row)

    def event(self, row: Mapping[str, Any]) -> None:
        """TensorBoard draws no events."""

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._draw(evaluation_scalars(row), row)

    def groups(self, row: Mapping[str, Any]) -> None:
        self._draw(group_scalars(row), row)

    def close(self) -> None:
        self._writer.close()

    def _draw(self, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, row["samples_seen"])
