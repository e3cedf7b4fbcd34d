"""A run's curves for TensorBoard, against samples seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

_EVERY_S = 0.5  # a curve needs no more points, and a short step must not pay for one each time
_CURVES = ("loss", "lr", "global_batch", "world_size", "noise_scale", "noise_low", "noise_high", "samples_per_s")


@final
class ScalarBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and only rank zero needs it

        self._writer = SummaryWriter(str(folder))
        self._last_s = float("-inf")

    def add(self, row: Mapping[str, Any], *, now: float) -> None:
        if now - self._last_s < _EVERY_S:
            return
        self._last_s = now
        for name in _CURVES:
            if row[name] is not None:
                self._writer.add_scalar(f"train/{name}", row[name], row["samples_seen"])

    def add_evaluation(self, metrics: Mapping[str, float], *, samples_seen: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"evaluation/{name}", value, samples_seen)

    def add_groups(self, noise_scales: Mapping[str, float | None], *, samples_seen: int) -> None:
        for name, noise_scale in noise_scales.items():
            if noise_scale is not None:
                self._writer.add_scalar(f"noise_scale/{name}", noise_scale, samples_seen)

    def close(self) -> None:
        self._writer.close()
